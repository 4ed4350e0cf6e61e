"""A reader: a small net that learns from features what a model would say, to be asked in its place.

A language model costs more than all that comes before it. The adversarial stage asks thousands of times, mostly to
learn which way features must not be pushed, for which a reader will do.

Shapes: B images, L places in an answer, V words that answers have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.answers import Answers, Spoken
from fs_plugins.noise import keyed, normal, uniform
from fs_plugins.psm import PSM
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.training.data import Pictures
from fs_plugins.vision import Features, VisionCall

PICTURES, BATCH, LR = 3072, 48, 2e-3
"""What a reader learns from at most, how many a step, and at which learning rate."""
MOST_WORDS, LONGEST = 512, 32


class Reader(nn.Module):
    """Features -> (B, L, V) logarithms of the words' probabilities; word 0 is the end, or a rare one.

    Args:
        shapes: of each readout, (tokens, width), or (width,).
        places, words: L and V.
        queries: that look at the tokens of a readout.
        width: of the hidden layer.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], places: int, words: int, queries: int = 8, width: int = 256
    ) -> None:
        super().__init__()
        self.shapes, self.places, self.words = [list(shape) for shape in shapes], places, words
        self.looks = nn.ModuleList(_Look(shape, queries) for shape in shapes)
        total = sum(look.width for look in self.looks if isinstance(look, _Look))
        self.head = nn.Sequential(nn.Linear(total, width), nn.GELU(), nn.Linear(width, places * words))

    def forward(self, features: Features) -> Tensor:
        seen = [look(value) for look, value in zip(self.looks, features.values(), strict=True)]
        said = self.head(torch.cat(seen, 1)).view(-1, self.places, self.words)
        return said.log_softmax(-1)


class _Look(nn.Module):
    """A readout -> (B, width): some learned averages of its tokens, or itself."""

    def __init__(self, shape: tuple[int, ...], queries: int) -> None:
        super().__init__()
        depth = shape[-1]
        self.norm = nn.LayerNorm(depth)
        self.width = depth if len(shape) == 1 else queries * depth
        self.keys: nn.Linear | None = None
        if len(shape) > 1:
            self.keys = nn.Linear(depth, queries, bias=False)
            self.values = nn.Linear(depth, depth)
            where = torch.zeros(shape, dtype=torch.float32, device=self.norm.weight.device)
            self.where = nn.Parameter(nn.init.normal_(where, std=0.02))

    def forward(self, value: Tensor) -> Tensor:
        seen = self.norm(value.to(self.norm.weight.dtype))
        if self.keys is None:
            return seen
        seen = seen + self.where
        shares = self.keys(seen).softmax(1)
        return torch.einsum("btq,btd->bqd", shares, self.values(seen)).flatten(1)


class Read:
    """The ``Answers`` of a reader: what it thinks that the model would say, at every place.

    Args:
        words: the model's, whose places among V are theirs here, from 1.
        name: what it was taught.
    """

    def __init__(self, call: VisionCall, reader: Reader, words: Sequence[int], name: str) -> None:
        self.call, self.reader, self.words, self.name = call, reader, list(words), name

    def __str__(self) -> str:
        return self.name

    @classmethod
    def of(cls, call: VisionCall, state: dict[str, Any], device: torch.device) -> Read:
        """What ``state`` told of."""
        reader = Reader([tuple(shape) for shape in state["shapes"]], state["places"], state["words"])
        reader.load_state_dict(state["weights"])
        return cls(call, reader.to(device).eval().requires_grad_(False), state["vocabulary"], state["name"])

    def state(self) -> dict[str, Any]:
        """All of it, as tensors and plain values."""
        reader = self.reader
        sizes = {"shapes": reader.shapes, "places": reader.places, "words": reader.words}
        return {"name": self.name, "vocabulary": self.words, **sizes, "weights": reader.state_dict()}

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.reader,)

    @torch.no_grad()
    def given(self, output: Any, keys: Sequence[object]) -> Tensor:
        """(B, L)"""
        said: Tensor = self.reader(self.call.wide(output)).argmax(-1)
        return said

    def spoken(self, output: Any, given: Tensor) -> Spoken:
        said = self.reader(self.call.wide(output))
        image = torch.arange(len(given), device=given.device).repeat_interleave(self.reader.places)
        return Spoken(said.flatten(0, 1), given.flatten(), image, len(given))


