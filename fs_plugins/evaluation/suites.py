"""The paper's tables, and some it lacks: who is defended how, against what, on which task.

Another table is another entry of ``SUITES``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fs_plugins.errors import SettingError

if TYPE_CHECKING:  # not for the command's list of options
    from fs_plugins.attacks.ball import Norm

Part = Literal["both", "purifier", "mapper", "none"]


@dataclass(frozen=True)
class Smoothing:
    """How an encoder is smoothed; what is None comes from the run's settings.

    Args:
        parts: of the PSM that take part.
        psm: a PSM instead of the run's own, or the name of a transformation of ``rivals``.
        n0: draws per image.
        sigma: noise in [0, 1] pixels.
        votes: how often the model is asked, each time with noise of its own; the most frequent reply counts, of those
            as frequent the first.
    """

    parts: Part = "both"
    psm: str | None = None
    n0: int | None = None
    sigma: float | None = None
    votes: int = 1


@dataclass(frozen=True)
class Defence:
    """A row of a table: an encoder, smoothed or not.

    Args:
        name: in result files; also part of folders' names.
        title: in tables.
        tower: ``"none"`` for the model's own encoder, else a key of the run's robust towers.
        served: whether the answers are those of an endpoint, whose encoder nobody sees.
    """

    name: str
    title: str
    tower: str = "none"
    smoothing: Smoothing | None = None
    served: bool = False


NONE = Defence("none", "none")
FS_PSM = Defence("fs_psm", "FS-PSM", smoothing=Smoothing())
SERVED = Defence("served", "as served", served=True)
DEFENCES = (
    NONE,
    FS_PSM,
    Defence("fare", "FARE", "fare"),
    Defence("fare_fs_psm", "FARE + FS-PSM", "fare", Smoothing()),
    Defence("tecoa", "TeCoA", "tecoa"),
    Defence("tecoa_fs_psm", "TeCoA + FS-PSM", "tecoa", Smoothing()),
)
FS = Defence("fs", "FS", smoothing=Smoothing("none"))
ABLATION = (
    NONE,
    FS,
    Defence("fs_m", "FS + M", smoothing=Smoothing("mapper")),
    Defence("fs_p", "FS + P", smoothing=Smoothing("purifier")),
    FS_PSM,
)


def _transformation(psm: str, title: str) -> Defence:
    return Defence(psm.replace("-", "_"), title, smoothing=Smoothing(psm=psm, n0=1, sigma=0.0))


RIVALS = (
    _transformation("jpeg-75", "JPEG, quality 75"),
    _transformation("jpeg-50", "JPEG, quality 50"),
    _transformation("median-filter", "median, 3 x 3"),
    _transformation("bit-depth", "3 bits a channel"),
    _transformation("total-variation", "total variation"),
    Defence("noise", "one noisy draw, sigma .1", smoothing=Smoothing("none", n0=1, sigma=0.1)),
    Defence("noise_votes5", "vote of 5 noisy draws, sigma .1", smoothing=Smoothing("none", n0=1, sigma=0.1, votes=5)),
)
"""What one would pick instead of FS-PSM, at no training: transformations of the picture (Guo et al., ICLR 2018; Xu et
al., NDSS 2018), noise that is not averaged over, and answers to noisy copies that vote (as in SmoothGuard; Su et al.,
2025). Noise at .1, for plain models hardly answer through more of it."""
LIGHT = "light"
"""Stands for the run's light PSM where a Smoothing names one."""


def _light(defence: Defence) -> Defence:
    if defence.smoothing is None:
        return defence
    smoothing = replace(defence.smoothing, psm=LIGHT)
    return replace(defence, name=f"{defence.name}_light", title=f"{defence.title} (light)", smoothing=smoothing)


def _with_n0(n0: int) -> Defence:
    return Defence(f"fs_psm_n{n0}", f"FS-PSM, n0 {n0}", smoothing=Smoothing(n0=n0))


def _noise_alone(n0: int) -> Defence:
    title = "none with noise" if n0 == 1 else f"FS, n0 {n0}"
    return Defence(f"fs_n{n0}", title, smoothing=Smoothing("none", n0=n0))


