"""All that the page does, without the page: pictures, attacks, answers and proofs, one run at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

from PIL import Image
from torch import Tensor

import fs_plugins
from fs_plugins.playground import answering, attacking, proving
from fs_plugins.playground.answering import Cosines, Said, Views
from fs_plugins.playground.attacking import Attacked, Frame
from fs_plugins.playground.line import Line
from fs_plugins.playground.live import Tell, live
from fs_plugins.playground.models import Models, Subject
from fs_plugins.playground.pictures import Picture, aim, picture
from fs_plugins.playground.proving import Progress, Proven, SoFar
from fs_plugins.playground.state import State
from fs_plugins.smoothing import FeatureSmoother

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Waiting:
    """So many are served before."""

    ahead: int


@dataclass(frozen=True)
class Visitor:
    """Who wants a run, and whether they still do.

    Args:
        person: whom the limit of runs is for.
    """

    person: str
    stop: Event


@dataclass(frozen=True, eq=False)
class Heard:
    """What the model said, and what it was shown by the plugin; of the attacked picture last."""

    clean: Said | None = None
    attacked: Said | None = None
    views: Views | None = None
    cosines: Cosines | None = None


class Playground:
    """The page's runs, which share one line and one model in memory.

    What takes long is a generator: of ``Waiting`` while others are served, then of what there is so far; its last value
    is the result. Setting the visitor's ``stop``, or closing the generator, ends it within one step.

    Args:
        models: of the page.
        line: of those who want a run.
    """

    def __init__(self, models: Models, line: Line | None = None) -> None:
        self.models = models
        self.line = Line() if line is None else line

    def picture(self, state: State, sent: Image.Image | None = None) -> Picture:
        """What the state's picture is, as the encoder of its model sees it.

        Raises:
            SettingError: see ``pictures.picture``, or there is no such model.
        """
        return picture(state, self.models.about(state.model).size, sent)

    def attack(self, state: State, clean: Picture, visitor: Visitor) -> Iterator[Waiting | Frame | Attacked]:
        """Attack a picture as the state says.

        Raises:
            FSPluginsError: the line is full, or see ``attacking.attacked``.
            Stopped: before its turn came.
        """
        sigma, aimed = self.models.sigma(state), aim(state, self.models.about(state.model).size)

        def work(tell: Tell[Frame]) -> Attacked:
            subject = self.models.get(state.model)
            return attacking.attacked(subject, _smoother(subject, state, sigma), state, clean, aimed, tell)

        yield (yield from self._in_turn(visitor, work))

    def answers(
        self, state: State, clean: Picture, moved: Tensor | None, visitor: Visitor
    ) -> Iterator[Waiting | Heard]:
        """Ask about the picture and, where there is one, about the attacked one.

        Raises:
            FSPluginsError: the line is full, or see ``answering.said``.
            Stopped: somebody stopped it.
        """
        sigma = self.models.sigma(state)

        def work(tell: Tell[Heard]) -> Heard:
            subject = self.models.get(state.model)
            tell(first := Heard(answering.said(subject, state, sigma, clean.image)))
            shown = clean.image if moved is None else moved
            seen = answering.views(_smoother(subject, state, sigma), shown)
            if moved is None:
                return Heard(first.clean, None, seen)
            pair = [_smoother(subject, state, sigma) for _ in range(2)]
            tell(Heard(first.clean, None, seen))
            alike = answering.cosines(subject, pair[0], pair[1], clean.image, moved)
            return Heard(first.clean, answering.said(subject, state, sigma, moved), seen, alike)

        yield (yield from self._in_turn(visitor, work))

    def proof(self, state: State, clean: Picture, visitor: Visitor) -> Iterator[Waiting | SoFar | Progress | Proven]:
        """Certify the picture's feature and, where there are choices, its answer.

        Raises:
            FSPluginsError: the line is full, or see ``proving.features`` and ``proving.answer``.
            Stopped: somebody stopped it; nothing is proven then.
        """
        sigma = self.models.sigma(state)

        def work(tell: Tell[SoFar | Progress]) -> Proven:
            subject = self.models.get(state.model)
            found = proving.features(_smoother(subject, state, sigma), state, clean, tell)
            if len(state.classes) < 2:
                return Proven(found)
            tell(SoFar(found, found.n))
            return Proven(found, proving.answer(subject, state, sigma, clean, tell))

        yield (yield from self._in_turn(visitor, work))

    def _in_turn(self, visitor: Visitor, work: Callable[[Tell[T]], R]) -> Generator[Waiting | T, None, R]:
        with self.line.place(visitor.person) as place:
            for ahead in place.waiting(visitor.stop):
                yield Waiting(ahead)
            return (yield from live(work, visitor.stop))


def _smoother(subject: Subject, state: State, sigma: float) -> FeatureSmoother:
    return fs_plugins.smoothers(subject.call, psm=subject.psm, sigma=sigma, n0=state.n0, seed=state.seed)[0]
