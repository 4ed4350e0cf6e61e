"""What an evaluation has done so far: attacked pictures and replies in a folder, whole after a kill at any moment.

settings.json                       what every row depends on; a run with others is refused
attacked/TOWER/CONDITION/*.safetensors      one picture each, exactly as it was shown
answers/DEFENCE/CONDITION.N.jsonl   replies and features, a row a picture and task, by the N-th process
judged.jsonl                        a judge's scores of captions
defences/                           the PSM that each defence had
certificates/                       rows of fs_plugins.certify
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fs_plugins.errors import SettingError
from fs_plugins.files import atomically, changed, whole_lines

SETTINGS, JUDGED, DEFENCES = "settings.json", "judged.jsonl", "defences"


class Store:
    """The folder of one evaluation.

    Args:
        folder: new, empty, or of an earlier run with the same settings.
        settings: what every row depends on.
        process: this process's number among those that share the pictures.

    Raises:
        SettingError: the folder holds something else, or a run with other settings, which are named.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], process: int = 0) -> None:
        self.folder, self.process = folder, process
        others = [item.name for item in folder.glob("[!.]*")] if folder.is_dir() else []
        if folder.is_file() or (others and SETTINGS not in others):
            raise SettingError(f"{folder} exists and holds no evaluation; choose another folder or empty it.")
        self._hold(folder / SETTINGS, settings)

    def hold(self, defence: str, made_of: Mapping[str, Any]) -> None:
        """Tie the folder to what a defence is made of.

        Raises:
            SettingError: it was made of something else in an earlier run.
        """
        self._hold(self.folder / DEFENCES / f"{defence}.json", made_of)

    def _hold(self, path: Path, settings: Mapping[str, Any]) -> None:
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                atomically(path, lambda file: file.write(json.dumps(settings, indent=2).encode() + b"\n"))
            except OSError as error:
                raise SettingError(f"Nothing can be written to {path.parent}: {error}.") from None
            return
        try:
            different = changed(json.loads(path.read_text()), settings)
        except ValueError as error:
            raise SettingError(f"{path} is not what an evaluation wrote: {error}.") from None
        if different:
            raise SettingError(
                f"{self.folder} holds an evaluation with other settings: {'; '.join(different[:4])}. Give the same ones, or "
                "another folder."
            )

    def attacked(self, key: str, name: str) -> Tensor | None:
        """The picture (C, H, W) in [0, 1], or None if it is not there, whole."""
        path = self._picture(key, name)
        try:
            return load_file(path)["image"] if path.exists() else None
        except (SafetensorError, KeyError, OSError):
            return None

    def keep(self, key: str, name: str, image: Tensor) -> None:
        path = self._picture(key, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}")
        save_file({"image": image.detach().cpu().contiguous()}, fresh, {"name": name})
        os.replace(fresh, path)

    def _picture(self, key: str, name: str) -> Path:
        return self.folder / "attacked" / key / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"

    def rows(self, key: str) -> dict[tuple[str, str], dict[str, Any]]:
        """(picture, task) -> its row, of all processes."""
        place = self.folder / "answers" / key
        parts = [
            p for p in place.parent.glob("*.jsonl") if re.fullmatch(rf"{re.escape(place.name)}\.\d+\.jsonl", p.name)
        ]
        return {(row["image"], row["task"]): row for row in self._read(parts)}

    def add(self, key: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows with ``image`` and ``task``, on disk when this returns."""
        self._append(self.folder / "answers" / f"{key}.{self.process}.jsonl", rows)

    def scores(self, judge: str) -> dict[tuple[str, str], float]:
        """(said, reference) -> a judge's score."""
        return {
            (row["said"], row["reference"]): row["score"]
            for row in self._read([self.folder / JUDGED])
            if row["judge"] == judge
        }

    def score(self, judge: str, said: str, reference: str, score: float) -> None:
        row = {"judge": judge, "said": said, "reference": reference, "score": score}
        self._append(self.folder / JUDGED, [row])

    def _read(self, paths: Iterable[Path]) -> list[dict[str, Any]]:
        return [json.loads(line) for path in sorted(paths) if path.exists() for line in whole_lines(path)]

    def _append(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            # A kill may have left half a line, which would swallow the next one.
            if file.seek(0, os.SEEK_END) and not _ends_a_line(file):
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