@dataclass(frozen=True)
class Condition:
    """What happened to the pictures before they were shown.

    Args:
        method: ``"clean"``, ``"target"`` for the pictures that attacks aim at, or an attack's name.
        eps255: l-inf radius in 255ths.
        adaptive: made through the defence itself rather than on its bare encoder.
        draws: that each step averages over; as the run is set up if None.
        restarts: how often each picture is attacked, from a start of its own; the best is shown.
        through: a PSM that the attack is made through in place of the defence's own: what passes from one to another.
        l2: l2 radius in [0, 1] pixel units, in place of the l-inf one.
    """

    method: str = "clean"
    eps255: float = 0
    adaptive: bool = False
    draws: int | None = None
    restarts: int = 1
    through: str | None = None
    l2: float = 0

    @property
    def name(self) -> str:
        if self.method in ("clean", "target"):
            return self.method
        parts = [self.method, f"l2-{self.l2:g}" if self.l2 else f"{self.eps255:g}"]
        parts += ["adaptive"] if self.adaptive else []
        parts += [f"eot{self.draws}"] if self.draws else []
        parts += [f"x{self.restarts}"] if self.restarts > 1 else []
        parts += [f"through-{self.through}"] if self.through else []
        return "-".join(parts)

    @property
    def norm(self) -> Norm:
        return "l2" if self.l2 else "linf"

    @property
    def eps(self) -> float:
        """In [0, 1] pixel units of its norm."""
        return self.l2 or self.eps255 / 255

    @property
    def radius(self) -> str:
        """For people."""
        return f"l2 {self.l2:g}" if self.l2 else f"{self.eps255:g}/255"

    def within(self, other: Condition) -> bool:
        """Whether its ball lies in the other's of the same norm; what is clean lies in every one."""
        return self.eps <= other.eps and (self.norm == other.norm or not self.eps)


CLEAN, TARGET = Condition(), Condition("target")
ANSWER = "answer"
"""The attack on what a subject says of what it is served: away from its answer, whatever comes of it."""
ANSWERS = (ANSWER, "answer-apgd", "answer-target", "answer-square")
"""The same; with step sizes of its own; to the answer of the target; and without gradients."""
AUTOATTACK = "autoattack"
"""AutoAttack's version for randomised defences, by its own package, on subjects that score classes."""
THREE = tuple(Condition(method, 16) for method in ("m-attack", "foa", "attackvlm"))
FOA = Condition("foa", 16)


@dataclass(frozen=True)
class Suite:
    """One table.

    Args:
        name: for ``--suite``.
        title: above the table.
        task: what is asked; None where only certificates are shown.
        defences, conditions: each defence under each condition.
        certified: whether the smoothed defences are certified as well.
        sigmas: at which noise levels; the run's own if empty.
        timed: whether seconds per picture are shown.
        masking: whether the first smoothed defence is searched for masked gradients.
        plain: whether clean pictures are shown first.
        aside: whether a part of the pictures is enough, and of those that are certified.
        compared: whether FCS stands beside the cosine of unrelated pictures, which says how little a cosine means.
        twice: whether clean pictures are served twice, with other draws, to see how steady that is.
        worst: whether the attacks of each radius come one after the other, each on the pictures that were right under
            all before it, so that what is left in the end is right under all of them (as AutoAttack does).
        answers: whether what the defences, all smoothed, make a subject answer to the task is certified.
    """

    name: str
    title: str
    task: str | None
    defences: tuple[Defence, ...]
    conditions: tuple[Condition, ...] = ()
    certified: bool = False
    sigmas: tuple[float, ...] = ()
    timed: bool = False
    masking: bool = False
    plain: bool = True
    aside: bool = False
    compared: bool = True
    twice: bool = False
    worst: bool = False
    answers: bool = False

    @property
    def asked(self) -> tuple[Condition, ...]:
        """The conditions under which the task is asked."""
        if self.task is None:
            return ()
        return (*((CLEAN,) if self.plain else ()), *self.conditions)


RADII = (4, 8, 16)
"""In 255ths: those of the attacks that count."""


def strongest(eps255: float) -> tuple[Condition, ...]:
    """The attacks through a defence that it is judged by, the cheapest first.

    On the answer: with momentum, to the target's answer, with step sizes of its own over four draws a step, and without
    gradients; on features; and one made through another PSM.
    """
    adaptive = Condition(ANSWER, eps255, adaptive=True)
    return (
        adaptive,
        replace(adaptive, method="answer-target"),
        Condition("attackvlm", eps255, adaptive=True),
        replace(adaptive, through=LIGHT),
        replace(adaptive, method="answer-apgd", draws=4),
        replace(adaptive, method="answer-square"),
    )


