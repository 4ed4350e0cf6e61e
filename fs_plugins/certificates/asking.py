"""Model in, answers out: independent servings of one image, each read as one of some classes, and what they certify.

Questions about one image share its servings: what noise, purifier, encoder and mapper cost is spent once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self, Unpack

import torch
from torch import Tensor

from fs_plugins.certificates.answer import AnswerCertificate
from fs_plugins.certificates.certifiers import Drawing
from fs_plugins.certificates.chances import FIXED, RUNNING, answer_radius, lower, probability_for, running_lower
from fs_plugins.certificates.sampling import unheard
from fs_plugins.certificates.values import FRESH, alpha_of
from fs_plugins.checks import number, settle, whole, words
from fs_plugins.errors import SettingError
from fs_plugins.noise import seeded
from fs_plugins.readings import Reading
from fs_plugins.smoothing import FeatureSmoother

CANDIDATES = (1, 2, 4)
"""The numbers of draws per serving that the pilot chooses from."""
PAIRED = (
    "Answers are certified of independent draws. Antithetic pairs show the model x + e and x - e, which together show "
    "x itself, so nothing can be promised of an answer that reads both. Serve what is certified with noise='iid'."
)


@dataclass(frozen=True)
class Question:
    """What is asked about an image, and how the answer is read."""

    text: str
    reading: Reading

    def __post_init__(self) -> None:
        if not words("A question", self.text).strip():
            raise SettingError("A question is empty.")
        if not isinstance(self.reading, Reading):
            raise SettingError(
                f"A reading has read, settled, fitted and error (see fs_plugins.readings), got {self.reading!r}."
            )


@dataclass(frozen=True)
class AnswerPlan:
    """How one image's answers are certified.

    Args:
        n: servings at most.
        alpha: the probability that a certificate may be wrong.
        n0: draws of each serving; None to choose among 1, 2 and 4 on the pilot.
        target: an l2 radius at which servings stop, or as soon as it is out of reach. The certificate then holds
            whenever they stop (see ``chances.running_lower``), all of alpha spent on it.
        pilot: servings at each n0 that may be chosen; they choose n0 and the classes, and certify nothing.

    Raises:
        SettingError: a value out of range, or servings that could show nothing even if all were of one class.
    """

    n: int = 1000
    alpha: float = 1e-3
    n0: int | None = None
    target: float | None = None
    pilot: int = 32

    def __post_init__(self) -> None:
        settle(
            self,
            n=whole("n (servings per image)", self.n),
            alpha=alpha_of(self.alpha),
            n0=None if self.n0 is None else whole("n0 (draws per serving)", self.n0),
            pilot=whole("pilot (servings that choose n0 and classes)", self.pilot),
        )
        if self.target is not None:
            expected = "target must be an l2 radius > 0 in [0, 1] pixels"
            settle(self, target=number(expected, self.target, lambda radius: radius > 0))

    @property
    def method(self) -> str:
        """See ``chances.lower``."""
        return FIXED if self.target is None else RUNNING

    @property
    def choices(self) -> tuple[int, ...]:
        """The numbers of draws per serving that there are to choose from."""
        return CANDIDATES if self.n0 is None else (self.n0,)

    def check(self, sigma: float) -> None:
        """Refuse what no servings can show.

        Raises:
            SettingError: n is too small for alpha, or for the target.
        """
        best = lower(self.n, self.n, alpha=self.alpha, method=self.method)
        if best <= 0.5:
            raise SettingError(
                f"n = {self.n} servings can certify nothing at alpha = {self.alpha:g}, even if all answer alike: they "
                f"show a probability of {best:.2f}, and more than .5 is needed. Take n = 100, say, or a larger alpha."
            )
        if self.target is not None and best < probability_for(self.target, sigma=sigma, n0=min(self.choices)):
            most = answer_radius(best, sigma=sigma, n0=min(self.choices)) or 0.0
            raise SettingError(
                f"target = {self.target:g} is out of reach of n = {self.n} servings at sigma = {sigma:g} and alpha = "
                f"{self.alpha:g}: if all answer alike the radius is {most:.3f}. Take more servings or a nearer target."
            )


class Asker(Protocol):
    """A model that is asked about what its encoder shows."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What its answers depend on beside encoder and questions, as JSON."""

    @property
    def generation(self) -> str:
        """How answers are made, for people."""

    def prompt(self, question: str) -> str:
        """All that the model reads; refuses what cannot be asked before anything is drawn."""

    def replies(self, output: Any, question: str, reading: Reading) -> list[str]:
        """The answers to a question, one for each row of an encoder's output.

        Args:
            reading: says when enough of an answer is known.
        """


