"""Certificates of what an image-text-to-text model of transformers answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from fs_plugins.certificates.answer import AnswerCertificate
from fs_plugins.certificates.asking import PAIRED, AnswerPlan, Question, Replies
from fs_plugins.certificates.run import certify_named
from fs_plugins.choice import Draws, PSMChoice, choose
from fs_plugins.errors import SettingError
from fs_plugins.files import locked_file
from fs_plugins.hf.dialogue import pixels_of
from fs_plugins.hf.replies import Replier
from fs_plugins.noise import Noise
from fs_plugins.pictures import Picture, named
from fs_plugins.readings import Reading, Words
from fs_plugins.smoothing import DEFAULT_CHUNK_SIZE


def certify_answers(
    model: nn.Module,
    processor: Any,
    images: Picture | Iterable[Picture] | Mapping[str, Picture],
    questions: str | Question | Sequence[str | Question],
    *,
    classes: Iterable[str] | None = None,
    reading: Reading | None = None,
    n: int = 1000,
    alpha: float = 1e-3,
    n0: int | None = None,
    target: float | None = None,
    pilot: int = 32,
    psm: PSMChoice = "auto",
    sigma: float | None = None,
    noise: Noise = "iid",
    seed: int | None = None,
    max_new_tokens: int = 16,
    generation: Mapping[str, Any] | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    out: str | os.PathLike[str] | None = None,
    adapter: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[AnswerCertificate]:
    """Prove how far each image can move in l2 before the model's answer may change.

    Certifies servings as ``enable(model, n0=..., noise="iid")`` makes them: n0 independent noisy copies, purified,
    encoded, mapped and averaged, then the model's answer, read as one of some classes (see ``AnswerCertificate``).
    Whether smoothing is enabled on the model plays no part.

    Args:
        model, processor: of transformers, an image-text-to-text model whose encoder takes pictures of one size, in
            eval mode.
        images: as for ``certify``, at the resolution the encoder sees; no processor comes between.
        questions: what is asked about every image; several share its draws. A ``Question`` has a reading of its own.
        classes: that answers are read as, by their words alone (``readings.Words``).
        reading: another reading of the answers.
        n: servings per image, at most.
        alpha: each certificate may be wrong with this probability over its servings.
        n0: draws per serving; left out, a pilot chooses 1, 2 or 4. More draws make an answer surer, and divide the
            radius by sqrt(n0).
        target: an l2 radius at which servings stop early, or as soon as it is out of reach.
        pilot: servings at each n0 that choose it and the class, and certify nothing.
        psm, sigma, adapter: as for ``enable``.
        noise: ``"iid"``; of antithetic pairs no answer can be certified.
        seed: reproducible draws; without it the entropy is the operating system's.
        max_new_tokens, generation: settings of the model's ``generate``: greedy unless these say something else.
        chunk_size: draws per forward of the encoder, and answers per forward of the language model.
        out: as for ``certify``.
        advance: called with the number of draws as they are made.

    Returns:
        image by image, a certificate for each question; its ``radius`` is None where it abstains.

    Raises:
        SettingError: a value out of range, pairs, no reading or several, classes that read alike, sampled words
            without a seed, no chat template, servings too few to certify anything, images of another size or range, a
            file of another run, or a question none of whose answers was read as a class.
        ModelError: no adapter claims the model, it generates no text, or it is in training mode.
        PSMError, RegistryError, PluginError: see their docstrings.
    """
    if noise != "iid":
        raise SettingError(PAIRED)
    replies = replies_of(
        model,
        processor,
        _questions(questions, _reading(classes, reading)),
        AnswerPlan(n=n, alpha=alpha, n0=n0, target=target, pilot=pilot),
        psm=psm,
        sigma=sigma,
        seed=seed,
        max_new_tokens=max_new_tokens,
        generation=generation,
        adapter=adapter,
    )
    with nullcontext() if out is None else locked_file(Path(out), "these certificates"):
        found = certify_named(replies, named(images), seed=seed, rows=chunk_size, out=out, advance=advance)
    check_heard(found)
    return found


def replies_of(
    model: nn.Module,
    processor: Any,
    questions: Sequence[Question],
    plan: AnswerPlan,
    *,
    psm: PSMChoice = "auto",
    sigma: float | None = None,
    seed: int | None = None,
    max_new_tokens: int = 16,
    generation: Mapping[str, Any] | None = None,
    adapter: str | None = None,
) -> Replies:
    """What ``certify_answers`` certifies by, for a ``FolderRun``; everything is checked, nothing drawn.

    Raises:
        FSPluginsError: see there.
    """
    smoother = choose(
        model,
        psm=psm,
        sigma=sigma,
        draws=Draws(max(plan.choices), "iid", "call", seed),
        processor=pixels_of(processor),
        adapter=adapter,
        encoder=0,
        certain=True,
    )[1][0]
    asker = Replier(
        model, processor, max_new_tokens=max_new_tokens, generation=generation, seed=seed, call=smoother.call
    )
    return Replies(smoother, plan, asker, questions)


def check_heard(certificates: Sequence[AnswerCertificate]) -> None:
    """Refuse a question that no image's pilot got a class for: then it is the reading that is wrong, not the images.

    Raises:
        SettingError: there is such a question.
    """
    for question in dict.fromkeys(one.question for one in certificates):
        own = [one for one in certificates if one.question == question]
        if all(one.predicted is None for one in own):
            heard = ", ".join(repr(text) for text, _ in own[0].said) or "nothing"
            raise SettingError(
                f"No answer to {question!r} was read as {own[0].reading}; the model said {heard}. Ask for the class "
                "alone, as the model was trained to, or take another reading (fs_plugins.readings)."
            )


def _reading(classes: Iterable[str] | None, reading: Reading | None) -> Reading | None:
    if classes is not None and reading is not None:
        raise SettingError("Give classes, or a reading that knows its own, not both.")
    return reading if classes is None else Words(classes)


def _questions(given: str | Question | Sequence[str | Question], reading: Reading | None) -> list[Question]:
    found = []
    for one in [given] if isinstance(given, str | Question) else given:
        if isinstance(one, Question):
            found.append(one)
        elif reading is None:
            raise SettingError(
                f"How are answers to {one!r} to be read? Give classes=['cat', 'dog'], or a reading of "
                "fs_plugins.readings."
            )
        else:
            found.append(Question(one, reading))
    return found
