"""A training's folder: what it was started with, its last checkpoint, and its log. It survives a kill at any moment.

training.json    the settings; a training with others is refused
checkpoint.pt    the last one, always whole; it knows the log's checksum
log.csv          losses and the robustness score, a row an interval
tensorboard/     the same, if asked for
README.md, psm.safetensors, config.json    the finished PSM, in this order
SHA256SUMS       of all that is finished but the card, which is its author's to edit; with it the PSM is complete
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fs_plugins import files, kept
from fs_plugins.errors import SettingError
from fs_plugins.psm import PSM
from fs_plugins.psm.bundle import CONFIG_NAME, WEIGHTS_NAME

SETTINGS, CHECKPOINT, LOG, CARD = "training.json", "checkpoint.pt", "log.csv", "README.md"
HELD_OUT = "held-out.txt"
DONE = "done"
"""In a checkpoint, the stage after the last."""
COLUMNS = ("stage", "step", "lr", "sigma", "l_diff", "l_rb", "l_mse", "l_stats", "l_id", "score")
ATTACKED = ("l_adv", "l_pull", "l_say")
"""Columns more, of trainings that have an adversarial stage."""


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
        files.unused(self.path, SETTINGS, what="training")
        self.save_every, self.log_every, self.held = save_every, log_every, held
        self._writer: Any = _tensorboard() if tensorboard else None
        self._board: Any = None
        self._columns: tuple[str, ...] = COLUMNS
        self._lock, self._users, self._owned = ExitStack(), 0, False

    @property
    def finished(self) -> bool:
        """Whether the PSM was published here; ``load`` says whether it is still whole."""
        there = {name for name in (kept.SUMS, CONFIG_NAME, CHECKPOINT) if (self.path / name).exists()}
        return kept.SUMS in there or (CONFIG_NAME in there and CHECKPOINT not in there)

    @contextmanager
    def using(self) -> Iterator[None]:
        """What ``own`` took is given back at the end of the outermost such block."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._owned = False
                self._lock.close()

    def own(self) -> None:
        """Keep other trainings out of the folder, until the end of ``using``. The first process of several does this.

        Raises:
            SettingError: another process has it, which is named.
        """
        if not self._owned:
            self._lock.enter_context(files.locked(self.path, "this training"))
            self._owned = True

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with a training that has other settings. Writes nothing.

        Raises:
            SettingError: the folder's training has, and which.
        """
        if (self.path / SETTINGS).exists():
            kept.agree(self.path / SETTINGS, settings, "a training")

    def load(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The last checkpoint of a training with these settings; None if there is none yet. Writes nothing.

        Raises:
            SettingError: the folder's training has other settings, which are named, its checkpoint is damaged, or it is
                finished and something of the result is missing or damaged; the message says what.
        """
        if not (self.path / SETTINGS).exists():
            return None
        self.agree(settings)
        if self.finished:
            if wrong := kept.wrong_sums(self.path, (WEIGHTS_NAME, CONFIG_NAME)):
                raise SettingError(
                    f"{self.path} holds a training that was finished, but {'; '.join(wrong)}. Put back a copy that is "
                    "whole, or train again into another folder."
                )
            return {"stage": DONE, "step": 0, "psm": load_file(self.path / WEIGHTS_NAME)}
        if not (self.path / CHECKPOINT).exists():
            return None
        try:
            with (self.path / CHECKPOINT).open("rb") as file:
                kept.check_end(file)
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file raises depends on where the damage is
            reason = str(error).partition("\n")[0]
            raise SettingError(
                f"{self.path / CHECKPOINT} is damaged ({reason}). Delete it to start from the beginning."
            ) from None
        return state

    def begin(
        self, settings: Mapping[str, Any], stages: Mapping[str, int], stage: str, step: int, log: str | None = None
    ) -> None:
        """Write down the settings, and drop what the log has from after this step.

        Args:
            stages: names -> their numbers of steps, in order.
            log: that ``save`` wrote into the checkpoint that is gone on from, if one is.

        Raises:
            SettingError: the log is damaged; the message says where.
        """
        kept.hold(self.path / SETTINGS, settings, "a training")
        self._before = dict(zip([*stages, DONE], accumulate(stages.values(), initial=0), strict=True))
        self._columns = (*COLUMNS, *ATTACKED) if "adversarial" in stages else COLUMNS
        now = self._before[stage] + step
        if not self.finished:  # then it is as it shall be
            lines = self._log_until(now)
            if log is not None and len(lines) > 1 and self._digest(lines) != log:
                raise self._damaged("it is not what it was when the checkpoint was written")
            files.replace(self.path / LOG, b"".join(line + b"\n" for line in lines))
        if self._writer is not None:
            with files.writing(self.path / "tensorboard"):
                self._board = self._writer(self.path / "tensorboard", purge_step=now + 1)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Append a row."""
        with files.writing(self.path / LOG), (self.path / LOG).open("ab") as file:
            file.write(
                self._lines([{"stage": stage, "step": step, **{name: f"{v:.6g}" for name, v in values.items()}}])
            )
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{stage}/{name}", value, self._before[stage] + step)
            self._board.flush()

    def _log_until(self, now: int) -> list[bytes]:
        """The log's lines, heading and all, up to so many steps of all stages."""
        heading, *rows = kept.whole_lines(self.path / LOG) or [self._heading]
        if heading != self._heading:
            raise self._damaged("line 1 has no or other columns")
        lines = [heading]
        for number, row in enumerate(rows, start=2):
            stage, _, rest = row.decode("ascii", "replace").partition(",")
            step, *values = rest.split(",")
            if (
                stage not in self._before
                or not re.fullmatch("[0-9]{1,18}", step)
                or len(values) != len(self._columns) - 2
            ):
                raise self._damaged(f"line {number} is no row of this training")
            if self._before[stage] + int(step) <= now:
                lines.append(row)
        return lines

    @property
    def _heading(self) -> bytes:
        return ",".join(self._columns).encode()

    def _digest(self, log: list[bytes]) -> str:
        """Of a log's lines; rows after a checkpoint are no part of what it knows."""
        return hashlib.sha256(b"\n".join(log or [self._heading])).hexdigest()

    def _lines(self, rows: list[dict[str, Any]]) -> bytes:
        return "".join(",".join(str(row.get(name) or "") for name in self._columns) + "\n" for row in rows).encode()

    def _damaged(self, why: str) -> SettingError:
        return SettingError(
            f"{self.path / LOG} is damaged: {why}. Put back a copy that is whole, or delete it: the training goes on, "
            "and its log begins here."
        )

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint."""
        whole = {**state, "log": self._digest(kept.whole_lines(self.path / LOG))}

        def write(file: IO[bytes]) -> None:
            torch.save(whole, file)
            kept.end(file)

        files.atomically(self.path / CHECKPOINT, write)

    def publish(self, psm: PSM, card: str) -> None:
        """Put the finished PSM and its model card here; until its configuration is in place, there is none."""
        (self.path / kept.SUMS).unlink(missing_ok=True)
        contents = psm.files()
        written: dict[str, str | bytes] = {CARD: card, **contents}
        for name, data in written.items():
            files.replace(self.path / name, data)
        kept.write_sums(self.path, [name for name in (*contents, LOG, HELD_OUT) if (self.path / name).exists()])
        (self.path / CHECKPOINT).unlink(missing_ok=True)


def _tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SettingError("There is no TensorBoard here: pip install tensorboard, or leave it out.") from None
    return SummaryWriter