@dataclass(frozen=True, eq=False)
class Replies:
    """Each image's answers are certified, one certificate a question.

    Args:
        smoother: vision call, PSM and sigma. Its noise must be independent; its n0 is the plan's to choose.
        asker: the model.
        questions: about every image.

    Raises:
        SettingError: antithetic noise, no question or the same twice, or see ``AnswerPlan.check``.
    """

    smoother: FeatureSmoother
    plan: AnswerPlan
    asker: Asker
    questions: Sequence[Question]

    kind: ClassVar[type[AnswerCertificate]] = AnswerCertificate

    def __post_init__(self) -> None:
        if self.smoother.noise != "iid":
            raise SettingError(PAIRED)
        if not self.questions:
            raise SettingError("There is no question to be answered.")
        texts = [question.text for question in self.questions]
        if twice := next((text for text in texts if texts.count(text) > 1), None):
            raise SettingError(f"The question {twice!r} is asked twice.")
        if self.smoother.sigma > 0:
            self.plan.check(self.smoother.sigma)
        for text in texts:
            self.asker.prompt(text)

    @property
    def settings(self) -> Mapping[str, object]:
        asked = [
            (question.text, self.asker.prompt(question.text), str(question.reading)) for question in self.questions
        ]
        return {"questions": asked, "asker": self.asker.settings}

    @property
    def draws(self) -> int:
        return self.plan.pilot * sum(self.plan.choices) + self.plan.n * max(self.plan.choices)

    def rows(self, name: str) -> Sequence[str]:
        return [name if len(self.questions) == 1 else f"{name}: {question.text}" for question in self.questions]

    def trial(self, draws: int) -> Self:
        servings = max(16, draws // max(self.plan.choices))
        plan = replace(self.plan, n=servings, n0=max(self.plan.choices), target=None, pilot=1, alpha=0.5)
        return replace(self, plan=plan)

    def __call__(self, image: Tensor, **drawing: Unpack[Drawing]) -> Sequence[AnswerCertificate]:
        return certify_replies(self, image, **drawing)


@dataclass
class _Asked:
    """One question, as far as it has been answered.

    Args:
        reading: fitted to the pilot.
        predicted: the class that the pilot chose.
    """

    question: Question
    reading: Reading
    predicted: str | None
    said: Counter[str] = field(default_factory=Counter)
    count: int = 0
    n: int = 0
    done: bool = False


def certify_replies(
    replies: Replies,
    image: Tensor,
    *,
    key: bytes,
    rows: int = 32,
    advance: Callable[[int], None] = unheard,
    encoder: tuple[float, ...] | None = None,
    seed: str = FRESH,
) -> list[AnswerCertificate]:
    """The certificates of one image's answers, in the order of the questions.

    Args:
        image: (C, H, W) in [0, 1] at the resolution the encoder sees.
        key: the draws follow from it and from the image.
        rows: draws per forward of the encoder, and servings per forward of what answers.
        advance: told of draws as they are made, and in the end of those that were spared.
        encoder, seed: fields of the certificates.
    """
    plan, asker, smoother = replies.plan, replies.asker, replies.smoother
    served = _Servings(smoother, image, key, rows, advance)
    n0, asked = _chosen(replies, served)
    needed = 0.0 if plan.target is None else probability_for(plan.target, sigma=smoother.sigma, n0=n0)
    made = 0
    while made < plan.n and (live := [one for one in asked if not one.done]):
        size = min(served.most(n0), plan.n - made)
        output = served.block(n0, "bound", made, size)
        made += size
        for one in live:
            said = asker.replies(output, one.question.text, one.reading)
            one.said.update(said)
            one.count += sum(one.reading.read(answer) == one.predicted for answer in said)
            one.n = made
            one.done = plan.target is not None and _over(one, plan, needed + one.reading.error)
    advance(replies.draws - served.made)
    return [
        AnswerCertificate.from_count(
            one.count,
            one.n or plan.pilot,
            alpha=plan.alpha,
            method=plan.method,
            error=one.reading.error,
            sigma=smoother.sigma,
            n0=n0,
            question=one.question.text,
            prompt=asker.prompt(one.question.text),
            reading=str(one.reading),
            generation=asker.generation,
            predicted=one.predicted,
            said=tuple(one.said.most_common(3)),
            image_shape=tuple(image.shape),
            readouts=tuple(readout.name for readout in smoother.call.readouts),
            psm=smoother.psm.config.name if smoother.psm else None,
            encoder=encoder,
            seed=seed,
        )
        for one in asked
    ]


def _chosen(replies: Replies, served: _Servings) -> tuple[int, list[_Asked]]:
    """The number of draws per serving at which the pilot promises most, over all questions, and the classes there."""
    plan, found = replies.plan, {}
    for n0 in plan.choices:
        said: list[list[str]] = [[] for _ in replies.questions]
        for first in range(0, plan.pilot, served.most(n0)):
            output = served.block(n0, "pilot", first, min(served.most(n0), plan.pilot - first))
            for answers, question in zip(said, replies.questions, strict=True):
                answers += replies.asker.replies(output, question.text, question.reading)
        asked, promise = [], 0.0
        for answers, question in zip(said, replies.questions, strict=True):
            reading = question.reading.fitted(answers)
            read = Counter(one for answer in answers if (one := reading.read(answer)) is not None)
            predicted, count = read.most_common(1)[0] if read else (None, 0)
            heard = Counter(() if read else answers)
            asked.append(_Asked(question, reading, predicted, heard, done=not read))
            likely = round(plan.n * (count + 0.5) / (plan.pilot + 1))
            shown = max(0.0, lower(likely, plan.n, alpha=plan.alpha, method=plan.method) - reading.error)
            promise += answer_radius(shown, sigma=replies.smoother.sigma, n0=n0) or 1e-3 * shown
        found[n0] = promise, asked
    best = max(found, key=lambda n0: found[n0][0])
    return best, found[best][1]


def _over(one: _Asked, plan: AnswerPlan, needed: float) -> bool:
    """Whether the target is reached, or is out of reach of all that is left, or of what the draws look like."""
    if running_lower(one.count, one.n, alpha=plan.alpha) >= needed:
        return True
    best = running_lower(one.count + plan.n - one.n, plan.n, alpha=plan.alpha)
    return best < needed or 1 - running_lower(one.n - one.count, one.n, alpha=plan.alpha) < needed


class _Servings:
    """Independent servings of one image, each with a stream of noise of its own, whatever comes in a batch with it."""

    def __init__(
        self, smoother: FeatureSmoother, image: Tensor, key: bytes, rows: int, advance: Callable[[int], None]
    ) -> None:
        self.image = image.detach().float()
        self.rows, self.advance, self.made = rows, advance, 0
        self._smoothers: dict[int, FeatureSmoother] = {}
        self._of = smoother
        self._key = key + hashlib.sha256(self.image.cpu().contiguous().numpy().tobytes()).digest()

    def most(self, n0: int) -> int:
        """Servings of a block."""
        return max(1, self.rows // n0)

    @torch.no_grad()
    def block(self, n0: int, purpose: str, first: int, size: int) -> Any:
        """The encoder's smoothed output for the servings from number ``first`` on, a row each."""
        marks = [self._key + f"{purpose} {n0} {first + i}".encode() for i in range(size)]
        output = self._smoother(n0).look(self.image.expand(size, *self.image.shape), source=_Streams(marks))
        self.made += n0 * size
        self.advance(n0 * size)
        return output

    def _smoother(self, n0: int) -> FeatureSmoother:
        """One for all blocks: making it checks the PSM against the encoder."""
        if n0 not in self._smoothers:
            of = self._of
            self._smoothers[n0] = FeatureSmoother(
                of.call, psm=of.psm, sigma=of.sigma, n0=n0, noise="iid", chunk_size=self.rows
            )
        return self._smoothers[n0]


@dataclass(frozen=True)
class _Streams:
    """One generator for each serving."""

    marks: Sequence[bytes]

    def generators(self, images: Sequence[Tensor] | Tensor) -> list[torch.Generator]:
        return [seeded(mark, image.device) for mark, image in zip(self.marks, images, strict=True)]
