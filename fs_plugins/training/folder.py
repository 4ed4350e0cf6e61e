"""A training's folder: what it was started with, its last checkpoint, and its log. It survives a kill at any moment.

training.json    the settings; a training with others is refused
checkpoint.pt    the last one, always whole
log.csv          losses and the robustness score, a row an interval
tensorboard/     the same, if asked for
README.md, psm.safetensors, config.json    the finished PSM, in this order; with the last one it is complete
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fs_plugins.errors import SettingError
from fs_plugins.files import atomically, changed, whole_lines
from fs_plugins.psm import PSM
from fs_plugins.psm.bundle import CONFIG_NAME, WEIGHTS_NAME

SETTINGS, CHECKPOINT, LOG, CARD = "training.json", "checkpoint.pt", "log.csv", "README.md"
DONE = "done"
"""In a checkpoint, the stage after the last."""
COLUMNS = ("stage", "step", "lr", "sigma", "l_diff", "l_rb", "l_mse", "l_stats", "l_id", "score")


class TrainingFolder:
    """Where a training keeps what it needs to go on, and what people want to watch.

    Args:
        path: an empty or new folder, or one of an earlier run of the same training.
        save_every, log_every: steps between checkpoints, and between rows of the log.
        held: (B, C, H, W) held-out images in [0, 1]; their robustness score is logged beside the losses.
        tensorboard: whether to log for TensorBoard as well.

    Raises:
        SettingError: the folder holds something else, or TensorBoard is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        save_every: int = 500,
        log_every: int = 50,
        held: Tensor | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.path = Path(path)
        if save_every < 1 or log_every < 1:
            raise SettingError(f"save_every and log_every are steps >= 1, got {save_every} and {log_every}.")
        others = [p.name for p in self.path.glob("[!.]*")]
        if self.path.is_file() or (others and SETTINGS not in others):
            raise SettingError(f"{self.path} exists and holds no training; choose another folder or empty it.")
        self.save_every, self.log_every, self.held = save_every, log_every, held
        self._writer: Any = _tensorboard() if tensorboard else None
        self._board: Any = None

    def load(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The last checkpoint of a training with these settings; None if there is none yet. Writes nothing.

        Raises:
            SettingError: the folder's training has other settings, which are named, or its checkpoint is damaged.
        """
        if not (self.path / SETTINGS).exists():
            return None
        try:
            different = changed(json.loads((self.path / SETTINGS).read_text()), settings)
        except ValueError as error:
            raise SettingError(f"{self.path / SETTINGS} is not what a training wrote: {error}.") from None
        if different:
            raise SettingError(
                f"{self.path} holds a training with other settings: {'; '.join(different[:4])}. Give the same ones, or "
                "another folder."
            )
        if (self.path / CONFIG_NAME).exists():
            return {"stage": DONE, "step": 0, "psm": load_file(self.path / WEIGHTS_NAME)}
        if not (self.path / CHECKPOINT).exists():
            return None
        try:
            kept: dict[str, Any] = torch.load(self.path / CHECKPOINT, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file raises depends on where the damage is
            reason = str(error).partition("\n")[0]
            raise SettingError(
                f"{self.path / CHECKPOINT} is damaged ({reason}). Delete it to start from the beginning."
            ) from None
        return kept

    def begin(self, settings: Mapping[str, Any], stages: Mapping[str, int], stage: str, step: int) -> None:
        """Write down the settings, and drop what the log has from after this step.

        Args:
            stages: names -> their numbers of steps, in order.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / SETTINGS).exists():
            atomically(self.path / SETTINGS, lambda file: file.write(json.dumps(settings, indent=2).encode() + b"\n"))
        self._before = dict(zip([*stages, DONE], accumulate(stages.values(), initial=0), strict=True))
        now = self._before[stage] + step
        lines = whole_lines(self.path / LOG) if (self.path / LOG).exists() else []
        rows = [r for r in csv.DictReader(lines) if self._before[r["stage"]] + int(r["step"]) <= now]
        atomically(self.path / LOG, lambda file: file.write(_lines([dict(zip(COLUMNS, COLUMNS, strict=True)), *rows])))
        if self._writer is not None:
            self._board = self._writer(self.path / "tensorboard", purge_step=now + 1)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Append a row."""
        with (self.path / LOG).open("ab") as file:
            file.write(_lines([{"stage": stage, "step": step, **{name: f"{v:.6g}" for name, v in values.items()}}]))
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{stage}/{name}", value, self._before[stage] + step)
            self._board.flush()

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint."""
        atomically(self.path / CHECKPOINT, lambda file: torch.save(dict(state), file))

    def publish(self, psm: PSM, card: str) -> None:
        """Put the finished PSM and its model card here; until its configuration is in place, there is none."""
        place = self.path / ".psm"
        shutil.rmtree(place, ignore_errors=True)
        psm.save_pretrained(place / "psm")
        (place / "psm" / CARD).write_text(card)
        for name in (WEIGHTS_NAME, CARD, CONFIG_NAME):
            data = (place / "psm" / name).read_bytes()
            atomically(self.path / name, lambda file, data=data: file.write(data))  # type: ignore[misc]
        shutil.rmtree(place)
        (self.path / CHECKPOINT).unlink(missing_ok=True)


def _tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SettingError("There is no TensorBoard here: pip install tensorboard, or leave it out.") from None
    return SummaryWriter


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(",".join(str(row.get(name) or "") for name in COLUMNS) + "\n" for row in rows).encode()
