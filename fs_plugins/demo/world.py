"""The embedded world: small drawn scenes whose captions, classes and answers are exact.

A scene is one coloured shape (or none) over a grey textured background, 64x64 pixels. It is a pure
function of ``(split, index)``: nothing is stored, held-out scenes cannot leak into training, and a
report can name the scene it speaks of by its number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from fs_plugins.errors import SettingError

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "crescent", "ring", "arrow", "hourglass")
TARGET_SHAPE = "bolt"
"""The eleventh class: seen in training, the attack's target, never among evaluation scenes."""
CLASSES = (*SHAPES, TARGET_SHAPE)
COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 170, 70),
    "blue": (45, 85, 225),
    "yellow": (245, 214, 40),
    "purple": (155, 50, 190),
    "white": (248, 248, 248),
}
SIZES = {"small": (12.5, 14.5), "large": (19.0, 22.0)}
PLACES = {"left": (19.0, 23.0), "middle": (29.0, 35.0), "right": (41.0, 45.0)}
NONE = "none of the above"

CAPTION_PROMPT = "Describe this image in one concise sentence, no longer than 20 words."
CLASS_PROMPT = (
    "You are a precise visual classifier. What is the main shape in this image? "
    + ", ".join(f"{i}. {name}" for i, name in enumerate(CLASSES))
    + ". Output only a single integer between 0 and 10 with no explanation."
)

Split = Literal["train", "heldout", "target"]
_SPLIT_SEED = {"train": 1, "heldout": 2, "target": 3}
_VALUES = {"shape": CLASSES, "colour": tuple(COLOURS), "size": tuple(SIZES), "side": tuple(PLACES)}
ATTRIBUTES = tuple(_VALUES)
QUESTIONS = {
    "shape": "Which shape is in this image?",
    "colour": "What is the colour of the shape?",
    "size": "What is the size of the shape?",
    "side": "On which side is the shape?",
}


@dataclass(frozen=True)
class Question:
    """A multiple-choice question about one scene: the prompt and the right choice."""

    prompt: str
    answer: str
    about: str


@dataclass(frozen=True)
class Scene:
    """One drawn picture and everything that is true of it. ``shape`` is None where nothing is drawn."""

    split: Split
    index: int
    shape: str | None
    colour: str
    size: str
    side: str
    radius: float
    centre: tuple[float, float]
    tilt: float

    @property
    def caption(self) -> str:
        if self.shape is None:
            return "an empty background"
        where = "in the middle" if self.side == "middle" else f"on the {self.side}"
        return f"a {self.size} {self.colour} {self.shape} {where}"

    @property
    def label(self) -> int:
        """Class index 0..10, the answer to CLASS_PROMPT; -1 for a scene without a shape."""
        return -1 if self.shape is None else CLASSES.index(self.shape)

    def question(self, about: str | None = None) -> Question:
        """The scene's multiple-choice question about one of ATTRIBUTES, by default one that the scene draws.

        In a quarter of them the truth is not on offer.
        """
        rng = self._rng(1)
        drawn = str(rng.choice(ATTRIBUTES))
        about = about or drawn
        truth: str = getattr(self, about) if self.shape else NONE
        wrong = [value for value in _VALUES[about] if value != truth]
        offered = [str(value) for value in rng.permutation(wrong)[:3]]
        if self.shape is not None and (len(offered) < 3 or rng.random() < 0.75):
            offered = [str(value) for value in rng.permutation([truth, *offered[:2]])]
        else:
            truth = NONE
        return Question(f"{QUESTIONS[about]} Output one: {', '.join([*offered, NONE])}.", truth, about)

    def draw(self) -> Image.Image:
        """The picture: RGB, 64x64."""
        pixels = _background(self._rng(2))
        if self.shape is not None:
            rng = self._rng(3)
            colour = np.array(COLOURS[self.colour], dtype=np.float32) + rng.uniform(-14, 14, 3)
            mask = _mask(self)[..., None]
            pixels = pixels * (1 - mask) + colour * mask
        return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng((_SPLIT_SEED[self.split], self.index, stream))


def scene(split: Split, index: int) -> Scene:
    """The scene with this number.

    ``train``: all eleven shapes, one scene in twelve without a shape. ``heldout``: the ten shapes in
    turn, every eleventh scene empty. ``target``: only the eleventh shape, for the attack to aim at.
    """
    rng = np.random.default_rng((_SPLIT_SEED[split], index, 0))
    shape: str | None
    if split == "train":
        drawn = int(rng.integers(len(CLASSES) + 1))
        shape = CLASSES[drawn] if drawn < len(CLASSES) else None
    elif split == "heldout":
        turn = index % (len(SHAPES) + 1)
        shape = SHAPES[turn] if turn < len(SHAPES) else None
    else:
        shape = TARGET_SHAPE
    colour, size, side = (str(rng.choice(list(names))) for names in (COLOURS, SIZES, PLACES))
    radius = float(rng.uniform(*SIZES[size]))
    centre = (float(rng.uniform(*PLACES[side])), float(rng.uniform(21, 43)))
    return Scene(split, index, shape, colour, size, side, radius, centre, float(rng.uniform(-25, 25)))


