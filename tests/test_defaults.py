"""torch's default type and default device are the user's: no number of ours may follow from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from support import DEFAULTS, TinyEncoder, default, make_psm, tiny_call
from torch import Tensor

import fs_plugins
from fs_plugins import PSM, FeatureSmoother
from fs_plugins.attacks import METHODS, attack
from fs_plugins.attacks.masking import check_gradients
from fs_plugins.identity import fingerprint
from fs_plugins.noise import NoiseSource, draws
from fs_plugins.psm import Part, PSMConfig
from fs_plugins.training import robustness_score

pytestmark = pytest.mark.usefixtures("one_road_through_attention")
IMAGES, TARGETS = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def road() -> FeatureSmoother:
    torch.manual_seed(0)  # the purifier's own initialisation
    call = tiny_call(TinyEncoder())
    return FeatureSmoother(call, psm=make_psm(call), sigma=0.25, n0=3, seed=0)


def noise(smoother: FeatureSmoother) -> Tensor:
    generators = NoiseSource(seed=1).generators(IMAGES)
    return torch.stack([torch.stack(list(draws(one, (3, 8, 8), "iid", 4))) for one in generators])


def served(smoother: FeatureSmoother) -> Any:
    return smoother.smooth(IMAGES)["tokens"]


def served_without_some_draws(smoother: FeatureSmoother) -> Any:
    seen = []

    def overflow(module: Any, args: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(output)
        tokens, rows = output["tokens"], output["tokens"].new_zeros(len(output["tokens"]))
        rows[0] = float("inf")
        return {**output, "tokens": tokens + rows.view(-1, 1, 1)}

    handle = smoother.call.module.register_forward_hook(overflow)
    output = smoother.look(IMAGES)
    handle.remove()
    assert seen
    return torch.cat([value.flatten() for value in output.values()])


def certificates(smoother: FeatureSmoother) -> Any:
    return fs_plugins.certify(smoother, IMAGES, n=60, seed=1)


def predictions(smoother: FeatureSmoother) -> Any:
    width = 24
    rows = [[((3 * i + 5 * k) % 7) / 7 + 1e-3 for i in range(width)] for k in range(3)]
    return fs_plugins.certify_predictions(smoother, IMAGES, rows, n=60, seed=1)


def gradients(smoother: FeatureSmoother) -> Any:
    return check_gradients(smoother, IMAGES, TARGETS, steps=4, queries=5)


def fingerprints(smoother: FeatureSmoother) -> Any:
    return fingerprint(smoother.call.module)


def score(smoother: FeatureSmoother) -> Any:
    return robustness_score(smoother.call, smoother.psm, IMAGES, 0.25)


def attacked(method: str, norm: str, targeted: bool) -> Callable[[FeatureSmoother], Any]:
    def found(smoother: FeatureSmoother) -> Any:
        aims = TARGETS if targeted else None
        return attack(smoother, IMAGES, aims, method=method, norm=norm, eps=0.1 if norm == "linf" else 1.0, steps=4)

    found.__name__ = f"{method}-{norm}-{'targeted' if targeted else 'untargeted'}"
    return found


ATTACKS = [
    attacked(method, norm, targeted)
    for method in METHODS
    for norm in ("linf", "l2")
    for targeted in (True, False)
    if (method, norm) != ("square", "l2")
]
WORK = [
    noise, served, served_without_some_draws, certificates, predictions, gradients, fingerprints, score, *ATTACKS,
]  # fmt: skip


@cache
def usual(work: Callable[[FeatureSmoother], Any]) -> Any:
    """What it gives under torch's own defaults."""
    return work(road())


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_whatever_is_drawn_or_computed_follows_from_no_default(work, what):
    wanted, smoother = usual(work), road()
    with default(what):
        found = work(smoother)
    assert torch.equal(found, wanted) if isinstance(found, Tensor) else found == wanted


class Warm(torch.nn.Module):
    """A plugin's purifier, with a number that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("level", torch.linspace(0, 1, 7), persistent=False)

    def forward(self, images: Tensor, sigma: float) -> Tensor:
        return images + self.share * self.level[3]


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
@pytest.mark.parametrize("plugins", [False, True])
def test_a_psm_is_loaded_in_single_precision_under_every_default(what, plugins, tmp_path):
    psm = make_psm(tiny_call(TinyEncoder()))
    psm.save_pretrained(tmp_path)
    with default(what):
        found = PSM.from_pretrained(tmp_path, purifiers={"warm": Warm} if plugins else None)
        assert isinstance(what, str) or torch.get_default_dtype() == what, "what was set is put back"
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in found.state_dict().values())
    assert all(torch.equal(value, psm.state_dict()[name]) for name, value in found.state_dict().items())


def test_what_a_plugins_part_computes_for_itself_is_in_single_precision_too(tmp_path):
    facts = PSMConfig(
        name="warm", sigma=0.25, sigma_range=(0.25, 0.25), image_size=None, purifier=Part(kind="warm"), encoder="any",
        fingerprint=(),
    )  # fmt: skip
    PSM(facts, purifiers={"warm": Warm}).save_pretrained(tmp_path)
    for what in DEFAULTS:
        with default(what):
            level = PSM.from_pretrained(tmp_path, purifiers={"warm": Warm}).purifier.level
        assert torch.equal(level, Warm().level)


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
def test_a_model_answers_the_same_under_every_default(what, llava, images):
    twin = copy.deepcopy(llava)
    answers = []
    for model, given in ((llava, None), (twin, what)):
        with fs_plugins.enable(model, psm="photo", n0=2, seed=3):
            tower = fs_plugins.vision_call(model).module
            pixels = fs_plugins.vision_call(model).pixels.from_unit(images, torch.float32)
            if given is None:
                answers.append(tower(pixels, output_hidden_states=True).hidden_states[-2])
            else:
                with default(given):
                    answers.append(tower(pixels, output_hidden_states=True).hidden_states[-2])
    assert torch.equal(*answers)
