"""Captions, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fs_plugins.evaluation.datasets import Sample
from fs_plugins.evaluation.plan import answers_key
from fs_plugins.evaluation.store import Store
from fs_plugins.evaluation.suites import CLEAN, NONE, TARGET, Condition, Defence


class Caption(NamedTuple):
    """What was said of a sample, what should be, and what the undefended model says of the attack's target."""

    sample: Sample
    said: str
    own: str
    aim: str


def captions(store: Store, defence: Defence, condition: Condition, samples: Iterable[Sample]) -> Iterator[Caption]:
    """The captions that are there, of these samples.

    What should be said is the dataset's caption where it has one, else what the undefended model says of the clean
    picture.
    """
    said = store.rows(answers_key(defence, condition))
    clean, targets = (store.rows(answers_key(NONE, one)) for one in (CLEAN, TARGET))
    for sample in samples:
        rows = [found.get((sample.image, "captioning")) for found in (said, clean, targets)]
        if all(rows):
            reply, own, aim = (row["reply"] for row in rows if row is not None)
            yield Caption(sample, reply, sample.caption or own, aim)