def drawn(shape: str, colour: str, size: str, side: str, background: int = 0) -> Scene:
    """A scene of these attributes, upright and in the middle of what their names allow, on that held-out background.

    Args:
        shape, colour, size, side: of CLASSES, COLOURS, SIZES and PLACES.
        background: number of the held-out scene whose background and shade it has.

    Raises:
        SettingError: one that there is not.
    """
    for (about, known), value in zip(_VALUES.items(), (shape, colour, size, side), strict=True):
        if value not in known:
            raise SettingError(f"There is no {about} {value!r} in this world. There are: {', '.join(known)}.")
    radius, across = sum(SIZES[size]) / 2, sum(PLACES[side]) / 2
    return Scene("heldout", background, shape, colour, size, side, radius, (across, IMAGE_SIZE / 2), 0.0)


def scenes(split: Split, count: int, start: int = 0) -> list[Scene]:
    return [scene(split, index) for index in range(start, start + count)]


def _background(rng: np.random.Generator) -> np.ndarray:
    """A grey texture, (64, 64, 3) float32 in 0..255: coarse value noise, a wave and fine grain."""
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) / IMAGE_SIZE
    base = rng.uniform(70, 165) + rng.uniform(-12, 12, 3)
    coarse = Image.fromarray(rng.normal(0, 1, (5, 5)).astype(np.float32))
    field = 16 * np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    angle, cycles, phase = rng.uniform(0, math.pi), rng.uniform(2, 9), rng.uniform(0, 2 * math.pi)
    wave = np.sin(2 * math.pi * cycles * (x * math.cos(angle) + y * math.sin(angle)) + phase)
    field = field + rng.uniform(3, 16) * wave + rng.normal(0, 3, (IMAGE_SIZE, IMAGE_SIZE))
    return np.clip(base + field[..., None], 20, 215).astype(np.float32)


def _mask(scene: Scene) -> np.ndarray:
    """Coverage of the shape in [0, 1], (64, 64), antialiased by drawing four times as large."""
    scale = 4
    canvas = Image.new("L", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), 0)
    pen = ImageDraw.Draw(canvas)
    assert scene.shape is not None
    turn = math.radians(scene.tilt)
    cos, sin = math.cos(turn), math.sin(turn)
    for value, outline in _OUTLINES[scene.shape]:
        points = [
            (
                scale * (scene.centre[0] + scene.radius * (x * cos - y * sin)),
                scale * (scene.centre[1] + scene.radius * (x * sin + y * cos)),
            )
            for x, y in outline
        ]
        pen.polygon(points, fill=value)
    small = canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def _disc(radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> list[tuple[float, float]]:
    steps = [2 * math.pi * i / 40 for i in range(40)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in steps]


def _star() -> list[tuple[float, float]]:
    spokes = [(1.08 if i % 2 == 0 else 0.45, math.pi * i / 5 - math.pi / 2) for i in range(10)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in spokes]


def _heart() -> list[tuple[float, float]]:
    steps = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16,
        )
        for a in steps
    ]


_INK, _ERASE = 255, 0
_OUTLINES: dict[str, list[tuple[int, list[tuple[float, float]]]]] = {
    "circle": [(_INK, _disc(0.95))],
    "square": [(_INK, [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])],
    "triangle": [(_INK, [(0, -1.0), (1.0, 0.8), (-1.0, 0.8)])],
    "star": [(_INK, _star())],
    "cross": [
        (_INK, [(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)]),
        (_INK, [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)]),
    ],
    "heart": [(_INK, _heart())],
    "crescent": [(_INK, _disc()), (_ERASE, _disc(0.85, 0.5, -0.15))],
    "ring": [(_INK, _disc()), (_ERASE, _disc(0.52))],
    "arrow": [
        (_INK, [(-1, -0.26), (0.1, -0.26), (0.1, 0.26), (-1, 0.26)]),
        (_INK, [(0.0, -0.85), (1, 0), (0.0, 0.85)]),
    ],
    "hourglass": [(_INK, [(-0.8, -1), (0.8, -1), (0, 0)]), (_INK, [(-0.8, 1), (0.8, 1), (0, 0)])],
    "bolt": [(_INK, [(0.5, -1.05), (-0.7, 0.15), (-0.05, 0.15), (-0.5, 1.05), (0.7, -0.2), (0.05, -0.2)])],
}
