"""Labels certified by a linear head: a model's own, or an nn.Linear on an encoder's feature."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import TinyEncoder, tiny_call
from torch import nn

import fs_plugins
from fs_plugins import FeatureSmoother, Head, ModelError, SettingError
from fs_plugins.certificates.bounds import vote_radius
from fs_plugins.certificates.certifiers import Labels
from fs_plugins.certificates.plan import Plan
from fs_plugins.certificates.sampling import Sampler

SIGMA, WIDTH = 0.05, 24


@pytest.fixture
def call():
    return tiny_call(TinyEncoder())


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def linear(classes: int = 4, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(WIDTH, classes, bias=bias)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def zeros() -> nn.Linear:
    """As a head is before it is trained."""
    layer = nn.Linear(WIDTH, 3).requires_grad_(False)
    layer.weight.zero_()
    layer.bias.zero_()
    return layer


def certify(call, image, head=None, n=300, **settings):
    return fs_plugins.certify_predictions(call, image, head, n=n, psm=None, sigma=SIGMA, seed=0, **settings)[0]


def test_a_draw_votes_by_what_the_head_says_of_the_feature_as_it_is(call, image):
    head = linear()
    found = certify(call, image, head)
    sampler = Sampler(FeatureSmoother(call, psm=None, sigma=SIGMA), image[0], key=b"certificate seed 0")
    generator = sampler._stream("bound")
    noise = torch.stack([torch.randn(image[0].shape, generator=generator) for _ in range(300)])
    with torch.no_grad():
        features = call.embed(call.encode(image + SIGMA * noise))
        votes = head(features).argmax(1)
    assert found.votes == int((votes == found.predicted).sum())
    assert found.predicted == int(votes.mode().values)
    assert found.feature_radius is None
    assert found.vote_radius == vote_radius(found.votes, 300, sigma=SIGMA, alpha=1e-3), "it has all of alpha"
    assert "majority vote" in found.meaning
    unit = nn.functional.normalize(features, dim=-1)
    assert not torch.equal(head(unit).argmax(1), votes), "the bias weighs otherwise at unit length"


def test_a_bias_can_change_the_answer_and_none_changes_nothing(call, image):
    head = linear()
    answer = certify(call, image, head).predicted
    with torch.no_grad():
        head.bias[(answer + 1) % 4] += 1e4
    moved = certify(call, image, head)
    assert (moved.predicted, moved.votes) == ((answer + 1) % 4, 300)

    with torch.no_grad():
        head.bias.zero_()
    assert certify(call, image, head) == certify(call, image, linear(bias=False))
    assert certify(call, image, head) == certify(call, image, head.weight.double())
    assert certify(call, image, head).feature_radius is not None


def test_a_classifiers_own_head_is_taken_where_none_is_given(call, image):
    head = replace(Head.of(linear()), labels=("cat", "dog", "newt", "owl"))
    own, given = certify(replace(call, head=head), image), certify(call, image, head)
    assert own == given
    assert own.label == head.labels[own.predicted]
    with pytest.raises(ModelError, match="no head of its own"):
        certify(call, image)


def test_heads_of_several_layers_are_one_affine_map():
    norm = nn.BatchNorm1d(WIDTH)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    layers = (nn.Sequential(nn.Flatten(), norm, nn.Dropout(), linear()), linear().requires_grad_(False))
    features = torch.randn(5, 2 * WIDTH)
    weight, bias = Head(layers, 2 * WIDTH, (slice(0, WIDTH), slice(WIDTH, None))).affine()
    layers[0].eval()
    wanted = (layers[0](features[:, :WIDTH]) + layers[1](features[:, WIDTH:])) / 2
    assert torch.allclose(features.double() @ weight.T + bias, wanted.double(), atol=1e-5)
    assert layers[1].weight.dtype == torch.float32, "the model's own layers are left alone"


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (Head((nn.Sequential(linear(), nn.ReLU()),), WIDTH), ModelError, "not affine"),
        (Head((linear().to("meta"),), WIDTH), ModelError, "quantised, sharded or offloaded"),
        (linear(classes=1), SettingError, "K >= 2"),
        (nn.Linear(WIDTH + 1, 3), SettingError, "must be"),
        (zeros(), SettingError, "equal or non-finite rows"),
    ],
)
def test_heads_of_which_nothing_is_proved_are_refused(call, image, head, error, message):
    with pytest.raises(error, match=message):
        certify(call, image, head)


def test_rows_of_another_bias_are_of_another_run(call, image, tmp_path):
    head, out = linear(), tmp_path / "predictions.jsonl"
    first = certify(call, image, head, out=out)
    assert certify(call, image, head, out=out) == first
    with torch.no_grad():
        head.bias += 0.1
    with pytest.raises(SettingError, match=r"other settings \(bias\)"):
        certify(call, image, head, out=out)


def test_sampling_with_a_bias_stops_where_the_target_is_reached(call, image):
    smoother = FeatureSmoother(call, psm=None, sigma=SIGMA)
    head = linear()
    with torch.no_grad():
        head.bias[2] += 1e4
    labels = Labels.among(smoother, Plan(n=800, target=SIGMA), head)
    (found,) = labels(image[0], key=b"key")
    assert found.n == 100
    assert labels.trial(10).bias is not None
