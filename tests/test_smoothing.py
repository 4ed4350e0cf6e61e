from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MEAN, STD, TinyEncoder, make_psm, tiny_call

from fs_plugins import FeatureSmoother, PSMError, Readout, SettingError
from fs_plugins.errors import ModelError
from fs_plugins.layouts import Group
from fs_plugins.noise import draws
from fs_plugins.smoothing import Tally
from fs_plugins.vision import Field


def batch(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def whole(smoother: FeatureSmoother, images: torch.Tensor) -> Group:
    return Group(tuple(range(len(images))), smoother.call.pixels.from_unit(images, torch.float32), {})


def by_hand(smoother: FeatureSmoother, images: torch.Tensor) -> torch.Tensor:
    """The served feature, written out with plain loops: mean of unit embeddings at the draws' mean length."""
    call, psm, sigma = smoother.call, smoother.psm, smoother.sigma
    served = []
    for image, generator in zip(images, copy.deepcopy(smoother.source).generators(images), strict=True):
        features, lengths = [], []
        for noise in draws(generator, tuple(image.shape), smoother.noise, smoother.n0):
            shown = (image + sigma * noise)[None]
            if psm is not None:
                shown = psm.purify(shown, sigma)
            mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
            z = call.module((shown - mean) / std)["tokens"]
            z = z if psm is None else psm.map("tokens", z, sigma)
            features.append(z[0])
            lengths.append(z.norm())
        units = sum(z / length for z, length in zip(features, lengths, strict=True)) / len(features)
        served.append(units / units.norm() * sum(lengths) / len(lengths))
    return torch.stack(served)


@pytest.mark.parametrize("noise", ["iid", "antithetic"])
@pytest.mark.parametrize("n0", [1, 2, 3, 4])
@pytest.mark.parametrize("with_psm", [False, True])
def test_served_feature_is_the_mean_of_unit_embeddings_at_the_mean_length(call, noise, n0, with_psm):
    psm = make_psm(call) if with_psm else None
    smoother = FeatureSmoother(call, psm=psm, sigma=0.25, n0=n0, noise=noise, seed=2)
    wanted = by_hand(smoother, batch())
    with torch.no_grad():
        assert torch.allclose(smoother.smooth(batch())["tokens"], wanted, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 5))
def test_chunks_never_change_a_result(chunk_size, n0, count):
    call = tiny_call(TinyEncoder())
    psm = make_psm(call)
    whole = FeatureSmoother(call, psm=psm, sigma=0.25, n0=n0, seed=1, chunk_size=1000)
    pieces = FeatureSmoother(call, psm=psm, sigma=0.25, n0=n0, seed=1, chunk_size=chunk_size)
    with torch.no_grad():
        assert torch.allclose(whole.smooth(batch(count))["tokens"], pieces.smooth(batch(count))["tokens"], atol=1e-5)
    assert max(len(seen) for seen in call.module.seen[1:]) <= chunk_size or chunk_size >= n0 * count


def test_the_batch_never_changes_an_image_of_a_fixed_scope(call):
    smoother = FeatureSmoother(call, psm=None, sigma=0.25, noise_scope="image", seed=1)
    together = smoother.smooth(batch())["tokens"]
    alone = torch.cat([smoother.smooth(image[None])["tokens"] for image in batch()])
    assert torch.allclose(together, alone, atol=1e-6)


def test_noise_has_standard_deviation_sigma_in_unit_pixels_at_the_encoder(call):
    images = batch(1)
    smoother = FeatureSmoother(call, psm=None, sigma=0.25, n0=400, noise="iid", seed=0)
    smoother.smooth(images)
    seen = torch.cat(call.module.seen)
    unit = seen * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    noise = unit - images
    for channel in range(3):
        assert abs(noise[:, channel].std() - 0.25) < 0.01
        assert abs(noise[:, channel].mean()) < 0.01
    assert unit.min() < -0.5, "noise must not be clamped before the encoder"
    assert unit.max() > 1.5


def test_forced_path_at_sigma_zero_agrees_to_rounding(call):
    images = batch()
    plain = call.encode(images)["tokens"]
    for n0 in (1, 3, 4):
        served = FeatureSmoother(call, psm=None, sigma=0, n0=n0).smooth(images)["tokens"]
        assert (served - plain).abs().max() < 1e-6


def test_every_other_field_is_the_mean_over_draws_so_nothing_escapes(call):
    images = batch()
    smoother = FeatureSmoother(call, psm=None, sigma=0.25, n0=4, noise="iid", seed=3, chunk_size=3)
    steps = smoother.passes([whole(smoother, images)], torch.float32, Tally())
    shown, step = [], next(steps)
    while True:
        shown.append(step.pixels)
        try:
            step = steps.send(call.forward(step.pixels))
        except StopIteration as stop:
            (output,) = stop.value
            break
    extra = call.module.extra(torch.stack(shown).flatten(2)).mean(0)
    assert torch.allclose(output["extra"], extra, atol=1e-6)


