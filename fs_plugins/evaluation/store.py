"""What an evaluation has done so far: attacked pictures and replies in a folder, whole after a kill at any moment.

All carry a checksum (``fs_plugins.kept``): what is damaged is refused by name, a row by its line. Only an attacked
picture that is damaged when a run goes on is made anew instead.

settings.json                       what every row depends on; a run with others is refused
evaluation.json                     suites, data, and what the run found out: all that ``Results`` needs besides
attacked/TOWER/CONDITION/*.safetensors      one picture each, exactly as it was shown
shown/                              the clean, target and purified pictures of the report
answers/DEFENCE/CONDITION.N.jsonl   replies and features, a row a picture and task, by the N-th process
judged.jsonl                        a judge's scores of captions
defences/                           the PSM that each defence had
certificates/                       rows of fs_plugins.certify
certificates/TASK/                  of what is answered
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fs_plugins.errors import SettingError
from fs_plugins.files import mark, replace, spelled, unused
from fs_plugins.kept import UNSEALED, Lines, check, hold, read, stamped

SETTINGS, JUDGED, DEFENCES = "settings.json", "judged.jsonl", "defences"
ATTACKED, SHOWN = "attacked", "shown"
Row = dict[str, Any]
"""``image``, ``task``, and what was said or measured."""


class Store:
    """The rows and pictures in one evaluation's folder.

    Args:
        folder: where they lie.
        process: this process's number among those that share the pictures.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        self.folder, self.process = folder, process

    @classmethod
    def begin(cls, folder: Path, settings: Mapping[str, Any], process: int = 0) -> Store:
        """A store to write to: in a folder that is new, empty, or of an earlier run with the same settings.

        Args:
            settings: what every row depends on.

        Raises:
            SettingError: the folder holds something else, or a run with other settings, which are named.
        """
        unused(folder, SETTINGS, what="evaluation")
        hold(folder / SETTINGS, settings, "an evaluation")
        return cls(folder, process)

    def hold(self, defence: str, made_of: Mapping[str, Any]) -> None:
        """Tie the folder to what a defence is made of.

        Raises:
            SettingError: it was made of something else in an earlier run.
        """
        hold(self.folder / DEFENCES / f"{defence}.json", made_of, "an evaluation")

    def made_of(self, defence: str) -> dict[str, Any]:
        """What ``hold`` tied the folder to; nothing of a defence that smooths nothing.

        Raises:
            SettingError: the file is damaged.
        """
        path = self.folder / DEFENCES / f"{defence}.json"
        return read(path, "an evaluation") if path.is_file() else {}

    def attacked(self, key: str, name: str) -> Tensor | None:
        """The picture (C, H, W) in [0, 1], or None if it is not there.

        Raises:
            SettingError: it is damaged; the message says which file.
        """
        return self.picture(f"{ATTACKED}/{key}", name)

    def has(self, key: str, name: str) -> bool:
        """Whether an attacked picture is there, whole."""
        try:
            return self.attacked(key, name) is not None
        except SettingError:
            return False

    def keep(self, key: str, name: str, image: Tensor) -> None:
        """An attacked picture, on disk when this returns: the answers that come next are about it."""
        self.keep_picture(f"{ATTACKED}/{key}", name, image)

    def borrow(self, other: Store, tower: str = "none") -> None:
        """Take over the pictures that another evaluation attacked on a tower that both have, before this one begins."""
        for path in sorted((other.folder / ATTACKED / tower).glob("*/*.safetensors")):
            own = self.folder / path.relative_to(other.folder)
            if not own.is_file():
                replace(own, path.read_bytes())

    def picture(self, place: str, name: str) -> Tensor | None:
        """What ``keep_picture`` kept, or None if it is not there.

        Raises:
            SettingError: it is damaged; the message says which file.
        """
        path = self.path(place, name)
        try:
            data = path.read_bytes()
            check(data)
            return load(data)["image"]
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            raise SettingError(
                f"{path}, the picture of {name}, is damaged: {error}. Delete it and run the same command again: it is "
                "then made anew."
            ) from None

    def keep_picture(self, place: str, name: str, image: Tensor) -> None:
        """Keep a picture, on disk when this returns."""
        data = save({"image": image.detach().cpu().contiguous()}, {"name": spelled(name), **UNSEALED})
        replace(self.path(place, name), stamped(data))

    def path(self, place: str, name: str) -> Path:
        """Where a picture lies. Pictures' names may be anything, files' may not."""
        return self.folder / place / f"{mark(name)[:24]}.safetensors"

    def rows(self, key: str) -> dict[tuple[str, str], Row]:
        """(picture, task) -> its row, of all processes.

        Raises:
            SettingError: a row is damaged, or there are two of one picture and task; the message says where.
        """
        place = self.folder / "answers" / key
        parts = [
            p for p in place.parent.glob("*.jsonl") if re.fullmatch(rf"{re.escape(place.name)}\.\d+\.jsonl", p.name)
        ]
        rows: dict[tuple[str, str], Row] = {}
        for part in sorted(parts):
            own = Lines(part).keyed("image", "task")
            for image, task in own.keys() & rows.keys():
                raise SettingError(
                    f"{part} says again what another file beside it says of {image}, {task}. Remove one of the two and "
                    "run again."
                )
            rows |= cast(dict[tuple[str, str], Row], own)
        return rows

    def add(self, key: str, rows: Iterable[Row]) -> None:
        """Rows with ``image`` and ``task``, on disk when this returns."""
        Lines(self.folder / "answers" / f"{key}.{self.process}.jsonl").append(rows)

    def scores(self, judge: str) -> dict[tuple[str, str], float]:
        """(said, reference) -> a judge's score.

        Raises:
            SettingError: a row is damaged, or there are two of one pair; the message says where.
        """
        rows = Lines(self.folder / JUDGED).keyed("judge", "said", "reference")
        return {(said, reference): row["score"] for (who, said, reference), row in rows.items() if who == judge}

    def score(self, judge: str, said: str, reference: str, score: float) -> None:
        Lines(self.folder / JUDGED).append([{"judge": judge, "said": said, "reference": reference, "score": score}])

    def certificates(self, defence: str) -> list[Path]:
        """The ledgers of a defence's certificates, of all noise levels and processes."""
        return sorted((self.folder / "certificates").glob(f"{defence}-sigma*.jsonl"))

    def certificates_file(self, defence: str, sigma: float, share: tuple[int, int]) -> Path:
        return self.folder / "certificates" / f"{defence}-sigma{sigma:g}.{share[0]}-of-{share[1]}.jsonl"

    def answers_files(self, defence: str, task: str) -> list[Path]:
        """The ledgers of what a defence's answers to a task are certified by, of all processes."""
        return sorted((self.folder / "certificates" / task).glob(f"{defence}.*-of-*.jsonl"))

    def answers_file(self, defence: str, task: str, share: tuple[int, int]) -> Path:
        return self.folder / "certificates" / task / f"{defence}.{share[0]}-of-{share[1]}.jsonl"

    def masking_file(self, eps: float) -> Path:
        """Where the search for masked gradients at this l-inf eps is kept."""
        return self.folder / f"masking-{255 * eps:g}.json"