def learned(
    asked: Sequence[Answers], call: VisionCall, psm: PSM, images: Pictures, *, sigma: float, seed: int, steps: int
) -> list[Read]:
    """Readers that learned what a model says of plain features, and of noisy ones as the PSM makes them at the time.

    Args:
        asked: the model's answers, each of which gets a reader.
        images: the model is asked once about each of the first few thousand.
        sigma: the highest noise level.
        seed: of weights, order and noise, with the questions.
        steps: of AdamW.
    """
    device, marks = call.device, (seed, "reader", *map(str, asked))
    count = min(PICTURES, len(images))
    told: list[list[list[int]]] = [[] for _ in asked]
    with torch.no_grad():
        for first in range(0, count, BATCH):
            shown = torch.stack([images[i] for i in range(first, min(first + BATCH, count))]).to(device)
            output = call.look(shown)
            for rows, answers in zip(told, asked, strict=True):
                rows += _said(answers.spoken(output, answers.given(output, range(len(shown)))))
        shapes = [tuple(value.shape[1:]) for value in call.wide(output).values()]
    torch.default_generator.manual_seed(keyed(*marks).initial_seed())
    words = [_words(rows) for rows in told]
    readers = [
        Reader(shapes, min(LONGEST, max(map(len, rows)) + 1), len(own) + 1).to(device)
        for rows, own in zip(told, words, strict=True)
    ]
    wanted = [
        torch.tensor([_places(row, own, reader.places) for row in rows], dtype=torch.long, device=device)
        for reader, rows, own in zip(readers, told, words, strict=True)
    ]
    road = FeatureSmoother(call, psm=psm, sigma=psm.config.sigma)
    optimizer = torch.optim.AdamW([p for reader in readers for p in reader.parameters()], lr=LR)
    trained = psm.training
    psm.eval()
    for step in range(steps):
        drawn = keyed(*marks, step)
        chosen = (count * uniform(drawn, (BATCH,))).long()
        shown = torch.stack([images[int(i)] for i in chosen]).to(device)
        with torch.no_grad():
            if step % 2:
                level = sigma * uniform(drawn).item()
                seen = road.draw(shown, normal(drawn, shown.shape).to(shown), level)
            else:
                seen = call.encode(shown)
        losses = [
            nn.functional.nll_loss(reader(seen).flatten(0, 1), rows[chosen].flatten(), reduction="sum") / BATCH
            for reader, rows in zip(readers, wanted, strict=True)
        ]
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    psm.train(trained)
    return [
        Read(call, reader.eval().requires_grad_(False), list(own), f"a reader of: {answers}")
        for reader, own, answers in zip(readers, words, asked, strict=True)
    ]


def _said(spoken: Spoken) -> list[list[int]]:
    """The words of each image's answer."""
    rows: list[list[int]] = [[] for _ in range(spoken.images)]
    for word, image in zip(spoken.said.tolist(), spoken.image.tolist(), strict=True):
        rows[image].append(word)
    return rows


def _places(row: Sequence[int], words: dict[int, int], places: int) -> list[int]:
    """An answer as places among V, its end as often as it is short."""
    found = [words.get(word, 0) for word in row[:places]]
    return found + [0] * (places - len(found))


def _words(rows: Sequence[Sequence[int]]) -> dict[int, int]:
    """The most frequent words -> their places in V."""
    counts: dict[int, int] = {}
    for row in rows:
        for word in row:
            counts[word] = counts.get(word, 0) + 1
    usual = sorted(counts, key=lambda word: (-counts[word], word))[: MOST_WORDS - 1]
    return {word: place for place, word in enumerate(usual, start=1)}
