from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from support import TinyEncoder, make_psm, tiny_call
from torch import nn
from torch.utils.data import Dataset

import fs_plugins
from fs_plugins import PSM, SettingError
from fs_plugins.noise import keyed
from fs_plugins.psm import Part, ResidualMapper
from fs_plugins.training import ImageFolder, Stage, TrainingConfig, losses, robustness_score, train_psm
from fs_plugins.training import psm as training
from fs_plugins.training.ablate import ablate
from fs_plugins.training.data import batches, check, drawn, samples
from fs_plugins.training.stages import MapperTerms, PurifierTerms


def test_consistency_is_one_minus_the_mean_cosine():
    a = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    assert losses.consistency(a, b).item() == pytest.approx(1 - (0 + 1) / 2)


def test_reconstruction_is_the_mean_l2_norm():
    clean = torch.zeros(2, 1, 1, 2)
    purified = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 1.0]]]])
    assert losses.reconstruction(purified, clean).item() == pytest.approx((5 + 1) / 2)


def test_statistics_compare_moments_per_channel():
    mapped = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    clean = torch.tensor([[[0.0, 2.0], [0.0, 4.0]]])
    # channel 0: means 2, 0; deviations 1, 0. channel 1: means 0, 3; deviations 0, 1.
    assert losses.statistics(mapped, clean).item() == pytest.approx(((4 + 1) + (9 + 1)) / 2)


def test_statistics_ignore_which_token_is_which():
    z = torch.randn(4, 5, 3)
    shuffled = z.flatten(0, 1)[torch.randperm(20)].view(4, 5, 3)
    assert losses.statistics(shuffled, z).item() == pytest.approx(0, abs=1e-10)
    assert losses.statistics(z[:, 0], z[:, 0] + 1).item() == pytest.approx(1, rel=1e-5)


def test_statistics_of_a_batch_in_two_parts_need_the_moments_of_the_whole():
    """What two processes exchange: here the other one's means are known beforehand."""
    z = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    clean = z.roll(1, -1) * 2 + 1
    others = [part.flatten(0, 1) for part in (z[2:], clean[2:])]
    other = iter([f(part) for part in others for f in (lambda p: p.mean(0), lambda p: p)])

    means: list[torch.Tensor] = []

    def average(mean):
        theirs = next(other)
        if theirs.ndim > 1:  # the second moment, around the mean of both
            theirs = (theirs - means[-1]).square().mean(0)
        means.append((mean + theirs) / 2)
        return means[-1]

    spread = losses.statistics(z[:2], clean[:2], average)
    assert spread.item() == pytest.approx(losses.statistics(z, clean).item(), rel=1e-5)
    assert spread.item() != pytest.approx(losses.statistics(z[:2], clean[:2]).item(), rel=1e-2)


def test_statistics_of_a_constant_channel_have_a_gradient():
    z = torch.ones(2, 3, 4, requires_grad=True)
    losses.statistics(z, torch.randn(2, 3, 4)).backward()
    assert z.grad.isfinite().all()


def test_identity_is_the_mean_squared_norm_and_idle_for_the_papers_mapper():
    assert losses.identity(torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])).item() == pytest.approx(2.5)
    z = torch.randn(3, 4, 8)
    assert losses.identity(ResidualMapper(8)(z, 0.0) - z).item() == 0


class Denoiser(nn.Module):
    """A purifier that takes a share of the image's difference to grey off, and has a denoising loss."""

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(share))
        self.seen: list[tuple] = []

    def forward(self, images, sigma):
        return images - self.share * (images - 0.5)

    def denoising_loss(self, clean, noise, level):
        self.seen.append((clean.shape, noise.shape, level))
        return (self.share - 0.75).square()


def fake_batch(count: int = 3, draws: int = 2):
    generator = torch.Generator().manual_seed(5)
    clean = Blobs(count).images
    return (
        clean,
        torch.randn(count, draws, *clean.shape[1:], generator=generator),
        torch.rand(count, generator=generator),
    )


def test_the_purifiers_terms_are_those_of_the_paper(call):
    psm = make_psm(call)
    psm.purifier = Denoiser()
    clean, noise, level = fake_batch()
    terms = PurifierTerms(psm, call, 1)(clean, noise, 0.25, level)
    cosines, norms = [], []
    for image, draws in zip(clean, noise, strict=True):
        z = call.embed(call.encode(image[None]))
        for e in draws:
            purified = image + 0.25 * e - 0.5 * (image + 0.25 * e - 0.5)
            cosines.append(torch.cosine_similarity(call.embed(call.encode(purified[None])), z).item())
            norms.append((purified - image).norm().item())
    assert terms["l_rb"].item() == pytest.approx(1 - sum(cosines) / 6, rel=1e-5)
    assert terms["l_mse"].item() == pytest.approx(sum(norms) / 6, rel=1e-5)
    assert terms["l_diff"].item() == pytest.approx((0.5 - 0.75) ** 2)
    assert psm.purifier.seen[0][:2] == (clean.shape, clean.shape)
    assert torch.equal(psm.purifier.seen[0][2], level)


