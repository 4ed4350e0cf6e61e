"""What the page is set to, as one value. Every state is a link: what differs from the defaults, as query parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal
from urllib.parse import urlencode

from fs_plugins import checks
from fs_plugins.demo import world
from fs_plugins.errors import SettingError
from fs_plugins.readings import Words
from fs_plugins.settings import build, default, knob, knobs

Source = Literal["scene", "photo", "upload"]
Attack = Literal["none", "attackvlm", "m-attack", "foa"]
AWAY = "none"
"""The target of an attack that only moves a picture away from itself."""
MOST: Mapping[str, int] = {
    "background": 9999,
    "eps": 64,
    "steps": 500,
    "n0": 16,
    "draws": 5000,
    "servings": 500,
    "seed": 2**31 - 1,
}
"""The largest numbers that a visitor may ask for."""
LONGEST = 500
"""Characters of a question, or of all choices together."""


@dataclass(frozen=True)
class State:
    """What the page is set to.

    Raises:
        SettingError: a value beyond what a visitor may ask for.
    """

    model: str = knob("", "One of those the page was started with; the first if left out.")
    source: Source = knob("scene", "Where the picture is from.")
    shape: str = knob("star", "Of the scene.")
    colour: str = knob("yellow", "Of the scene.")
    size: str = knob("large", "Of the scene.")
    side: str = knob("middle", "Of the scene.")
    background: int = knob(0, "Number of the held-out scene whose background it has.", least=0)
    photo: str = knob("", "Name of a photograph.")
    upload: str = knob("", "Digest of an uploaded picture, which no link can carry.")
    attack: Attack = knob("attackvlm", "Of the picture.")
    adaptive: bool = knob(False, "Whether the attacker knows of the smoothing.")
    eps: int = knob(16, "How far each pixel value may move, in 255ths.", least=1)
    steps: int = knob(40, "Of the attack.", least=1)
    target: str = knob(world.TARGET_SHAPE, "What the picture shall be taken for: a shape, a photograph, or none.")
    question: str = knob(world.QUESTIONS["shape"], "To the model; of a zero-shot model a sentence with {}.")
    choices: str = knob(", ".join(world.CLASSES), "What answers are read as, with commas between.")
    sigma: float | None = knob(None, "Noise level in [0, 1] pixels; the PSM's own if left out.")
    n0: int = knob(4, "Noisy draws per picture.", least=1)
    seed: int = knob(0, "Of the attack and of all draws.", least=0)
    draws: int = knob(500, "That a feature is certified by.", least=20)
    servings: int = knob(60, "That an answer is certified by.", least=20)

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise SettingError(f"{name} is at most {most} on this page, got {getattr(self, name)}.")
        for name in ("question", "choices"):
            if len(checks.words(name, getattr(self, name))) > LONGEST:
                raise SettingError(f"{name} has at most {LONGEST} characters on this page.")
        world.drawn(self.shape, self.colour, self.size, self.side)

    @property
    def classes(self) -> tuple[str, ...]:
        """The choices, one by one."""
        return tuple(one for part in self.choices.split(",") if (one := part.strip()))

    @property
    def reading(self) -> Words:
        """How answers are read.

        Raises:
            SettingError: fewer than two choices, or two that read alike.
        """
        return Words(self.classes)

    @property
    def step_size(self) -> float:
        """Of the attack, in 255ths: what an attack of so many steps takes unless told otherwise."""
        return min(255.0, max(1.0, 2.5 * self.eps / self.steps))

    def query(self) -> str:
        """The link's query: what differs from the defaults."""
        changed = {}
        for one, _ in knobs(State):
            value = getattr(self, one.name)
            if value != default(one):
                changed[one.name] = str(value).lower() if isinstance(value, bool) else value
        return urlencode(changed)


def read(parameters: Mapping[str, str]) -> State:
    """The state that a link speaks of. Parameters that are none of a state's are somebody else's.

    Raises:
        SettingError: a value that no state has.
    """
    known = {one.name for one in fields(State)}
    return build(State, {name: value for name, value in parameters.items() if name in known}, "This link")
