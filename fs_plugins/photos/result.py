"""What was measured on photographs: for people and for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fs_plugins.certificates import Certificate
from fs_plugins.evaluation.datasets import Sample
from fs_plugins.evaluation.metrics import mean
from fs_plugins.evaluation.picture import Panel
from fs_plugins.evaluation.results import DISTANCES, Results
from fs_plugins.evaluation.rows import Row, Rows, intervals, rounded, row, values
from fs_plugins.evaluation.suites import ANSWER, CLEAN, FS, FS_PSM, NONE, Condition, Defence, Suite
from fs_plugins.evaluation.tables import Cell, Figure, Table, title_of
from fs_plugins.files import replace as write_whole
from fs_plugins.photos.cost import Cost
from fs_plugins.photos.photographs import trained_on
from fs_plugins.photos.settings import Settings
from fs_plugins.photos.suites import CLOSER, OTHER, SIGMAS, at, attacks, defences, on_the_answer

_TASK = "classification"


@dataclass(frozen=True)
class Photos:
    """One run.

    Args:
        settings: of the run.
        own: whether the encoder has a PSM of its own; otherwise the general purifier stands in.
        results: all answers and features.
        said: those of the language model, if there is one.
        pictures: the ones that are drawn, certified.
        cost: of serving.
        seconds: of all of it.
    """

    settings: Settings
    own: bool
    results: Results
    said: Results | None
    pictures: list[Panel]
    cost: Cost
    seconds: float

    @property
    def attacked(self) -> tuple[Condition, ...]:
        """The attacks on the encoder alone."""
        return attacks(self.settings.eps)

    @property
    def adaptive(self) -> Condition:
        """The attack through the defence."""
        return replace(self.attacked[0], adaptive=True)

    @property
    def defences(self) -> tuple[Defence, ...]:
        return defences(self.settings, self.own)

    def rows(self, condition: Condition) -> Rows:
        """Of every defence that was attacked so. Nothing is adaptive about attacking no defence."""
        if not condition.adaptive:
            asked = self._asked(condition)
            return {one.name: self._row(one, condition, asked) for one in self.defences}
        some = self._some("adaptive")
        plain = replace(condition, adaptive=False)
        some_of = CLOSER if condition.method == ANSWER else (NONE, *CLOSER)
        return {one.name: self._row(one, plain if one == NONE else condition, some) for one in some_of}

    def _row(self, defence: Defence, condition: Condition, samples: tuple[Sample, ...] | None = None) -> Row:
        return row(self.results, defence, condition, _TASK, samples)

    def _asked(self, condition: Condition) -> tuple[Sample, ...]:
        """What every defence is asked about, clean or attacked obliviously."""
        every = self.results.plan.dataset.samples
        return self._some(OTHER) if condition in self.attacked[1:] else every

    def _suite(self, name: str) -> Suite:
        return next(suite for suite in self.results.plan.suites if suite.name == name)

    def _some(self, name: str) -> tuple[Sample, ...]:
        return self.results.plan.pictures(self._suite(name), FS_PSM)

    def certificates(self, defence: Defence) -> list[Certificate]:
        """At the noise level of everything."""
        found = self.results.certificates(defence, self._suite("certificates"))
        return list(found.get(self.settings.sigma, {}).values())

    @property
    def ratio(self) -> float | None:
        """The average R of FS-PSM to that of plain smoothing; None where that is nothing."""
        plain, whole = (_radius(self.certificates(one)).estimate.value for one in (FS, FS_PSM))
        return whole / plain if plain else None

    def tables(self) -> list[Table]:
        """For people."""
        said = [] if self.said is None else self.said.tables()
        return [self._classes(), self._adaptive(), self._sigmas(), self._certified(), self._cost(), *said]

    def further(self) -> list[Table]:
        """Those that an evaluation's report has not."""
        return [self._cost(), *([] if self.said is None else self.said.tables())]

    def notes(self) -> list[str]:
        """What was left out, and why."""
        names = {Path(sample.image).stem for sample in self.results.plan.dataset.samples}
        learnt = len(names & trained_on()) if self.settings.photos else 0
        seen = [f"{learnt} of these photographs are among those that something which ships was trained on."]
        found = [] if self.own else [
            f"This encoder has no PSM of its own in the registry; the purifier {self.settings.general!r} stands in, "
            "and FS-PSM is with it."
        ]  # fmt: skip
        if self.said is not None:
            psm = self.said.plan.setup.psm
            if psm != self.results.plan.setup.psm:
                found.append(f"What the small language model consumes has no PSM here; it is smoothed with {psm!r}.")
            found += self.said.notes()
        return [*(seen if learnt else []), *found, *self.results.notes()]

    def _classes(self) -> Table:
        lines: list[tuple[Cell, ...]] = [
            (
                title_of(condition),
                one.title,
                len(self._asked(condition)),
                *self._row(one, condition, self._asked(condition)).values(),
            )
            for condition in (CLEAN, *self.attacked)
            for one in self.defences
        ]
        note = (
            "ACC: the photograph's class, of a thousand, is answered. ASR: that of the photograph which the attack "
            "aims at. FCS: cosine between what is served for the clean and for the attacked photograph by the same "
            "defence; for clean rows, between two servings of the clean one, with independent draws. 95 % intervals. "
            f"The attacks are made against the encoder alone, {self.settings.steps} steps, and do not know of the "
            "smoothing. Empirical robustness is not a certificate."
        )
        columns = ("pictures", "defence", "n", "ACC", "ASR", "FCS")
        return Table("classes", "What is in the photograph?", columns, tuple(lines), note)

    def _adaptive(self) -> Table:
        some, setup = self._some("adaptive"), self.results.plan.setup
        lines: list[tuple[Cell, ...]] = []
        for one in CLOSER:
            for condition in (self.attacked[0], self.adaptive, on_the_answer(self.adaptive)):
                lines.append((one.title, title_of(condition), len(some), *self._row(one, condition, some).values()))
        note = (
            f"The adaptive attack takes {setup.adaptive_steps} steps through noise, purifier, encoder, mapper and "
            f"average, with {setup.n0} fresh draws at each; the other, {setup.steps} steps against the encoder alone, "
            "stands beside it on the same photographs. The attack on the answer takes the same way and as many steps, "
            "away from the class that the encoder alone answers: it has no aim, so its ASR says little. More steps may "
            "find more."
        )
        columns = ("defence", "attack", "n", "ACC", "ASR", "FCS")
        return Table("adaptive", "Attacked through the defence", columns, tuple(lines), note)

    def sigmas(self) -> list[dict[str, object]]:
        """The table of noise levels, for machines."""
        return self._sigmas().records()

    def _sigmas(self) -> Table:
        some, few = self._some("sigmas"), self._some("sigmas-adaptive")
        lines: list[tuple[Cell, ...]] = []
        for sigma in SIGMAS:
            one = at(sigma, self.settings.sigma)
            certified = list(self.results.certificates(one, self._suite("sigmas")).get(sigma, {}).values())
            oblivious, adaptive = self._row(one, self.attacked[0], some), self._row(one, self.adaptive, few)
            lines.append(
                (
                    f"{sigma:g}",
                    self._row(one, CLEAN, some)["acc"],
                    oblivious["acc"],
                    oblivious["asr"],
                    adaptive["acc"],
                    adaptive["asr"],
                    _radius(certified),
                )
            )
        columns = ("sigma", "clean", "attacked", "ASR", "adaptive", "adaptive ASR", "R")
        note = (
            f"FS-PSM; ACC of {len(some)} photographs, clean and attacked by {title_of(self.attacked[0])}, and of "
            f"{len(few)} attacked adaptively. R: the l2 distance within which the cosine is proven to stay .5, on "
            f"average over {self.results.plan.certified_pictures(self._suite('sigmas'))}."
        )
        return Table("sigmas", "Noise levels", columns, tuple(lines), note)

    def _certified(self) -> Table:
        lines: list[tuple[Cell, ...]] = []
        for one in CLOSER:
            some = self.certificates(one)
            bounds = [Figure(mean([c.fcsb(eps) or 0.0 for c in some]), "number") for eps in DISTANCES]
            lines.append((one.title, f"{self.settings.sigma:g}", len(some), *bounds, _radius(some)))
        first = self.certificates(FS_PSM)[0]
        told = "" if self.ratio is None else f" R of FS-PSM is {self.ratio:.2f} times that of plain smoothing."
        note = (
            "The cosine certified within an l2 distance eps in [0, 1] pixels, on average, and the distance R within "
            f"which it stays .5; each wrong with probability at most {first.alpha:g}, from {first.n:,} draws; where "
            f"nothing is promised, 0 counts.{told}"
        )
        columns = ("defence", "sigma", "n", *(f"eps {eps:g}" for eps in DISTANCES), "R")
        return Table("certificates", "What is proven", columns, tuple(lines), note)

    def _cost(self) -> Table:
        cost = self.cost
        counted = (
            ("one forward of the encoder", cost.encoder, cost.encoder),
            ("one draw: purifier, encoder, mapper", cost.draw, cost.encoder),
            (f"FS-PSM, {cost.n0} draws", cost.smoothed, cost.encoder),
            ("one forward of a CLIP-L/14-336", cost.clip, cost.clip),
            ("one draw around it, with the same purifier", cost.clip_draw, cost.clip),
        )
        lines = tuple((what, f"{count / 1e9:.2f}", f"{count / one:.2f}") for what, count, one in counted)
        note = (
            "Counted by torch, two operations for a multiplication and its addition. Measured side by side, one "
            f"forward of this encoder takes {1000 * cost.forward_seconds:.0f} ms and FS-PSM "
            f"{1000 * cost.smoothed_seconds:.0f} ms: {cost.times:.1f} times. Around a CLIP-L/14-336 it costs "
            f"{cost.clip_times:.2f} times its {cost.n0} forwards, by operations."
        )
        return Table("cost", "What it costs", ("work for one picture", "GFLOP", "forwards of its encoder"), lines, note)

    def summary(self) -> dict[str, object]:
        """What ``summary.json`` holds: values, and in ``intervals`` the 95 % interval of each."""
        names = ("attacked", "attacked_m_attack")
        kinds = {
            "clean": CLEAN,
            **dict(zip(names, self.attacked, strict=True)),
            "adaptive": self.adaptive,
            "adaptive_answer": on_the_answer(self.adaptive),
        }
        rows = {which: self.rows(condition) for which, condition in kinds.items()}
        times = {name: rounded(getattr(self.cost, name)) for name in ("times", "clip_times")}
        setup = self.results.plan.setup
        told: dict[str, object] = {
            **{which: values(some) for which, some in rows.items()},
            "intervals": {which: intervals(some) for which, some in rows.items()},
            "sigmas": self.sigmas(),
            "certificates": {
                **{one.name: self._proven(one) for one in CLOSER},
                "ratio": None if self.ratio is None else rounded(self.ratio),
            },
            "cost": {**asdict(self.cost), **times},
            "own_psm": self.own,
            "notes": self.notes(),
            "images": self.settings.count,
            "adaptive_images": len(self._some("adaptive")),
            "seconds": round(self.seconds, 1),
            "seed": self.settings.seed,
            "settings": {
                **{name: value for name, value in asdict(setup).items() if value is not None},
                "eps": self.attacked[0].eps,
                "norm": "linf",
            },
        }
        if self.said is not None:
            told["spoken"] = {table.name: table.records() for table in self.said.tables()}
        return told

    def _proven(self, defence: Defence) -> dict[str, object]:
        some = self.certificates(defence)
        return {
            "n": len(some),
            "radius": rounded(_radius(some).estimate.value),
            "fcsb": {f"{eps:g}": rounded(mean([c.fcsb(eps) or 0.0 for c in some]).value) for eps in DISTANCES},
        }

    def write(self, folder: Path) -> Path:
        """Write summary.json."""
        write_whole(folder / "summary.json", json.dumps(self.summary(), indent=2) + "\n")
        return folder / "summary.json"


def _radius(certificates: list[Certificate]) -> Figure:
    return Figure(mean([one.radius(0.5) or 0.0 for one in certificates]), "number")