def test_the_mappers_terms_are_those_of_the_paper(call):
    psm = make_psm(call)
    clean, noise, level = fake_batch()
    terms = MapperTerms(psm, call, 1)(clean, noise, 0.25, level)
    noisy = torch.cat([image + 0.25 * draws for image, draws in zip(clean, noise, strict=True)])
    z = call.encode(psm.purify(noisy, 0.25))["tokens"]
    mapped, plain = psm.map("tokens", z, 0.25), call.encode(clean)["tokens"]
    cosines = torch.cosine_similarity(mapped.flatten(1), plain.flatten(1).repeat_interleave(2, 0))
    assert terms["l_rb"].item() == pytest.approx(1 - cosines.mean().item(), rel=1e-5)
    assert terms["l_stats"].item() == pytest.approx(losses.statistics(mapped, plain).item(), rel=1e-5)
    assert terms["l_id"].item() == 0


def test_the_denoising_loss_is_minimised_where_a_purifier_has_one(call, monkeypatch):
    monkeypatch.setattr(training, "plugin_parts", lambda: {"purifiers": {"half": Denoiser}, "mappers": {}})
    stage = Stage(steps=150, batch_size=4, draws=1, lr=0.02, warmup=1)
    own = config(purifier=Part(kind="half"), purifier_stage=stage, mapper=None, lambda1=0.0, lambda2=0.0)
    assert train_psm(call, Blobs(8), own, name="t", encoder="e").purifier.share.item() == pytest.approx(0.75, abs=0.01)
    without = train_psm(call, Blobs(8), replace(own, lambda_diff=0.0), name="t", encoder="e")
    assert without.purifier.share.item() == pytest.approx(0.5, abs=0.03)  # weight decay alone


class Blobs(Dataset):
    """Smooth pictures: a denoiser has something to learn."""

    def __init__(self, count: int = 64) -> None:
        coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        self.images = torch.nn.functional.interpolate(coarse, size=8, mode="bilinear")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def config(**changes) -> TrainingConfig:
    settings = {
        "purifier": Part(kind="unet", args={"channels": [16, 16], "unshuffle": 2}),
        "mapper": Part(kind="residual", args={"heads": 2}),
        "purifier_stage": Stage(steps=80, batch_size=16, draws=2, lr=3e-3, warmup=5, ema=0.9),
        "mapper_stage": Stage(steps=60, batch_size=16, draws=2, lr=3e-3, warmup=5),
        "lambda3": 1.0,
    }
    return TrainingConfig(**{**settings, **changes})


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


def flat(psm: PSM) -> torch.Tensor:
    return torch.cat([p.flatten() for p in psm.parameters()])


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


def test_every_epoch_is_a_permutation_and_processes_share_it():
    chosen = config(purifier_stage=Stage(steps=6, batch_size=4, draws=1, accumulate=2))
    alone = list(samples(16, chosen, "purifier"))
    assert len(alone) == 12
    indices = [index for some in alone for _, _, index in some]
    for epoch in range(3):
        assert sorted(indices[16 * epoch : 16 * (epoch + 1)]) == list(range(16))
    assert indices[:16] != indices[16:32]
    assert list(samples(16, chosen, "purifier", first=2)) == alone[4:]
    half = replace(chosen, purifier_stage=Stage(steps=6, batch_size=2, draws=1, accumulate=2))
    shares = [list(samples(16, half, "purifier", process=process, processes=2)) for process in (0, 1)]
    assert [first + second for first, second in zip(*shares, strict=True)] == alone


def test_noise_follows_from_seed_stage_step_and_place_alone():
    chosen = config(purifier_stage=Stage(steps=2, draws=3))
    image, noise, level = drawn(Blobs(4), chosen, "purifier", (1, 0, 2))
    assert torch.equal(image, Blobs(4)[2])
    assert noise.shape == (3, 3, 8, 8)
    assert 0 <= level < 1
    again = drawn(Blobs(4), chosen, "purifier", (1, 0, 3))
    assert torch.equal(noise, again[1]), "the noise does not depend on the image"
    others = [
        ("mapper", (1, 0, 2), 0),
        ("purifier", (0, 0, 2), 0),
        ("purifier", (1, 1, 2), 0),
        ("purifier", (1, 0, 2), 1),
    ]
    for stage, sample, seed in others:
        other = drawn(Blobs(4), replace(chosen, seed=seed), stage, sample)[1]
        assert not torch.equal(noise[: len(other)], other[: len(noise)])


