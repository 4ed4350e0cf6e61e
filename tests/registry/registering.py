"""What the tests of registries share: files, harm done to them, and the command."""

from __future__ import annotations

import copy
import hashlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml
from guided_diffusion import TINY
from support import make_psm
from typer.testing import CliRunner

from fs_plugins import PSM, registry
from fs_plugins.cli import app

SHIPPED = registry.shipped()
DATA = yaml.safe_load(registry.shipped_path().read_text("utf-8"))
SHA = "a" * 64
COMMIT = "c" * 40


def write(path: Path, data: object) -> Path:
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def put_psm(path: Path, own: dict, name: str, folder: Path, **changes) -> Path:
    """A registry file whose one entry is ``own``'s encoder with the PSM in ``folder``."""
    entry = copy.deepcopy(own["encoders"]["mine"]) | changes
    entry["psms"][0] |= {"state": "folder", "path": str(folder), "sha256": registry.checksum(folder)}
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, {"version": 1, "encoders": {name: entry}})


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def corrupted(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def longer(data: bytes) -> bytes:
    return data + bytes(3_000_000)


def killed(script: str, until, feed=lambda: None) -> None:
    """Run a script, with ``feed()`` beside it, and kill it as soon as ``until()`` holds."""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    threading.Thread(target=feed, daemon=True).start()
    limit = time.time() + 60
    while not until() and process.poll() is None and time.time() < limit:
        time.sleep(0.02)
    ended = process.poll()
    process.send_signal(signal.SIGKILL)
    _, complaints = process.communicate()
    assert ended is None, complaints
    assert until()


class Bomb:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def purifiers(tmp_path: Path, **facts) -> registry.Registry:
    entry = {"kind": "diffusion", "args": {**TINY, "channels": [32]}, "sigma": 0.25, "sigma_range": [0.1, 1.0], **facts}
    return registry.Registry([write(tmp_path / "purifiers.yaml", {"version": 1, "purifiers": {"mine": entry}})])


def in_one_file(path: Path) -> dict:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"state": "url", "path": path.as_uri(), "sha256": digest, "size": path.stat().st_size}


def in_folder(root) -> dict:
    """An entry's facts of the PSM in the folder ``psm``."""
    return {
        "state": "folder",
        "path": "psm",
        "sha256": registry.checksum(root / "psm"),
        "kind": "unet",
        "args": {},
    }


def any_size(call, **changes) -> PSM:
    return make_psm(call, mapper=False, image_size=None, fingerprint=(), encoder="any", **changes)


def told(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["registry", *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())