def test_several_readouts_share_one_weight_per_draw():
    encoder = TinyEncoder()
    readouts = (
        Readout("tokens", (Field("tokens", 0),), width=6, tokens=4),
        Readout("extra", (Field("extra", 1),), width=2),
    )
    call = tiny_call(encoder, readouts=readouts)
    images = batch(1)
    smoother = FeatureSmoother(call, psm=None, sigma=0.25, n0=3, noise="iid", seed=1)
    served = smoother.smooth(images)
    outputs = [encoder(pixels[None]) for pixels in torch.cat(encoder.seen[:1])]
    joint = torch.stack([torch.cat([o["tokens"].flatten(1), o["extra"]], 1)[0] for o in outputs])
    lengths = joint.norm(dim=1)
    direction = (joint / lengths[:, None]).mean(0)
    wanted = direction / direction.norm() * lengths.mean()
    got = torch.cat([served["tokens"].flatten(), served["extra"].flatten()])
    assert torch.allclose(got, wanted, atol=1e-5)


class Switch(torch.nn.Module):
    """Features by a rule on each row, to place zeros and NaNs."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, pixel_values):
        return {"tokens": torch.stack([self.rule(i, row) for i, row in enumerate(pixel_values)])}


def switched(rule) -> FeatureSmoother:
    return FeatureSmoother(tiny_call(Switch(rule)), psm=None, sigma=0.25, n0=4, noise="iid", seed=0, chunk_size=4)


def test_a_zero_feature_is_defined_and_served_as_zero():
    served = switched(lambda i, row: torch.zeros(4, 6)).smooth(batch(1))["tokens"]
    assert torch.equal(served, torch.zeros(1, 4, 6))


def test_opposite_draws_cancel_without_a_nan():
    served = switched(lambda i, row: torch.ones(4, 6) * (-1) ** i).smooth(batch(1))["tokens"]
    assert torch.equal(served, torch.zeros(1, 4, 6))


def test_non_finite_draws_are_left_out_and_counted():
    smoother = switched(lambda i, row: torch.full((4, 6), float("nan") if i == 1 else 2.0))
    tally = Tally()
    steps = smoother.passes([whole(smoother, batch(1))], torch.float32, tally)
    step = next(steps)
    with pytest.raises(StopIteration) as stop:
        steps.send(smoother.call.forward(step.pixels))
    assert torch.allclose(stop.value.value[0]["tokens"], torch.full((1, 4, 6), 2.0))
    assert (tally.images, tally.draws, tally.non_finite) == (1, 4, 1)


def test_draws_that_are_left_out_count_in_no_average():
    class Fragile(TinyEncoder):
        def forward(self, pixel_values):
            output = super().forward(pixel_values)
            tokens = output["tokens"].clone()
            tokens[1] = float("nan")
            return {"tokens": tokens, "extra": torch.ones(len(pixel_values), 2)}

    smoother = FeatureSmoother(tiny_call(Fragile()), psm=None, sigma=0.25, n0=4, noise="iid", chunk_size=8)
    steps = smoother.passes([whole(smoother, batch(2))], torch.float32, Tally())
    step = next(steps)
    with pytest.raises(StopIteration) as stop:
        steps.send(smoother.call.forward(step.pixels))
    assert torch.allclose(stop.value.value[0]["extra"], torch.ones(2, 2))


def test_an_image_without_one_finite_draw_is_an_error_not_a_zero():
    with pytest.raises(ModelError, match="bfloat16"):
        switched(lambda i, row: torch.full((4, 6), float("inf"))).smooth(batch(1))


class Spoiling(torch.nn.Module):
    """An output of every structure, one of whose fields is spoilt in some rows of the first call."""

    FIELDS = ("tokens", "pooled", "hidden.0", "hidden.1", "deep.scores")

    def __init__(self, field: str | None, rows: tuple[int, ...], value: float) -> None:
        super().__init__()
        self.field, self.rows, self.value = field, rows, value
        self.seen = 0

    def forward(self, pixel_values):
        rows = [row - self.seen for row in self.rows if 0 <= row - self.seen < len(pixel_values)]
        self.seen += len(pixel_values)
        x = pixel_values.flatten(1)

        def made(name, value):
            if name == self.field:
                value = value.clone()
                value.view(len(value), -1)[rows, -1] = self.value
            return value

        return {
            "tokens": made("tokens", torch.tanh(x.view(len(x), 4, 48)[..., :6])),
            "pooled": made("pooled", x[:, :5]),
            "hidden": (made("hidden.0", x.view(len(x), 4, 48)[..., :2]), made("hidden.1", x[:, 0])[:]),
            "deep": {
                "scores": made("deep.scores", x.view(len(x), 3, 8, 8).to(torch.float16)),
                "ids": torch.arange(len(x)),
            },
            "table": torch.full((7,), float("inf")),
        }


def leaves(output) -> dict[str, torch.Tensor]:
    hidden, deep = output["hidden"], output["deep"]
    fields = (output["tokens"], output["pooled"], *hidden, deep["scores"])
    return dict(zip(Spoiling.FIELDS, fields, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("chunk_size", [2, 3, 32])
@pytest.mark.parametrize("field", Spoiling.FIELDS)
def test_whatever_field_is_not_finite_in_a_draw_is_left_out_there_and_counted(field, chunk_size, value):
    """Two images in four draws; rows are draw by draw. Image 0 loses its draws 1 and 3, image 1 its draw 2."""
    images = batch(2)

    def served(field, rows):
        smoother = FeatureSmoother(
            tiny_call(Spoiling(field, rows, value)),
            psm=None,
            sigma=0.25,
            n0=4,
            noise="iid",
            seed=0,
            chunk_size=chunk_size,
        )
        tally = Tally()
        steps = smoother.passes([whole(smoother, images)], torch.float32, tally)
        step, outputs = next(steps), []
        while True:
            outputs.append(smoother.call.forward(step.pixels))
            try:
                step = steps.send(outputs[-1])
            except StopIteration as stop:
                return stop.value[0], tally, outputs

    output, tally, outputs = served(field, (2, 5, 6))
    assert tally.non_finite == 3
    assert torch.equal(output["table"], torch.full((7,), float("inf"))), "what has no row for an image is as it was"
    raw = [torch.cat([leaves(one)[name] for one in outputs]).float() for name in Spoiling.FIELDS]
    kept = {0: [0, 4], 1: [1, 3, 7]}
    for name, rows, found in zip(Spoiling.FIELDS, raw, leaves(output).values(), strict=True):
        assert found.isfinite().all(), name
        if name != "tokens":
            own = kept if field in (name, "tokens") else {0: [0, 2, 4, 6], 1: [1, 3, 5, 7]}
            wanted = torch.stack([rows[own[image]].mean(0) for image in (0, 1)])
            assert torch.allclose(found.float(), wanted, atol=2e-3), name


@pytest.mark.parametrize("field", Spoiling.FIELDS[1:])
def test_a_field_that_no_draw_is_finite_in_stays_what_the_model_alone_would_give(field):
    smoother = FeatureSmoother(
        tiny_call(Spoiling(field, (0, 2, 4, 6), float("inf"))), psm=None, sigma=0.25, n0=4, noise="iid", chunk_size=8
    )
    output = leaves(smoother.look(batch(2)))
    for name, value in output.items():
        assert bool(value[0].isfinite().all()) is (name != field)
        assert value[1].isfinite().all()


def test_gradients_reach_every_pixel_and_match_finite_differences(call):
    call.module.double()
    smoother = FeatureSmoother(call, psm=None, sigma=0.25, noise_scope="image", seed=1)
    noise = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    smoother.source.generators = lambda images: [torch.Generator().manual_seed(5) for _ in images]
    image = batch(2).double().requires_grad_(True)

    def value(x):
        return smoother.smooth(x)["tokens"].square().sum()

    (slope,) = torch.autograd.grad(value(image), image)
    assert (slope != 0).all()
    h = 1e-5
    with torch.no_grad():
        difference = (value(image + h * noise) - value(image - h * noise)) / (2 * h)
    assert torch.allclose((slope * noise).sum(), difference, rtol=1e-4)


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf"), "0.25", True, 64.0])
def test_sigma_must_be_a_finite_unit_pixel_number(call, sigma):
    with pytest.raises(SettingError, match="sigma"):
        FeatureSmoother(call, psm=None, sigma=sigma)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n0": 0},
        {"n0": 2.5},
        {"n0": True},
        {"chunk_size": 0},
        {"noise": "sobol"},
        {"noise_scope": "model"},
        {"seed": "x"},
    ],
)
def test_other_settings_are_checked(call, wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        FeatureSmoother(call, psm=None, sigma=0.25, **wrong)


def test_psm_must_fit_readout_resolution_width_and_sigma(call):
    psm = make_psm(call)
    wrongs = {
        "trained at 8x8 pixels": replace(call, image_size=(16, 16)),
        "maps readout 'tokens'": replace(call, readouts=(replace(call.readouts[0], name="pooled"),)),
        "tokens of width 6": replace(call, readouts=(replace(call.readouts[0], width=12),)),
        "4 tokens": replace(call, readouts=(replace(call.readouts[0], tokens=9),)),
    }
    for message, other in wrongs.items():
        with pytest.raises(PSMError, match=message):
            FeatureSmoother(other, psm=psm, sigma=0.25)
    with pytest.raises(PSMError, match=r"sigma = 0.25, not for 0.5"):
        FeatureSmoother(call, psm=psm, sigma=0.5)
