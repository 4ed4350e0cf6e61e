"""All that ``fs-plugins photos`` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fs_plugins.settings import knob

QUICK, FULL = 30, 200
_FOLDER = Path("runs/photos")


@dataclass(frozen=True)
class Settings:
    """One run. How much work a part gets that is left out here depends on ``full``."""

    photos: Path | None = knob(
        None,
        "The NIPS 2017 competition's folder, for all its photographs; left out, those held out.",
    )
    full: bool = knob(
        False,
        f"All {FULL} photographs and more of everything; otherwise {QUICK}, for a quarter of an hour on two cores.",
    )
    images: int | None = knob(None, "How many photographs, the first ones by their names.", least=4)
    steps: int = knob(100, "Steps of the attacks on the encoder alone.", least=1)
    eps: str = knob("16/255", "l-inf radius of the attacks in [0, 1] pixels, as people write it.")
    adaptive_images: int | None = knob(
        None, "Photographs that are attacked through the defences, half of them at other noise levels.", least=2
    )
    adaptive_steps: int | None = knob(None, "Steps of these attacks, with fresh draws at each.", least=1)
    sigma_images: int | None = knob(None, "Photographs of the second attack and of the table of noise levels.", least=2)
    certified_images: int | None = knob(None, "Photographs that are certified.", least=1)
    spoken_images: int | None = knob(None, "Photographs that the small language model is asked about.", least=2)
    draws: int = knob(1000, "Draws that each is certified with.", least=20)
    n0: int = knob(4, "Noisy draws per photograph.", least=1)
    sigma: float = knob(0.25, "Noise level in [0, 1] pixels of all but the table of them; the paper's.")
    psm: str = knob("auto", "The encoder's own PSM: \"auto\" is the registry's, or a folder or hub id.")
    general: str = knob("photo-light", "The purifier that knows no encoder.")
    purifying: str = knob(
        "auto",
        "Precision of purifiers: float32; bfloat16, a third of the time where the processor multiplies in it (GPUs, "
        "CPUs with AMX) and several times as long elsewhere; or auto, the faster of them.",
    )
    seed: int = knob(0, "Of attacks, serving noise and certificates.")
    batch_size: int = knob(8, "Photographs at once; bounds memory, changes no result.", least=1)
    out: Path = knob(_FOLDER, "Folder for everything; an interrupted run goes on from it.")

    @property
    def count(self) -> int:
        """How many photographs."""
        return self.images or (FULL if self.full else QUICK)

    def effort(self, name: str) -> int:
        """How much of something: what was asked for, else what is usual; of photographs no more than there are."""
        usual = (_USUAL_FULL if self.full else _USUAL)[name]
        given = getattr(self, name, None)
        wanted = usual if given is None else given
        return min(wanted, self.count) if name.endswith("_images") else wanted


_USUAL = {
    "adaptive_images": 4,
    "adaptive_steps": 8,
    "sigma_images": 8,
    "certified_images": 2,
    "sigma_certified_images": 1,
    "spoken_images": 6,
}
_USUAL_FULL = {
    "adaptive_images": 50,
    "adaptive_steps": 50,
    "sigma_images": 200,
    "certified_images": 20,
    "sigma_certified_images": 20,
    "spoken_images": 200,
}
