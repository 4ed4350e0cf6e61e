"""All that ``fs-plugins demo`` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fs_plugins.settings import knob

QUICK, FULL = 110, 220
_FOLDER = Path("runs/demo")


@dataclass(frozen=True)
class Settings:
    """One demo run."""

    full: bool = knob(
        False, f"{FULL} scenes for every tower, as evaluate has them; otherwise {QUICK}, robust ones a quarter of them."
    )
    images: int | None = knob(None, "How many held-out scenes (every eleventh has no shape).", least=11)
    robust_images: int | None = knob(
        None, "How many of them, from the first on, the FARE and TeCoA towers get.", least=11
    )
    steps: int = knob(100, "Steps of the attack.", least=1)
    eps: str = knob("16/255", "l-inf radius of the attack in [0, 1] pixels, as people write it.")
    n0: int = knob(4, "Noisy draws per image.", least=1)
    draws: int = knob(1000, "Draws that each of four pictures is certified with.", least=1)
    seed: int = knob(0, "Seed of the serving noise, so that a run can be repeated.")
    out: Path = knob(_FOLDER, "Folder for summary.json, demo.png and all answers.")

    @property
    def count(self) -> int:
        """How many scenes."""
        return self.images or (FULL if self.full else QUICK)

    @property
    def robust_count(self) -> int:
        """How many of them robust towers get."""
        return min(self.count, self.robust_images or (self.count if self.full else max(11, self.count // 4)))
