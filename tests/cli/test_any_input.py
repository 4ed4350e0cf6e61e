"""Whatever is typed and whatever files hold, a command ends with a sentence and 0, 1, 2 or 130: no traceback."""

from __future__ import annotations

import os
import random
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from fs_plugins import SettingError
from fs_plugins.cli import app
from fs_plugins.vision import VisionCall

TEXTS = (
    "", " ", "-1", "0", "1", "0.5", "nan", "-inf", "1e999", "9" * 5000, "1/0", "8/255", "True", "yes", "None", "null",
    "all", "exact", "endpoint", "demo", "demo-clip", "photo", "none", "[bold]x[/]", "[/INST]", "\x1b[31mr\x1b]0;t\x07",
    "=HYPERLINK(1)", "\u202ex", "\udcff", "a" * 5000, "..", "-", "--", "-h", "{}", "{", "{:>9999999999}", "{0.x}",
    "[1, 2]", '{"channels": [-8]}', "a\x00b", "a\nb", "http://[", "http://u:p@h:99999/", "hf:", "url:x", "package:..",
    "a/b/c", "~", "~x/y",
)  # fmt: skip
"""What people type by mistake, or on purpose."""

BASES = {
    "demo": ["--images", "2", "--steps", "1"],
    "photos": ["--images", "4", "--steps", "1"],  # where what it needs is not installed, it says that first
    "ask": ["demo", "{picture}", "what is it?"],
    "serve": ["{fresh}"],  # no model is there, so that nothing is ever served
    "playground": ["{fresh}"],
    "certify": ["{picture}", "--n", "8", "--model", "demo-clip"],
    "evaluate": ["--quick", "--data", "{data}", "--model", "demo-clip"],
    "train": ["{pictures}", "--out", "{fresh}", "--model", "demo-clip", "--steps", "1", "--mapper-steps", "1"],
    "doctor": [],
    "registry list": [],
    "registry show": ["{odd}"],
    "registry verify": [],
    "registry add": ["{odd}"],
    "registry push": ["{odd}", "owner/name"],
}
"""Whole calls, which the odd value is added to; what an odd value stands in place of comes later and wins."""


def commands() -> Iterator[tuple[str, str]]:
    """Every command with each of its options, and "" for its arguments."""
    known = typer.main.get_command(app)
    for words in BASES:
        found = known
        for word in words.split():
            found = found.commands[word]
        yield words, ""
        yield from ((words, one.opts[0]) for one in found.params if one.param_type_name == "option")


def test_every_command_is_here():
    known = typer.main.get_command(app).commands
    names = {name for name in known if name != "registry"} | {f"registry {name}" for name in known["registry"].commands}
    assert names == set(BASES)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """Files and folders that are what they should not be, by what they are."""
    top = tmp_path_factory.mktemp("odd")
    pictures = top / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 0, 90)).save(pictures / f"{i}.png")
    whole = (pictures / "0.png").read_bytes()
    contents = {
        "empty.png": b"", "cut.png": whole[:60], "text.png": b"no picture", "zeros.png": bytes(200),
        "list.json": b"[1]",
        "deep.json": b"[" * 10_000 + b"]" * 10_000, "bytes.yaml": b"\xff\xfe\x00a", "twice.yaml": b"seed: 1\nseed: 2\n",
        "bomb.yaml": b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
            b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (i, i, *[i - 1] * 8) for i in range(98, 112)
        ),
        "unknown.yaml": b"nobody: knows\n", "date.yaml": b"seed: 2026-02-31\n", "=cmd.yaml": b"seed: [1, 2]\n",
    }  # fmt: skip
    for name, data in contents.items():
        (top / name).write_bytes(data)
    damaged = top / "psm"
    damaged.mkdir()
    (damaged / "config.json").write_bytes(b'{"name": [')
    (damaged / "psm.safetensors").write_bytes(bytes(40))
    data = top / "data"
    data.mkdir()
    (data / "dataset.yaml").write_bytes(b"name: [\n")
    (top / "nowhere").symlink_to(top / "missing")
    (top / "loop").symlink_to(top / "loop")
    os.mkfifo(top / "pipe.png")
    os.mkdir(os.fsencode(top) + b"/\xff[b]")
    found = {name: str(top / name) for name in (*contents, "missing", "nowhere", "loop", "pipe.png", "psm", "data")}
    below = {"below a file": str(top / "empty.png" / "below"), "bytes": os.fsdecode(os.fsencode(top) + b"/\xff[b]")}
    return {**found, **below, "picture": str(pictures / "0.png"), "pictures": str(pictures), "full": "/dev/full"}


@pytest.fixture
def stopped(monkeypatch):
    """The encoder is never run: what comes before and after is asked here, and it takes its time."""
    from transformers import GenerationMixin

    def refuse(*args, **kwargs):
        raise SettingError("The work began.")

    monkeypatch.setattr(VisionCall, "forward", refuse)
    monkeypatch.setattr(GenerationMixin, "generate", refuse)


def problem(words: str, option: str, value: str, places: dict[str, str], own: Path) -> str | None:
    """What is wrong with how a call ends, if anything is."""
    own.mkdir()
    (own / "registry.yaml").write_text("version: 1\n", "utf-8")
    names = {**places, "fresh": str(own / "fresh"), "odd": value}
    typed = [*words.split(), *(name.format(**names) if name[:1] == "{" else name for name in BASES[words])]
    if words in ("demo", "photos", "evaluate", "certify") and option != "--out":
        typed += ["--out", str(own / "out")]
    if option:
        typed += [option, *[value] * (2 if option == "--sigma-range" else 1)]
    elif "{odd}" not in BASES[words]:
        typed.append(value)
    settings = {"FS_PLUGINS_REGISTRY": str(own / "registry.yaml"), "COLUMNS": "200"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, typed, env=settings)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{typed}\n{''.join(traceback.format_exception(result.exception))}"
    said = result.exit_code in (0, 1, 2, 130) and len(result.output.split()) > 2 and "\x1b" not in result.output
    return None if said else f"{typed} left with {result.exit_code} and said {result.output!r}"


@pytest.mark.parametrize("share", [4, pytest.param(24, marks=pytest.mark.slow)], ids=["a few", "many"])
@pytest.mark.parametrize(("words", "option"), list(commands()))
def test_an_odd_value_ends_in_a_sentence(words, option, share, places, tmp_path, stopped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = random.Random(f"{words} {option}").sample(sorted({*TEXTS, *places.values()}), share)
    found = (problem(words, option, value, places, tmp_path / str(i)) for i, value in enumerate(chosen))
    assert not list(filter(None, found))
