"""``fs-plugins certify --ask``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fs_plugins.cli.base import console, note, plain_table, promise, short

if TYPE_CHECKING:
    from torch import nn

    from fs_plugins.certificates import AnswerCertificate
    from fs_plugins.certificates.asking import AnswerPlan, Replies
    from fs_plugins.readings import Reading

ROWS = "answers.jsonl"


@dataclass(frozen=True)
class Asked:
    """What is asked, as it was typed.

    Args:
        questions: with | between them.
        choices: with commas between them.
        reading: its name.
        max_new_tokens: as for ``certify_answers``.
        processor: whose folder or hub id it is.
    """

    questions: str
    choices: str | None
    reading: str
    max_new_tokens: int
    processor: str

    def how(self) -> Reading:
        """The reading that is meant.

        Raises:
            SettingError: see ``readings.reading_named``.
        """
        from fs_plugins.evaluation.judges import SentenceSimilarity
        from fs_plugins.readings import reading_named

        choices = None if self.choices is None else [one.strip() for one in self.choices.split(",")]
        judge = SentenceSimilarity() if self.reading == "alike" else None
        return reading_named(self.reading, choices, judge)


def replies(
    asked: Asked, model: nn.Module, plan: AnswerPlan, *, psm: str, sigma: float | None, seed: int | None
) -> Replies:
    """What the answers are certified by.

    Raises:
        FSPluginsError: see ``fs_plugins.certify_answers``.
    """
    from fs_plugins.certificates.asking import Question
    from fs_plugins.hf.certified import replies_of
    from fs_plugins.hf.load import load_processor

    how = asked.how()
    return replies_of(
        model,
        load_processor(asked.processor),
        [Question(question.strip(), how) for question in asked.questions.split("|")],
        plan,
        psm=psm,
        sigma=sigma,
        seed=seed,
        max_new_tokens=asked.max_new_tokens,
    )


def show(found: Mapping[str, AnswerCertificate], out: Path) -> None:
    """Draw and print certificates, whose rows are in ``out``.

    Raises:
        SettingError: a question none of whose answers was read as a class.
    """
    from fs_plugins.certificates import plot
    from fs_plugins.hf.certified import check_heard

    check_heard(list(found.values()))
    picture = (out / ROWS).with_suffix(".png")
    plot.draw_answers(list(found.values()), picture)
    table = plain_table("image", "answer", "servings", "read so", "n0", "R", "in l-inf")
    for name, one in short(found).items():
        answer = "none: no class" if one.predicted is None else one.predicted
        table.add_row(name, answer, f"{one.n:,}", _share(one), str(one.n0), *_radii(one))
    console.print(table)
    first = next(iter(found.values()))
    note(
        f"read so: servings whose answer was read as this one ({first.reading}). R: the l2 distance in [0, 1] pixels "
        "within which the vote over servings stays with it, and the l-inf ball inside, in 255ths, wrong with "
        f"probability at most {first.alpha:g}; none: it abstains. A serving answers after n0 independent draws: serve "
        f'with enable(model, n0=..., noise="iid"). sigma {first.sigma:g}, PSM {first.psm or "none"}, '
        f"{first.generation}, {first.method}."
    )
    console.print(f"\nWritten: {out / ROWS} and {picture}", soft_wrap=True)


def _radii(one: AnswerCertificate) -> tuple[str, str]:
    return promise(one.radius), promise(one.linf_radius, 255)


def _share(one: AnswerCertificate) -> str:
    return f"{100 * one.count / one.n:.1f} %"
