"""The methods of certificates, one entry each: what it needs of the scores, what it is called, whether it proves.

A certificate, its curves and its comparison by method, the plot and the tables read the entries. A new method is one
more: a bound that follows from one statistic of the scores, or the best of several such bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fs_plugins.certificates.bounds import Array, Band, betting_lower, mean_bound, plugin_mean
from fs_plugins.errors import SettingError

if TYPE_CHECKING:
    from fs_plugins.certificates.certificate import Certificate

Statistic = float | Band


@dataclass(frozen=True)
class Part:
    """One statistic of the scores, and the bound of <m(x'), v> that follows from it.

    Args:
        field: the field of Certificate that keeps the statistic. One of another kind is a new field, None by default.
        of: (n,) sorted scores and an alpha -> the statistic, wrong with probability at most alpha.
        bound: the statistic and distances delta = eps / sigma -> the bound, of delta's shape.
        words: what the statistic is called in a sentence.
    """

    field: str
    of: Callable[[Array, float], Statistic]
    bound: Callable[[Any, ArrayLike], Array]
    words: str


@dataclass(frozen=True)
class Method:
    """The largest of its parts' bounds, at every distance; the parts share alpha equally.

    Args:
        name: what users write.
        title: what tables and plots call it.
        parts: see Part; each with a field of its own.
        is_estimate: it promises nothing at any confidence, spends no alpha and takes no angular statistics.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    is_estimate: bool = False

    def statistics(self, scores: Array, alpha: float) -> dict[str, Statistic]:
        """The fields of Certificate that this method needs, from sorted scores; they spend alpha."""
        spent = alpha / len(self.parts)
        return {part.field: part.of(scores, spent) for part in self.parts}

    def holds(self, part: Part) -> bool:
        """Whether a certificate by this method has what another method's part needs."""
        return part in self.parts or part == SAMPLE

    def alone(self) -> list[Method]:
        """The methods of one part that a certificate by this one can be asked for, in the order of the table."""
        return [one for one in METHODS.values() if len(one.parts) == 1 and self.holds(one.parts[0])]

    def bound(self, certificate: Certificate, delta: Array) -> Array:
        """The bound of <m(x'), v> that a certificate's statistics give at delta = eps / sigma."""
        bounds = [part.bound(getattr(certificate, part.field), delta) for part in self.parts]
        return np.asarray(np.max(bounds, axis=0))

    def check(self, certificate: Certificate) -> None:
        """Refuse a certificate with other statistics than its method's.

        Raises:
            SettingError: it lacks one, or has one too many.
        """
        own = {part.field for part in self.parts}
        for part in (part for one in METHODS.values() for part in one.parts if part != SAMPLE):
            if (getattr(certificate, part.field) is None) == (part.field in own):
                raise SettingError(f"A certificate by {self.name!r} and {part.words} do not go together.")


SAMPLE = Part("mean", lambda scores, alpha: plugin_mean(scores), mean_bound, "a sample mean")
"""Every certificate has it, whatever its method."""

MEAN = Part("lower", betting_lower, mean_bound, "a bound of the mean score")
DISTRIBUTION = Part("band", Band.from_scores, Band.bound, "a band")

METHODS = {
    method.name: method
    for method in (
        Method("plugin", "paper's estimate", (SAMPLE,), is_estimate=True),
        Method("mean", "mean (betting)", (MEAN,)),
        Method("distribution", "distribution", (DISTRIBUTION,)),
        Method("best", "best of both", (DISTRIBUTION, MEAN)),
    )
}
DEFAULT = "best"
CERTIFIED = "certified"
"""What curves and tables call the bound by a certificate's own method, with all that it holds."""


def method_of(name: str) -> Method:
    """The method of this name.

    Raises:
        SettingError: there is none; the message names all.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise SettingError(f"method must be one of {tuple(METHODS)}, got {name!r}.")
    return METHODS[name]
