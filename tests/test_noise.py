from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fs_plugins.noise import NoiseSource, draws


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 9), st.integers(0, 100))
def test_antithetic_draws_come_in_exact_pairs_and_an_odd_count_ends_unpaired(count, seed):
    got = list(draws(generator(seed), (2, 3), "antithetic", count))
    assert len(got) == count
    for one, other in zip(got[::2], got[1::2], strict=False):
        assert torch.equal(one, -other)
    fresh = list(draws(generator(seed), (2, 3), "iid", (count + 1) // 2))
    assert all(torch.equal(one, other) for one, other in zip(got[::2], fresh, strict=True))


@pytest.mark.parametrize("kind", ["iid", "antithetic"])
def test_draws_are_standard_normal(kind):
    got = torch.stack(list(draws(generator(), (1000,), kind, 64)))
    assert abs(got.mean()) < 0.02
    assert abs(got.std() - 1) < 0.02
    assert abs(got.pow(4).mean() - 3) < 0.2


def first_draws(source: NoiseSource, images: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.randn(4, generator=g) for g in source.generators(images)])


def test_call_scope_is_fresh_at_every_call_and_for_every_image():
    images = torch.zeros(3, 1, 2, 2)
    source = NoiseSource("call")
    got = torch.cat(
        [first_draws(source, images), first_draws(source, images), first_draws(NoiseSource("call"), images)]
    )
    assert len({tuple(row.tolist()) for row in got}) == 9


def test_torch_manual_seed_does_not_control_unseeded_noise():
    images = torch.zeros(1, 1, 2, 2)
    torch.manual_seed(0)
    one = first_draws(NoiseSource(), images)
    torch.manual_seed(0)
    assert not torch.equal(one, first_draws(NoiseSource(), images))


def test_a_seed_reproduces_the_sequence_of_calls():
    images = torch.zeros(2, 1, 2, 2)
    one, other = NoiseSource(seed=5), NoiseSource(seed=5)
    for _ in range(3):
        assert torch.equal(first_draws(one, images), first_draws(other, images))
    assert not torch.equal(first_draws(NoiseSource(seed=6), images), first_draws(NoiseSource(seed=5), images))


def test_image_scope_follows_content_and_key_wherever_the_image_stands():
    images = torch.rand(3, 1, 2, 2)
    source = NoiseSource("image")
    got = first_draws(source, images)
    assert torch.equal(first_draws(source, images.flip(0)).flip(0), got)
    assert torch.equal(first_draws(source, images[1:2])[0], got[1])
    assert not torch.equal(first_draws(NoiseSource("image"), images), got)
    assert torch.equal(
        first_draws(NoiseSource("image", seed=1), images), first_draws(NoiseSource("image", seed=1), images)
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_share_a_seed_but_never_a_secret_key(duplicate):
    images = torch.rand(2, 1, 2, 2)
    seeded, secret = NoiseSource("image", seed=1), NoiseSource("image")
    assert torch.equal(first_draws(duplicate(seeded), images), first_draws(seeded, images))
    assert not torch.equal(first_draws(duplicate(secret), images), first_draws(secret, images))


def test_processes_that_share_a_key_draw_the_same_noise_for_what_all_of_them_have():
    one, other = (NoiseSource(key=b"secret") for _ in range(2))
    images = torch.rand(3, 3, 4, 4)
    first = first_draws(one, images)
    assert torch.equal(first, first_draws(other, images))
    assert torch.equal(first_draws(one, images), first_draws(other, images))
    assert not torch.equal(first, first_draws(one, images)), "calls are fresh"
    assert not torch.equal(first_draws(NoiseSource(key=b"other"), images), first)


def test_processes_that_share_a_key_draw_other_noise_for_images_of_their_own():
    one, other = (NoiseSource(key=b"secret") for _ in range(2))
    assert not torch.equal(first_draws(one, torch.zeros(1, 3, 4, 4)), first_draws(other, torch.ones(1, 3, 4, 4)))
    with_seed = (first_draws(NoiseSource(seed=0), torch.full((1, 3, 4, 4), value)) for value in (0.0, 1.0))
    assert torch.equal(*with_seed), "a seed alone does not look at the images"
