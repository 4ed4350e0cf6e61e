"""Does a defence hold, or does it only hide its gradients? The tests of Athalye et al. (ICML 2018, arXiv 1802.00420)
and Carlini et al. (2019, arXiv 1902.06705), on the features that a smoothed encoder serves, and on what a model says of
them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fs_plugins import checks
from fs_plugins.answers import Answers
from fs_plugins.attacks.answer import Answer
from fs_plugins.attacks.ball import Ball
from fs_plugins.attacks.methods import attack_of
from fs_plugins.attacks.protocols import Attack, Objective
from fs_plugins.attacks.run import aims_of, attack, keys_of
from fs_plugins.attacks.squares import Squares
from fs_plugins.attacks.strengths import LOST, Judge, Strength, weaker
from fs_plugins.attacks.victim import Attackable, Stream, Victim, victims
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.pictures import Picture
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import VisionCall

FAR = 0.25
"""So much larger a share of images is far more of them."""


@dataclass(frozen=True)
class MaskingReport:
    """What ``check_gradients`` found; ``str()`` of it is for people.

    Args:
        eps: l-inf, in [0, 1] pixel units.
        attacks: none, oblivious, gradient-free, and adaptive with a quarter of the steps and with all, on features.
        unbounded: share of images that the adaptive attack makes unlike themselves when eps is 1.
        problems: what speaks for masked gradients, or against judging the defence by its features; empty if nothing
            does.
        answers: the same attacks on answers, and what the adaptive one on features makes of them; empty where nobody
            said how to ask the model.
    """

    eps: float
    attacks: tuple[Strength, ...]
    unbounded: float
    problems: tuple[str, ...]
    answers: tuple[Strength, ...] = ()

    def __str__(self) -> str:
        lines = [f"{one.name:28} success {one.success:6.1%}   margin {one.mean:+.3f}" for one in self.attacks]
        lines.append(f"{'adaptive, eps 1, untargeted':28} success {self.unbounded:6.1%}")
        lines += [
            f"{on_the_answer(one):28} success {one.success:6.1%}   margin {one.mean:+.3f}" for one in self.answers
        ]
        verdict = self.problems or ("Nothing speaks for masked gradients.",)
        return "\n".join([f"l-inf eps {255 * self.eps:g}/255, {len(self.attacks[0].margins)} images", *lines, *verdict])


def on_the_answer(strength: Strength) -> str:
    """What a strength on answers is called beside those on features."""
    return f"answer: {strength.name}"


def check_gradients(
    model: Attackable | Sequence[Attackable],
    images: Picture | Iterable[Picture],
    targets: Picture | Iterable[Picture],
    *,
    answers: Answers | None = None,
    eps: float = 16 / 255,
    steps: int = 100,
    draws: int = 2,
    queries: int = 500,
    method: str | Attack = "attackvlm",
    seed: int = 0,
    names: Sequence[object] | None = None,
    batch_size: int = 32,
    confidence: float = 0.99,
    advance: Callable[[int], object] | None = None,
) -> MaskingReport:
    """Compare attacks that must be ordered if the gradients are honest.

    The adaptive attack must be no weaker than the oblivious one, than itself with a quarter of the steps, and than a
    gradient-free search; and without a bound on eps it must make every image unlike itself. "Weaker" is a paired
    one-sided t-test of the margins at this confidence.

    Where the model can be asked, the same holds for ``Answer``, the attack on what it says, away from its answer to
    each image. And that attack must not break far more images than the one on features does, by the same test and by a
    quarter of all: features that hardly move may still be those of another answer, and then a defence is to be judged
    by its answers. The attack on features breaks an image that it makes like its target, or whose answer it turns.

    Args:
        model: the defence: one of ``fs_plugins.smoothers(model)``, or a model on which smoothing is enabled.
        images, targets: (B, C, H, W) in [0, 1], B >= 2, or a list of pictures, see ``attack``.
        answers: how to ask the model: ``Speech`` of a language model, ``Classes`` of a head; None compares attacks on
            features alone.
        eps: l-inf, in [0, 1] pixel units.
        steps, draws, method, seed, names, batch_size: of the attacks, see ``attack``; the method follows gradients.
        queries: of the gradient-free searches, which climb the objectives of the others.
        advance: called with numbers of forward-backward passes of images, which are ``effort`` in all.

    Raises:
        SettingError: fewer than two images, a method that follows no gradients, or see ``attack``.
        ModelError: nothing is smoothed, or see ``answers``.
    """
    smoother, chosen = _defence(model), attack_of(method)
    eps, steps = Ball("linf", eps).eps, checks.whole("steps", steps)
    draws, queries = checks.whole("draws", draws), checks.whole("queries", queries)
    seed, batch_size = checks.seed(seed), checks.whole("batch_size", batch_size)
    level = "confidence is that of a test and must be in (0, 1)"
    confidence = checks.number(level, confidence, lambda found: 0 < found < 1)
    shown = smoother.call.batch("images", images)
    aims = aims_of(smoother.call, targets, shown)
    if len(shown) < 2:
        raise SettingError(f"Attacks are compared over at least two images, got {len(shown)}.")
    if isinstance(chosen.optimiser, Squares):
        raise SettingError(f"{chosen.name} follows no gradients, so it cannot test any; take another method.")
    keys = keys_of(names, len(shown))
    options = {"eps": eps, "seed": seed, "names": keys, "batch_size": batch_size, "report": advance}
    compared = _Compared(smoother, shown, steps, draws, queries, options)
    judge = Judge(smoother, keys, seed, batch_size)
    on_answers = None if answers is None else judge.on_answers(shown, answers)

    found, error = compared.attacked(chosen, aims)
    on_features = judge.on_features(shown, aims)
    strengths = {name: on_features(name, images) for name, images in found.items()}
    unbounded, problems = 0.0, [error] if error else []
    if not error:
        free = compared.adaptive(chosen, None, steps, eps=1.0)
        unbounded = _estranged(smoother.call, shown, judge.embedded(free))
        problems += _disordered("The adaptive attack", strengths, confidence)
        if unbounded < 1:
            problems.append(
                f"With eps 1, where any picture is allowed, {1 - unbounded:.0%} of the images still resist."
            )
    turned: dict[str, Strength] = {}
    if answers is not None and on_answers is not None:
        said, error = compared.attacked(Answer(answers), None)
        if "adaptive" in found:
            said["attack on features"] = found["adaptive"]
        turned = {name: on_answers(name, images) for name, images in said.items()}
        if error and error not in problems:
            problems.append(error)
        if not error:
            problems += _disordered("The adaptive attack on the answer", turned, confidence)
        if "adaptive" in strengths and "adaptive" in turned:
            problems += _misjudged(strengths["adaptive"], turned, confidence)
    return MaskingReport(eps, tuple(strengths.values()), unbounded, tuple(problems), tuple(turned.values()))


def _defence(model: Attackable | Sequence[Attackable]) -> FeatureSmoother:
    """The one pipeline that is to be tested."""
    several = victims(model)
    if len(several) > 1 or several[0].smoother is None:
        raise ModelError(
            "check_gradients tests one defence: one of fs_plugins.smoothers(model), or a model on which smoothing is "
            "enabled. Without smoothing there is nothing to test."
        )
    return several[0].smoother


@dataclass(frozen=True)
class _Compared:
    """The attacks that are compared, on one objective."""

    smoother: FeatureSmoother
    images: Tensor
    steps: int
    draws: int
    queries: int
    options: dict[str, Any]

    def attacked(self, method: Attack, aims: Tensor | None) -> tuple[dict[str, Tensor], str | None]:
        """By name what each made of the images (B, C, H, W), and why there is no adaptive one, if there is none."""
        searched, call = _Searched(method), self.smoother.call
        found = {
            "no attack": self.images,
            "oblivious": attack(call, self.images, aims, method=method, steps=self.steps, **self.options),
            "gradient-free": attack(
                self.smoother, self.images, aims, method=searched, steps=self.queries, **self.options
            ),
        }
        try:
            found["adaptive, a quarter"] = self.adaptive(method, aims, max(1, self.steps // 4))
            found["adaptive"] = self.adaptive(method, aims, self.steps)
        except ModelError as error:
            return found, str(error)
        return found, None

    def adaptive(self, method: Attack, aims: Tensor | None, steps: int, **changes: Any) -> Tensor:
        options = {**self.options, **changes}
        return attack(self.smoother, self.images, aims, method=method, steps=steps, draws=self.draws, **options)


@dataclass(frozen=True)
class _Searched:
    """An attack's objective, climbed without gradients."""

    follows: Attack
    optimiser: Squares = field(default_factory=Squares)

    @property
    def name(self) -> str:
        return f"{self.follows.name}, gradient-free"

    def objective(self, victims: Sequence[Victim], aims: Tensor, stream: Stream, sign: int) -> Objective:
        return self.follows.objective(victims, aims, stream, sign)


