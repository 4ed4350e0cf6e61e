"""In which modes of modules and of torch there are attacks, certificates and trainings, and what is said in others."""

from __future__ import annotations

import pytest
import torch
from support import TinyEncoder, make_psm, tiny_call
from tiny import rand
from torch import nn

import fs_plugins
from fs_plugins import PSM, FeatureSmoother, FSPluginsWarning, LinearEmbedding, ModelError, SettingError
from fs_plugins.attacks import METHODS, Ball, ascend, attack
from fs_plugins.attacks.masking import check_gradients
from fs_plugins.psm import Part
from fs_plugins.training import Stage, TrainingConfig, robustness_score, train_psm

IMAGES, TARGETS = rand(2, 3, 8, 8), rand(2, 3, 8, 8, seed=1)


class Dropping(TinyEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.batch = nn.BatchNorm2d(3).eval()
        self.eval()

    def forward(self, pixel_values):
        return super().forward(self.drop(self.batch(pixel_values)))


def road() -> FeatureSmoother:
    torch.manual_seed(0)
    call = tiny_call(Dropping())
    return FeatureSmoother(call, psm=make_psm(call), sigma=0.25, n0=2, seed=0)


PARTS = {
    "the encoder": lambda road: road.call.module,
    "its dropout": lambda road: road.call.module.drop,
    "its batch statistics": lambda road: road.call.module.batch,
    "the purifier": lambda road: road.psm.purifier,
    "a mapper": lambda road: road.psm.mappers[0],
}
VERBS = {
    "attack": lambda road: attack(road, IMAGES, steps=1),
    "attack of an ensemble": lambda road: attack([tiny_call(TinyEncoder()), road], IMAGES, steps=1),
    "gradient-free attack": lambda road: attack(road, IMAGES, method="square", steps=1),
    "check_gradients": lambda road: check_gradients(road, IMAGES, TARGETS, steps=1, queries=1),
    "certify": lambda road: fs_plugins.certify(road, IMAGES, n=4),
    "certify_predictions": lambda road: fs_plugins.certify_predictions(road, IMAGES, torch.eye(3, 24), n=4),
    "robustness_score": lambda road: robustness_score(road.call, road.psm, IMAGES, 0.25),
}
OF_ENCODERS = {
    "oblivious attack": lambda road: attack(road.call, IMAGES, steps=1),
    "smoothers": lambda road: fs_plugins.smoothers(road.call, psm=None, sigma=0.25),
    "certify": lambda road: fs_plugins.certify(road.call, IMAGES, n=4, psm=None, sigma=0.25),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_takes_a_part_in_training_mode(verb, part):
    one = road()
    VERBS[verb](one)
    PARTS[part](one).train()
    modes = [module.training for module in (*one.call.module.modules(), *one.psm.modules())]
    with pytest.raises(ModelError, match=r"in training mode.*Call (model|psm)\.eval\(\) first"):
        VERBS[verb](one)
    assert [module.training for module in (*one.call.module.modules(), *one.psm.modules())] == modes
    PARTS[part](one).eval()
    VERBS[verb](one)


@pytest.mark.parametrize("part", list(PARTS)[:3])
@pytest.mark.parametrize("verb", OF_ENCODERS)
def test_no_verb_takes_an_encoder_in_training_mode(verb, part):
    one = road()
    PARTS[part](one).train()
    with pytest.raises(ModelError, match=r"in training mode.*Call model\.eval\(\) first"):
        OF_ENCODERS[verb](one)
    PARTS[part](one).eval()
    OF_ENCODERS[verb](one)


def test_the_embedding_counts_as_the_encoder():
    head = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Dropout(0.5)).eval()
    pooled = fs_plugins.Readout("extra", (fs_plugins.vision.Field("extra", 1),), width=2, tokens=0)
    call = tiny_call(TinyEncoder(), readouts=(pooled,), embed=LinearEmbedding("extra", head))
    head.train()
    with pytest.raises(ModelError, match="in training mode"):
        attack(call, IMAGES, steps=1)


def test_a_part_of_a_model_in_training_mode_is_refused_by_enable_and_warned_about_after_it(llava, images):
    tower = fs_plugins.vision_call(llava).module
    inner = next(module for module in tower.modules() if isinstance(module, nn.LayerNorm))
    inner.train()
    with pytest.raises(ModelError, match="in training mode"):
        fs_plugins.enable(llava, psm=None, sigma=0.25)
    inner.eval()
    pixels = fs_plugins.vision_call(llava).pixels.from_unit(images, torch.float32)
    with fs_plugins.enable(llava, psm=None, sigma=0.25):
        inner.train()
        with pytest.warns(FSPluginsWarning, match="in training mode"):
            tower(pixels)
        with pytest.raises(ModelError, match="in training mode"):
            attack(llava, images, steps=1)


@pytest.mark.parametrize("method", METHODS)
def test_no_grad_around_an_attack_changes_nothing(method):
    wanted = attack(road(), IMAGES, TARGETS, method=method, steps=3)
    with torch.no_grad():
        assert torch.equal(attack(road(), IMAGES, TARGETS, method=method, steps=3), wanted)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "square"])