SUITES = {
    suite.name: suite
    for suite in (
        Suite("table1", "Captioning under three attacks (Table 1)", "captioning", DEFENCES, THREE),
        Suite(
            "table2", "Certified cosine of features (Table 2)", None, (FS, FS_PSM), certified=True, sigmas=(0.25, 0.5)
        ),
        Suite("table3", "Classification under three attacks (Table 3)", "classification", DEFENCES, THREE),
        Suite("table4", "Visual question answering under three attacks (Table 4)", "vqa", DEFENCES, THREE),
        Suite(
            "table5", "The parts of the defence (Table 5)", "classification", ABLATION, (FOA,), certified=True
        ),
        Suite("s6", "A light purifier (Table S.6)", "classification", tuple(map(_light, DEFENCES)), THREE, aside=True),
        Suite(
            "s7", "Twice the radius (Table S.7)", "classification", DEFENCES, (Condition("foa", 32),),
            plain=False, aside=True,
        ),
        Suite(
            "s8",
            "Draws per picture (Table S.8)",
            "classification",
            tuple(map(_with_n0, (1, 2, 4, 8, 16))),
            (FOA,),
            timed=True,
            plain=False,
            aside=True,
        ),
        Suite(
            "adaptive",
            "The attack on the defence itself, through noise, purifier, mapper and average",
            "classification",
            (FS_PSM,),
            tuple(replace(one, adaptive=adaptive) for one in THREE for adaptive in (False, True)),
            plain=False,
        ),
        Suite(
            "worst",
            "The worst of the attacks through the defence, picture by picture",
            "classification",
            (NONE, FS, FS_PSM, *(d for d in DEFENCES if d.tower != "none" and d.smoothing is None)),
            tuple(condition for eps255 in RADII for condition in strongest(eps255)),
            certified=True,
            worst=True,
            compared=False,
        ),
        Suite(
            "curves",
            "The attack on the answer against its radius",
            "classification",
            (NONE, FS, *(d for d in DEFENCES if d != NONE and d.name != "tecoa_fs_psm")),
            (
                *(Condition(ANSWER, eps255, adaptive=True) for eps255 in (1, 2, 4, 8, 16)),
                *(Condition(ANSWER, adaptive=True, l2=eps) for eps in (0.5, 1, 2, 4)),
            ),
            certified=True,
            worst=True,
            compared=False,
        ),
        Suite(
            "rivals",
            "What one would pick instead",
            "classification",
            (NONE, *RIVALS, FS, FS_PSM),
            (
                Condition("attackvlm", 16),
                Condition("attackvlm", 16, adaptive=True),
                *(Condition(ANSWER, eps255, adaptive=True) for eps255 in (8, 16)),
            ),
        ),
        Suite(
            "masking", "Does the defence hold, or only hide its gradients?", None, (FS_PSM,),
            (Condition("attackvlm", 16),), masking=True,
        ),
        Suite(
            AUTOATTACK, "AutoAttack through the defence", "classification", (FS_PSM,),
            (Condition(AUTOATTACK, 16, adaptive=True),), compared=False, worst=True,
        ),
        Suite(
            "answers", "Certified accuracy of answers", "classification",
            (*map(_noise_alone, (1, 2, 4)), *map(_with_n0, (1, 2, 4))), plain=False, compared=False, answers=True,
        ),
    )
}  # fmt: skip

ASKED_FOR = ("curves", AUTOATTACK, "answers")
"""Suites that ``all`` does not stand for: they take long, or need a package."""


def chosen(names: Sequence[str], eps: str | None = None, attacks: str | None = None) -> tuple[Suite, ...]:
    """Suites by name; ``all`` stands for all of them but ``ASKED_FOR``.

    Args:
        attacks: the only ones to make, by their names, with commas between them; all if None.
        eps: another radius in place of the suites' usual 16/255, as people write it; others grow and shrink with it.

    Raises:
        SettingError: there is no such suite, none of them has such an attack, or ``eps`` is no radius in [0, 1] pixels.
    """
    every = [name for name in SUITES if name not in ASKED_FOR] if "all" in names else []
    wanted = list(dict.fromkeys([*every, *(name for name in names if name != "all")]))
    for name in wanted:
        if name not in SUITES:
            raise SettingError(f"There is no suite {name!r}. The suites are: {', '.join(SUITES)}, all.")
    suites = tuple(SUITES[name] for name in wanted)
    if attacks is not None:
        suites = _with_only(suites, [name.strip() for name in attacks.split(",")])
    if eps is None:
        return suites
    scale = 255 * radius(eps) / FOA.eps255
    return tuple(replace(suite, conditions=tuple(_scaled(one, scale) for one in suite.conditions)) for suite in suites)


def as_served(suites: Sequence[Suite]) -> tuple[Suite, ...]:
    """The same suites on a model behind an endpoint, beside the open weights that the attacks are made on.

    Raises:
        SettingError: one of them is about more than answers to pictures that were attacked elsewhere.
    """
    fit = [name for name, one in SUITES.items() if one.defences == DEFENCES]
    for suite in suites:
        if suite.defences != DEFENCES:
            raise SettingError(
                f"The suite {suite.name!r} looks behind an endpoint. A served model can be asked for {', '.join(fit)}."
            )
    return tuple(replace(suite, defences=(NONE, SERVED)) for suite in suites)


def _with_only(suites: tuple[Suite, ...], attacks: Sequence[str]) -> tuple[Suite, ...]:
    known = dict.fromkeys(condition.method for suite in suites for condition in suite.conditions)
    for name in attacks:
        if name not in known:
            raise SettingError(f"None of these suites has an attack {name!r}. Theirs are: {', '.join(known)}.")
    return tuple(
        replace(suite, conditions=tuple(one for one in suite.conditions if one.method in attacks)) for suite in suites
    )


def _scaled(condition: Condition, scale: float) -> Condition:
    return replace(condition, eps255=min(255.0, round(scale * condition.eps255, 6)), l2=round(scale * condition.l2, 6))


def radius(text: str) -> float:
    """An l-inf radius in [0, 1] pixels, as people write it: ``"16/255"`` or ``"0.05"``.

    Raises:
        SettingError: it is none.
    """
    from fs_plugins.attacks.ball import radius as parsed  # not for the command's list of options

    return parsed(text)
