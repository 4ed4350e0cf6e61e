"""The adversarial stage: it learns to withstand its own attacker, and is as orderly as the other stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_trainings import Blobs, config, flat
from support import TinyEncoder, make_psm, tiny_call
from torch import nn

from fs_plugins import PSM, SettingError
from fs_plugins.answers import Classes
from fs_plugins.attacks import attack
from fs_plugins.psm import Part
from fs_plugins.psm.purifier import spectrum
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.training import Adversary, Stage, TrainingFolder, train_psm
from fs_plugins.training.ablate import ablate
from fs_plugins.training.reader import Read, learned

NONE = Stage(steps=0)
SHORT = {
    "purifier_stage": NONE,
    "mapper_stage": NONE,
    "adversarial": Adversary(eps=0.1, ramp=0.3, targeted=0.5),
    "adversarial_stage": Stage(steps=6, batch_size=4, draws=3, lr=1e-3, warmup=2, ema=0.8),
}


def head(call) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(call.embed(call.encode(torch.rand(1, 3, 8, 8))).shape[1], 5)


def run(out=None, *, stop: int | None = None, answers=(), **changes) -> PSM:
    def report(stage, step, steps, losses):
        if step == stop:
            raise InterruptedError

    kept = TrainingFolder(out, save_every=2, log_every=1) if out else None
    chosen = config(**{**SHORT, **changes})
    return train_psm(
        tiny_call(TinyEncoder()), Blobs(8), chosen, name="t", encoder="e", out=kept, report=report, answers=answers
    )


def left(psm: PSM, images, eps: float) -> float:
    """Cosine to the clean feature under the adaptive attack."""
    call = tiny_call(TinyEncoder())
    smoother = FeatureSmoother(call, psm=psm, sigma=0.25, n0=4, seed=0)
    attacked = attack(smoother, images, eps=eps, steps=20, draws=2)
    served = call.embed(smoother.smooth(attacked))
    return torch.cosine_similarity(served, call.embed(call.encode(images)), dim=-1).mean().item()


def test_it_makes_the_adaptive_attack_weaker_than_plain_training_does():
    images, held = Blobs(), Blobs().images[:16]
    call = tiny_call(TinyEncoder())
    plain = train_psm(call, images, config(), name="t", encoder="e")
    stage = Stage(steps=40, batch_size=16, draws=3, lr=3e-3, warmup=5, ema=0.9)
    robust = train_psm(
        call,
        images,
        config(
            purifier_stage=NONE,
            mapper_stage=NONE,
            adversarial=Adversary(eps=0.12),
            adversarial_stage=stage,
            lambda_adv=1.0,
        ),
        name="t",
        encoder="e",
        start=plain,
    )
    assert left(robust, held, 0.1) > left(plain, held, 0.1) + 0.1


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_it_goes_on_from_where_it_stopped(tmp_path, stop):
    wanted = run()
    with pytest.raises(InterruptedError):
        run(tmp_path / "out", stop=stop)
    assert torch.equal(flat(run(tmp_path / "out")), flat(wanted))
    rows = [row.split(",") for row in (tmp_path / "out" / "log.csv").read_text("utf-8").splitlines()]
    assert rows[0][-3:] == ["l_adv", "l_pull", "l_say"]
    assert [row[:2] for row in rows[1:]] == [["adversarial", str(step)] for step in range(1, 7)]
    assert all(float(row[-3]) > 0 for row in rows[1:])


def test_answers_are_held_too_and_nothing_else_learns():
    call = tiny_call(TinyEncoder())
    reads = head(call)
    without, told = run(), []
    weights = reads.weight.clone()
    chosen = config(**SHORT)
    psm = train_psm(
        call, Blobs(8), chosen, name="t", encoder="e", answers=[Classes(call, reads)],
        report=lambda *step: told.append(step[3]),
    )  # fmt: skip
    assert not torch.equal(flat(psm), flat(without))
    assert all("l_say" in values for values in told)
    assert torch.equal(reads.weight, weights)
    assert reads.weight.requires_grad
    assert reads.weight.grad is None


def test_weights_move_only_at_their_passes():
    """With one update after three passes, the attack is made with the weights as they were."""
    still = run(adversarial_stage=replace(SHORT["adversarial_stage"], steps=1, lr=1e-30, ema=None))
    rare = {"adversarial": Adversary(eps=0.1, update_every=4)}
    stage = replace(SHORT["adversarial_stage"], steps=1, ema=None, lr=1e-2, warmup=0)
    assert torch.allclose(flat(run(adversarial_stage=stage, **rare)), flat(still))
    assert not torch.allclose(flat(run(adversarial_stage=stage)), flat(still))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_stays_in_each_pictures_ball(norm, monkeypatch):
    from fs_plugins.training.stages import AdversarialTerms

    seen = []
    own = AdversarialTerms.forward

    def forward(self, shown, clean, *rest):
        change = (shown - clean).detach().flatten(1)
        seen.append(change.abs().amax(1) if norm == "linf" else change.norm(dim=1))
        assert shown.min() >= 0
        assert shown.max() <= 1
        return own(self, shown, clean, *rest)

    monkeypatch.setattr(AdversarialTerms, "forward", forward)
    run(adversarial=Adversary(norm, 0.2, ramp=0.0))
    sizes = torch.stack(seen)
    assert sizes.max() <= 0.2 + 1e-6
    assert sizes[:, 1:].std() > 0.01  # radii of their own
    assert sizes.max() > 0.1


def test_radii_grow_with_the_stage():
    places = torch.tensor([0.0, 0.5, 1.0])
    adversary = Adversary(eps=0.8, ramp=0.5)
    assert adversary.radii(0.0, places).abs().max() == 0
    torch.testing.assert_close(adversary.radii(0.25, places), 0.5 * torch.tensor([0.1, 0.45, 0.8]))
    torch.testing.assert_close(adversary.radii(0.9, places), torch.tensor([0.1, 0.45, 0.8]))


def test_a_reader_says_what_the_model_would():
    """Of pictures that it has seen; and it goes into a checkpoint whole."""
    call = tiny_call(TinyEncoder())
    answers = Classes(call, head(call))
    psm = make_psm(call)
    (read,) = learned([answers], call, psm, Blobs(256), sigma=0.25, seed=1, steps=800)
    assert "classes" in str(read)
    pictures = Blobs(256).images[:64]
    output = call.look(pictures)
    truth, said = answers.given(output, range(len(pictures))), read.spoken(output, read.given(output, pictures))
    assert said.images == len(pictures)
    words, rest = said.said.view(len(pictures), -1).split([1, read.reader.places - 1], 1)
    assert (rest == 0).all()  # a class is one word
    agreed = [read.words[int(word) - 1] == one for word, one in zip(words[:, 0], truth.tolist(), strict=True)]
    assert sum(agreed) > 0.75 * len(pictures) > 1.2 * truth.bincount().max()
    again = Read.of(call, read.state(), torch.device("cpu"))
    assert torch.equal(again.reader(call.encode(pictures)), read.reader(call.encode(pictures)))
    assert str(again) == str(read)


def test_a_training_with_readers_goes_on_where_it_stopped(tmp_path):
    call = tiny_call(TinyEncoder())
    answers = (Classes(call, head(call)),)
    changes = {"adversarial": replace(SHORT["adversarial"], reader=0.7, reader_steps=5)}
    whole = run(tmp_path / "whole", answers=answers, **changes)
    with pytest.raises(InterruptedError):
        run(tmp_path / "part", stop=5, answers=answers, **changes)
    again = run(tmp_path / "part", answers=answers, **changes)
    assert torch.equal(flat(again), flat(whole))
    assert not torch.equal(flat(whole), flat(run(answers=answers)))


def test_a_purifiers_spectrum_is_measured_on_the_training_pictures():
    sizes = {"channels": [8, 16], "unshuffle": 2}
    part = Part(kind="unet", args={**sizes, "spectrum": "measured"})
    stage = Stage(steps=1, batch_size=4, draws=1)
    wanted = spectrum(Blobs(80).images[:64], 2)
    for purifier in (part, [Part(kind="unet", args=sizes), part]):
        chosen = config(purifier=purifier, mapper=None, purifier_stage=stage)
        psm = train_psm(tiny_call(TinyEncoder()), Blobs(80), chosen, name="t", encoder="e")
        found = psm.config.purifier.args.get("parts", [psm.config.purifier.model_dump()])[-1]["args"]
        assert found == {**sizes, "spectrum": wanted}


def test_a_cascade_starts_from_a_purifier_in_each_of_its_places():
    part = Part(kind="unet", args={"channels": [8, 16], "unshuffle": 2})
    call = tiny_call(TinyEncoder())
    start = train_psm(
        call,
        Blobs(8),
        config(purifier=part, mapper=None, purifier_stage=Stage(steps=1, batch_size=4, draws=1)),
        name="t",
        encoder="e",
    )
    other = Part(kind="bottleneck", args={"channels": [8], "latent": 2, "unshuffle": 2, "attention": False})
    chosen = config(**{**SHORT, "purifier": [part, other, part], "mapper": None})
    still = replace(chosen, adversarial_stage=replace(chosen.adversarial_stage, steps=1, lr=1e-30))
    psm = train_psm(call, Blobs(8), still, name="t", encoder="e", start=start)
    images = torch.rand(2, 3, 8, 8)
    first, _, last = psm.purifier.parts
    assert torch.allclose(first(images, 0.25), start.purify(images, 0.25))
    assert torch.allclose(last(images, 0.25), start.purify(images, 0.25))
    assert psm.config.purifier.kind == "cascade"


def test_mappers_of_the_start_are_taken_where_none_are_trained():
    call = tiny_call(TinyEncoder())
    short = Stage(steps=2, batch_size=4, draws=1, lr=1e-2, warmup=0)
    start = train_psm(call, Blobs(8), config(purifier_stage=short, mapper_stage=short), name="t", encoder="e")
    stage = replace(SHORT["adversarial_stage"], steps=1, lr=1e-30)
    psm = train_psm(call, Blobs(8), config(**{**SHORT, "adversarial_stage": stage}), name="t", encoder="e", start=start)
    assert torch.allclose(flat(psm), flat(start))


def test_ablation_measures_the_terms_on_attacked_pictures():
    call = tiny_call(TinyEncoder())
    answers = [Classes(call, head(call))]
    found = list(ablate(call, Blobs(8), Blobs(4).images, config(**SHORT), answers=answers))
    assert [(one.stage, one.without) for one in found] == [
        ("adversarial", None), ("adversarial", "l_adv"), ("adversarial", "l_say"), ("adversarial", "l_mse")
    ]  # fmt: skip
    assert all(set(one.terms) == {"l_adv", "l_say", "l_mse"} for one in found)
    assert not any(one.idle for one in found)
    without = list(ablate(call, Blobs(8), Blobs(4).images, config(**SHORT)))
    assert [one.without for one in without] == [None, "l_adv", "l_mse"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"eps": 0.0}, "eps"),
        ({"eps": 16}, "did you mean 16/255"),
        ({"norm": "l1"}, "norm"),
        ({"step_size": 0.0}, "step_size"),
        ({"ramp": 1.5}, "ramp"),
        ({"targeted": -0.1}, "targeted"),
        ({"update_every": 0}, "update_every"),
    ],
)
def test_what_is_out_of_range_is_refused(given, words):
    with pytest.raises(SettingError, match=words):
        Adversary(**given)


def test_accumulation_is_refused():
    with pytest.raises(SettingError, match="accumulate must be 1"):
        config(**{**SHORT, "adversarial_stage": Stage(steps=1, accumulate=2)})
