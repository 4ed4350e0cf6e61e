"""What a training does to a PSM, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_trainings import Blobs, config, flat
from support import TinyEncoder, make_psm, tiny_call

import fs_plugins
from fs_plugins import PSM, SettingError
from fs_plugins.training import Stage, robustness_score, train_psm
from fs_plugins.training.ablate import ablate


def test_both_stages_raise_the_robustness_score():
    call, images = tiny_call(TinyEncoder()), Blobs()
    stages = []
    psm = train_psm(call, images, config(), name="t", encoder="tiny", report=lambda *told: stages.append(told[:3]))
    assert stages[0] == ("purifier", 1, 80)
    assert stages[-1] == ("mapper", 60, 60)
    held = images.images[:32]
    plain, purified, both = (
        robustness_score(call, part, held, 0.25, draws=16) for part in (None, psm.only(mapper=False), psm)
    )
    assert purified > plain + 0.02
    assert both > purified


def test_training_leaves_the_encoder_as_it_was():
    encoder = TinyEncoder().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    one = Stage(steps=1, batch_size=4, draws=1)
    train_psm(tiny_call(encoder), Blobs(8), config(purifier_stage=one, mapper_stage=one), name="t", encoder="tiny")
    assert encoder.training
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_a_projection_that_embeds_gets_no_gradients_either(clip):
    call = fs_plugins.vision_call(clip)
    one = Stage(steps=1, batch_size=4, draws=1)
    images = torch.rand(8, 3, 16, 16)
    train_psm(call, images, config(purifier_stage=one, mapper_stage=one), name="t", encoder="e")
    assert clip.visual_projection.weight.requires_grad
    assert clip.visual_projection.weight.grad is None


def test_training_leaves_the_global_generator_alone_and_does_not_ask_it(call):
    one = Stage(steps=2, batch_size=4, draws=1)
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        psm = train_psm(call, Blobs(8), config(purifier_stage=one, mapper_stage=one), name="t", encoder="e")
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(flat(psm))
    assert torch.equal(*weights)


def test_another_seed_is_another_training(call):
    short = Stage(steps=2, batch_size=4, draws=1)
    runs = [
        train_psm(call, Blobs(8), config(purifier_stage=short, mapper=None, seed=seed), name="t", encoder="e")
        for seed in (1, 2)
    ]
    assert not torch.equal(flat(runs[0]), flat(runs[1]))


def test_gradients_can_be_accumulated_over_forwards(call):
    whole = Stage(steps=4, batch_size=8, draws=2, lr=1e-3, warmup=1)
    parts = replace(whole, batch_size=2, accumulate=4)
    told: dict = {1: [], 4: []}
    runs = [
        train_psm(
            call,
            Blobs(16),
            config(purifier_stage=stage, mapper=None),
            name="t",
            encoder="e",
            report=lambda *step, stage=stage: told[stage.accumulate].append(step[3]),
        )
        for stage in (whole, parts)
    ]
    assert torch.allclose(flat(runs[0]), flat(runs[1]), atol=1e-5)
    for one, other in zip(told[1], told[4], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_the_moving_average_is_what_is_kept(call):
    stage = Stage(steps=1, batch_size=4, draws=1, lr=1e-2, warmup=1)
    still, last, average = (
        flat(train_psm(call, Blobs(8), config(purifier_stage=chosen, mapper=None), name="t", encoder="e"))
        for chosen in (replace(stage, lr=1e-30), stage, replace(stage, ema=0.9))
    )
    assert not torch.allclose(still, last)
    assert torch.allclose(average, 0.9 * still + 0.1 * last, atol=1e-6)


def test_sigma_is_drawn_from_its_range_a_step_at_a_time(call):
    from fs_plugins.training.crew import Alone
    from fs_plugins.training.stages import Optimisation

    def levels(first: int, steps: int = 20):
        chosen = config(sigma_range=(0.2, 0.5), purifier_stage=Stage(steps=steps, batch_size=2, draws=1))
        work = Optimisation("purifier", make_psm(call), call, Blobs(4), chosen, Alone())
        for work.done in range(first, steps):
            yield work.sigma()

    drawn = list(levels(0))
    assert len(set(drawn)) == 20
    assert 0.2 <= min(drawn) < 0.3 < 0.4 < max(drawn) <= 0.5
    assert list(levels(7)) == drawn[7:]


def test_the_learning_rate_rises_and_falls():
    stage = Stage(steps=100, lr=2.0, warmup=10)
    assert [stage.rate(step) for step in (0, 50)] == pytest.approx([0.2, 1.0])
    assert stage.rate(99) == pytest.approx(0, abs=1e-3)
    assert Stage(steps=4, warmup=0).rate(0) == Stage(steps=4).lr


def test_training_repeats_under_its_seed():
    short = Stage(steps=3, batch_size=4, draws=2)
    runs = [
        train_psm(
            tiny_call(TinyEncoder()),
            Blobs(8),
            config(purifier_stage=short, mapper_stage=short, seed=4),
            name="t",
            encoder="e",
        )
        for _ in range(2)
    ]
    weights = [torch.cat([p.flatten() for p in run.parameters()]) for run in runs]
    assert torch.equal(weights[0], weights[1])


def test_a_purifier_can_be_taken_over_and_only_a_mapper_trained():
    call = tiny_call(TinyEncoder())
    short = Stage(steps=2, batch_size=4, draws=1)
    first = train_psm(call, Blobs(8), config(purifier_stage=short, mapper=None), name="p", encoder="e")
    assert first.mapped == ()
    taken = config(purifier_stage=Stage(steps=0), mapper_stage=short)
    second = train_psm(call, Blobs(8), taken, name="m", encoder="e", start=first)
    for one, other in zip(first.purifier.parameters(), second.purifier.parameters(), strict=True):
        assert torch.equal(one, other)
    slow = Stage(steps=1, batch_size=4, draws=1, lr=1e-9)
    further = config(purifier_stage=slow, mapper=None, sigma_range=(0.25, 0.5))
    third = train_psm(call, Blobs(8), further, name="w", encoder="e", start=first)
    assert third.config.sigma_range == (0.25, 0.5)
    for one, other in zip(first.purifier.parameters(), third.purifier.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    alone = train_psm(call, Blobs(8), config(purifier=None, mapper_stage=short), name="m", encoder="e")
    assert alone.purifier is None
    assert alone.mapped == ("tokens",)


def test_the_result_is_a_psm_that_goes_to_disk_and_serves(tmp_path):
    import fs_plugins

    call = tiny_call(TinyEncoder())
    short = Stage(steps=1, batch_size=4, draws=1)
    psm = train_psm(call, Blobs(8), config(purifier_stage=short, mapper_stage=short), name="t", encoder="e")
    psm.save_pretrained(tmp_path / "psm")
    smoother = fs_plugins.FeatureSmoother(call, psm=PSM.from_pretrained(tmp_path / "psm"), sigma=0.25)
    assert smoother.smooth(Blobs(2).images)["tokens"].isfinite().all()


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        (torch.rand(8, 3, 4, 4), {}, r"\(C, 8, 8\)"),
        (torch.rand(8, 3, 8, 8) * 255, {}, r"in \[0, 1\]"),
        (torch.rand(2, 3, 8, 8), {}, "Fewer training images"),
        (torch.rand(8, 3, 8, 8), {"purifier": None, "mapper": None}, "Nothing to train"),
        (torch.rand(8, 3, 8, 8), {"sigma": 0.0}, "sigma must be positive"),
        (torch.rand(8, 3, 8, 8), {"sigma_range": (0.3, 0.5)}, "inside sigma_range"),
        (torch.rand(8, 3, 8, 8), {"lambda3": -1.0}, "lambda3 weighs a loss"),
    ],
)
def test_unusable_training_data_is_refused(images, changes, message):
    with pytest.raises(SettingError, match=message):
        train_psm(tiny_call(TinyEncoder()), images, config(**changes), name="t", encoder="e")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "steps must be a whole number >= 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"draws": 1.5}, "draws must be"),
        ({"accumulate": 0}, "accumulate must be"),
        ({"lr": 0.0}, "lr"),
        ({"ema": 1.0}, "ema is a decay"),
    ],
)
def test_stages_refuse_values_that_are_out_of_range(changes, message):
    with pytest.raises(SettingError, match=message):
        Stage(**{"steps": 1, **changes})


def test_a_loss_that_is_not_finite_stops_the_training_with_a_sentence(call):
    broken = config(purifier_stage=Stage(steps=9, batch_size=4, draws=1, lr=1e30, warmup=1), mapper=None)
    with pytest.raises(SettingError, match=r"Step \d of the purifier's training gave a loss that is not finite"):
        train_psm(call, Blobs(8), broken, name="t", encoder="e")


def test_an_ablation_says_what_each_term_does(call):
    short = Stage(steps=3, batch_size=4, draws=1, lr=3e-3, warmup=1)
    trials = list(ablate(call, Blobs(8), Blobs(12).images[8:], config(purifier_stage=short, mapper_stage=short)))
    assert [(trial.stage, trial.without) for trial in trials] == [
        ("purifier", None),
        ("purifier", "l_rb"),
        ("purifier", "l_mse"),
        ("mapper", None),
        ("mapper", "l_stats"),
        ("mapper", "l_id"),
    ]
    assert [trial.without for trial in trials if trial.idle] == ["l_id"]
    assert trials[5].score == trials[3].score
    assert trials[4].score != trials[3].score
    assert set(trials[1].terms) == {"l_rb", "l_mse"}
    assert set(trials[4].terms) == {"l_rb", "l_stats", "l_id"}