def test_batches_come_in_order_however_many_threads_read_them():
    import time

    def one(sample):
        time.sleep(0.003 * (sample[2] % 3))
        return (torch.tensor(sample[2]),)

    lists = [[(0, 0, i), (0, 1, i + 1)] for i in range(0, 20, 2)]
    told = [batch[0].tolist() for batch in batches(one, lists, workers=4)]
    assert told == [[i, i + 1] for i in range(0, 20, 2)]
    first = batches(one, lists, workers=1)
    next(first)
    first.close()


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


def folder_of(path, count: int, size: tuple[int, int] = (20, 16)) -> ImageFolder:
    path.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (24, 24), (10 * i, 5, 200)).save(path / f"{i}.png")
    return ImageFolder(path, size)


def test_a_folder_is_split_by_the_names_of_its_pictures_and_the_seed(tmp_path):
    folder = folder_of(tmp_path / "a", 20)
    train, held = folder.split(5, seed=0)
    assert (len(train), len(held)) == (15, 5)
    assert sorted(train.paths + held.paths) == folder.paths
    moved = folder_of(tmp_path / "b", 20)
    assert [p.name for p in moved.split(5, seed=0)[1].paths] == [p.name for p in held.paths]
    assert moved.digest == folder.digest != train.digest
    assert folder.split(5, seed=1)[1].paths != held.paths
    Image.new("RGB", (99, 24)).save(tmp_path / "b" / "3.png")
    assert ImageFolder(tmp_path / "b", (20, 16)).digest != folder.digest


def test_augmentation_follows_from_its_generator(tmp_path):
    (tmp_path / "a").mkdir()
    ramp = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    Image.fromarray(ramp.numpy()).save(tmp_path / "a" / "ramp.png")
    folder = ImageFolder(tmp_path / "a", (16, 16))
    views = [folder.varied(0, keyed(i)) for i in range(12)]
    assert all(view.shape == (3, 16, 16) for view in views)
    assert torch.equal(views[3], folder.varied(0, keyed(3)))
    rising = {bool(view[0, 0, -1] > view[0, 0, 0]) for view in views}
    assert rising == {True, False}, "some are mirrored"
    assert len({view[0, 0].min().item() for view in views}) > 6, "they are of different places"
    chosen = config(augment=True, purifier_stage=Stage(steps=2, draws=1))
    one, other = (drawn(folder, chosen, "purifier", (step, 0, 0))[0] for step in (0, 1))
    assert not torch.equal(one, other)


def test_pictures_are_read_before_the_training_and_named_if_they_are_broken(tmp_path):
    folder = folder_of(tmp_path / "a", 8)
    whole = config(purifier_stage=Stage(steps=9, batch_size=4), mapper=None)
    check(folder, whole)
    data = folder.paths[3].read_bytes()
    folder.paths[3].write_bytes(data[: len(data) // 2])
    folder.paths[5].write_bytes(b"nothing")
    with pytest.raises(SettingError, match=r"3\.png is not a readable.*5\.png is not a readable") as told:
        check(folder, whole)
    assert "0.png" not in str(told.value)
    with pytest.raises(SettingError, match=r"Fewer training images \(8\) than one batch of 16"):
        check(folder, config(purifier_stage=Stage(steps=1, batch_size=8), mapper=None), processes=2)
    used = {
        i
        for some in samples(8, replace(whole, purifier_stage=Stage(steps=1, batch_size=2)), "purifier")
        for *_, i in some
    }
    unused = next(i for i in range(8) if i not in used | {3, 5})
    for i in (3, 5):
        folder.paths[i].write_bytes(data)
    folder.paths[unused].write_bytes(b"nothing")
    check(folder, replace(whole, purifier_stage=Stage(steps=1, batch_size=2)))  # what is not used is not read


def test_image_folder_reads_crops_and_names_what_it_cannot_read(tmp_path):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (9, 9), 128).save(tmp_path / "sub" / "b.JPG")
    (tmp_path / "notes.txt").write_text("not an image")
    folder = ImageFolder(tmp_path, (16, 12))
    assert len(folder) == 2
    assert folder[0].shape == (3, 16, 12)
    assert torch.allclose(folder[0][:, 5, 5], torch.tensor([1.0, 0.0, 0.0]))
    (tmp_path / "c.png").write_bytes(b"not a png")
    with pytest.raises(SettingError, match=r"c\.png is not a readable image"):
        ImageFolder(tmp_path, (8, 8))[1]
    with pytest.raises(SettingError, match=r"No \.png"):
        ImageFolder(tmp_path / "sub" / "deeper", (8, 8))