def test_inference_mode_around_an_attack_by_gradients_is_named(method):
    one = road()
    with torch.inference_mode(), pytest.raises(SettingError, match=r"inside torch\.inference_mode none are recorded"):
        attack(one, IMAGES, TARGETS, method=method, steps=1)


def test_inference_mode_around_other_roads_to_gradients_is_named():
    one = road()
    with torch.inference_mode():
        with pytest.raises(SettingError, match=r"torch\.inference_mode"):
            check_gradients(one, IMAGES, TARGETS, steps=1, queries=1)
        with pytest.raises(SettingError, match=r"torch\.inference_mode"):
            ascend(lambda images, step, draw: images.sum((1, 2, 3)), IMAGES, ball=Ball(), steps=1)
        with pytest.raises(SettingError, match=r"Training needs gradients.*torch\.inference_mode"):
            train_psm(one.call, list(IMAGES), TrainingConfig(), name="t", encoder="e")


@pytest.mark.parametrize(
    "work",
    [
        lambda road: attack(road, IMAGES, TARGETS, method="square", steps=5),
        lambda road: torch.tensor([one.mean for one in fs_plugins.certify(road, IMAGES, n=20, seed=1)]),
    ],
)
def test_what_needs_no_gradient_is_the_same_in_inference_mode(work):
    wanted = work(road())
    with torch.inference_mode():
        assert torch.equal(work(road()), wanted)


def test_what_was_made_in_inference_mode_is_attacked_or_refused_in_words(tmp_path):
    one = road()
    wanted = attack(one, IMAGES, TARGETS, steps=2)
    one.psm.save_pretrained(tmp_path)
    with torch.inference_mode():
        images, targets, psm = IMAGES.clone(), TARGETS.clone(), PSM.from_pretrained(tmp_path)
        call = tiny_call(Dropping())
    loaded = FeatureSmoother(one.call, psm=psm, sigma=0.25, n0=2, seed=0)
    assert torch.equal(attack(loaded, images, targets, steps=2), wanted)
    with pytest.raises(ModelError, match=r"made inside torch\.inference_mode.*Load the model outside it"):
        attack(call, IMAGES, TARGETS, steps=2)
    attack(call, IMAGES, TARGETS, method="square", steps=2)


def test_a_training_inside_no_grad_learns_the_same():
    one = Stage(steps=2, batch_size=2, draws=1)
    config = TrainingConfig(purifier=None, mapper=Part(kind="residual", args={"heads": 2}), mapper_stage=one)
    call = road().call

    def weights():
        psm = train_psm(call, list(IMAGES), config, name="t", encoder="e")
        return torch.cat([parameter.flatten() for parameter in psm.parameters()])

    wanted = weights()
    with torch.no_grad():
        assert torch.equal(weights(), wanted)