def _disordered(ours: str, strengths: dict[str, Strength], confidence: float) -> list[str]:
    """What is not as it must be if the gradients are honest."""
    rivals = {
        "the oblivious one": "oblivious",
        "a gradient-free search": "gradient-free",
        "itself with a quarter of the steps": "adaptive, a quarter",
    }
    return [
        f"{ours} is weaker than {what}."
        for what, name in rivals.items()
        if weaker(_compared(strengths["adaptive"]), _compared(strengths[name]), confidence)
    ]


def _compared(strength: Strength) -> list[float]:
    return [min(margin, LOST) for margin in strength.margins]


def _misjudged(on_features: Strength, on_answers: dict[str, Strength], confidence: float) -> list[str]:
    """Whether answers fall where features hold."""
    turned, beside = on_answers["adaptive"].succeeded, on_answers["attack on features"].succeeded
    broken = [any(pair) for pair in zip(on_features.succeeded, beside, strict=True)]
    by_answers, by_features = (sum(some) / len(some) for some in (turned, broken))
    if by_answers - by_features < FAR or not weaker(broken, turned, confidence):
        return []
    return [
        f"Features hold, answers do not: the attack on the answer breaks {by_answers:.0%} of the images, the one on "
        f"features {by_features:.0%}. Judge this defence by its answers."
    ]


def effort(images: int, *, steps: int = 100, queries: int = 500, answers: bool = False) -> int:
    """How much ``check_gradients`` will tell ``advance`` in all.

    Args:
        answers: whether answers are attacked too.
    """
    each = steps + queries + max(1, steps // 4) + steps
    return images * (each * (1 + answers) + steps)


@torch.no_grad()
def _estranged(call: VisionCall, images: Tensor, served: Tensor) -> float:
    """Share of images whose served feature is nearer to another image's plain feature than to its own."""
    plain = torch.nn.functional.normalize(Victim(call).see_plain(images).embedding, dim=-1)
    near = torch.nn.functional.normalize(served.mean(0), dim=-1) @ plain.T
    return (near.argmax(1) != torch.arange(len(images), device=near.device)).float().mean().item()
