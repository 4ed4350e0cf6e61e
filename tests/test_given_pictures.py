"""Pictures as programs hold them, in every verb that looks at some: one result, or a refusal in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import TinyEncoder, tiny_call

import fs_plugins
from fs_plugins import FeatureSmoother, SettingError
from fs_plugins.attacks import attack, check_gradients
from fs_plugins.certificates import Plan, certify_folder
from fs_plugins.pictures import to_unit
from fs_plugins.training import Stage, TrainingConfig, robustness_score, train_psm

BYTES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(one) for one in BYTES]
UNIT = torch.from_numpy(BYTES).permute(0, 3, 1, 2).float() / 255
"""The same pictures as (2, 3, 8, 8) in [0, 1]."""
OTHERS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def smoother() -> FeatureSmoother:
    return FeatureSmoother(tiny_call(TinyEncoder()), psm=None, sigma=0.5, n0=2, seed=3)


def certified(pictures: Any, folder: Path) -> Any:
    made = fs_plugins.certify(smoother(), pictures, n=20, alpha=0.1, seed=3, background=OTHERS)
    return [one.to_json() for one in made]


def beside_a_background(pictures: Any, folder: Path) -> Any:
    made = fs_plugins.certify(smoother(), OTHERS, n=20, alpha=0.1, seed=3, background=pictures)
    return [one.to_json() for one in made]


def predicted(pictures: Any, folder: Path) -> Any:
    made = fs_plugins.certify_predictions(smoother(), pictures, torch.eye(24)[:3], n=20, alpha=0.1, seed=3)
    return [one.to_json() for one in made]


def in_a_folder(pictures: Any, folder: Path) -> Any:
    return [one.to_json() for one in certify_folder(smoother(), pictures, folder, plan=Plan(n=20), seed=3).values()]


def attacked(pictures: Any, folder: Path) -> Any:
    return attack(smoother(), pictures, eps=0.25, steps=2).tolist()


def aimed(pictures: Any, folder: Path) -> Any:
    return attack(smoother(), OTHERS[: len(pictures) if isinstance(pictures, list) else 2], pictures, steps=2).tolist()


def checked(pictures: Any, folder: Path) -> Any:
    return str(check_gradients(smoother(), pictures, OTHERS, steps=1, queries=1))


def checked_against(pictures: Any, folder: Path) -> Any:
    return str(check_gradients(smoother(), OTHERS, pictures, steps=1, queries=1))


def scored(pictures: Any, folder: Path) -> Any:
    return robustness_score(tiny_call(TinyEncoder()), None, pictures, 0.5, draws=2)


def smoothed(pictures: Any, folder: Path) -> Any:
    return smoother().smooth(pictures)["tokens"].tolist()


def encoded(pictures: Any, folder: Path) -> Any:
    return tiny_call(TinyEncoder()).encode(pictures)["tokens"].tolist()


BATCHES: list[Callable[[Any, Path], Any]] = [attacked, aimed, checked, checked_against, scored, smoothed, encoded]
SEVERAL: list[Callable[[Any, Path], Any]] = [certified, beside_a_background, predicted, in_a_folder]
"""Verbs that look at one picture after the other."""

BIG = UNIT.numpy().astype(">f4")
HELD: dict[str, Any] = {
    "a tensor": UNIT,
    "an array": UNIT.numpy(),
    "an array of the other byte order": BIG,
    "an array that cannot be written": np.frombuffer(UNIT.numpy().tobytes(), np.float32).reshape(2, 3, 8, 8),
    "a view with steps backwards": np.ascontiguousarray(UNIT.numpy()[..., ::-1])[..., ::-1],
    "PIL images": PICTURES,
    "a tuple of PIL images": tuple(PICTURES),
    "a list of tensors": list(UNIT),
    "a list of arrays": list(UNIT.numpy()),
    "a mixed list": [PICTURES[0], UNIT[1].numpy()],
    "PIL images with an alpha": [one.convert("RGBA") for one in PICTURES],
}


def given(verb: Callable, pictures: Any) -> Any:
    """A folder's pictures have names."""
    return dict(zip("ab", pictures, strict=True)) if verb is in_a_folder and len(pictures) == 2 else pictures


@pytest.mark.parametrize("verb", [*SEVERAL, *BATCHES], ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("held", HELD)
def test_pictures_are_the_same_however_they_are_held(verb, held, tmp_path):
    wanted = verb(given(verb, UNIT), tmp_path / "wanted")
    assert verb(given(verb, HELD[held]), tmp_path / "found") == wanted


@pytest.mark.parametrize("verb", [certified, predicted], ids=lambda verb: verb.__name__)
def test_names_may_have_pictures_of_any_kind(verb, tmp_path):
    wanted = verb({"a": UNIT[0], "b": UNIT[1]}, tmp_path)
    assert verb({"a": PICTURES[0], "b": UNIT[1].numpy()}, tmp_path) == wanted
    assert len(wanted) == 2


@pytest.mark.parametrize("verb", [certified, predicted, attacked, scored, smoothed, encoded], ids=lambda v: v.__name__)
def test_a_pil_image_is_one_picture(verb, tmp_path):
    assert verb(PICTURES[0], tmp_path) == verb(UNIT[:1], tmp_path)


WRONG: dict[str, tuple[Any, str]] = {
    "bytes of a tensor": ((UNIT * 255).to(torch.uint8), "uint8. Divide 0 to 255 by 255, or give PIL images"),
    "bytes of an array": ((UNIT * 255).to(torch.uint8).numpy(), "uint8. Divide 0 to 255 by 255, or give PIL images"),
    "0 to 255": (UNIT * 255, "Divide 0 to 255 by 255"),
    "0 to 255 in an array": ((UNIT * 255).numpy(), "Divide 0 to 255 by 255"),
    "normalised": ((UNIT - 0.5) / 0.25, "Undo the model's normalisation"),
    "normalised in an array": (((UNIT - 0.5) / 0.25).numpy(), "Undo the model's normalisation"),
    "NaN": (UNIT.index_fill(3, torch.tensor([2]), float("nan")), "no numbers, or infinite"),
    "infinite": (UNIT.index_fill(3, torch.tensor([2]), float("inf")).numpy(), "no numbers, or infinite"),
    "truth values": (UNIT > 0.5, "got bool"),
    "complex": (UNIT.to(torch.complex64), "got complex64"),
    "objects": (UNIT.numpy().astype(object), "got an array of object"),
    "words": (np.array([["a", "b"]]), "got an array of <U1"),
    "one channel": (UNIT[:, :1], r"got \("),
    "channels last": (UNIT.permute(0, 2, 3, 1), "Channels come before height and width"),
    "channels last in an array": (UNIT.permute(0, 2, 3, 1).numpy(), "Channels come before height and width"),
    "several dimensions": (UNIT[None], r"got \("),
    "a path": ("a.png", "PIL.Image.open"),
    "a list of paths": (["a.png", Path("b.png")], "PIL.Image.open"),
    "bytes": (b"\x89PNG", "PIL.Image.open"),
    "a number": (5, "must be a tensor or a numpy array"),
    "nothing": (None, "must be a tensor or a numpy array"),
    "a list of numbers": ([1, 2], "must be a tensor or a numpy array"),
}
TENSORS_ALONE = (smoothed, encoded)
"""Tensors pass through these unchecked: attack libraries step out of [0, 1] before they clip."""


@pytest.mark.parametrize("verb", [*SEVERAL, *BATCHES], ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("held", WRONG)
def test_what_is_no_picture_is_refused_in_words(verb, held, tmp_path):
    pictures, words = WRONG[held]
    if verb in TENSORS_ALONE and isinstance(pictures, torch.Tensor):
        pytest.skip("tensors are not checked")
    if verb in (beside_a_background, aimed) and pictures is None:
        pytest.skip("neither a background nor a target is no fault")
    with pytest.raises(SettingError, match=words):
        verb(given(verb, pictures) if hasattr(pictures, "__len__") else pictures, tmp_path)


@pytest.mark.parametrize("verb", BATCHES, ids=lambda verb: verb.__name__)
def test_pictures_of_several_sizes_make_no_batch(verb, tmp_path):
    with pytest.raises(SettingError, match=r"pictures of one size, got \(3, 8, 8\), \(3, 8, 9\)"):
        verb([PICTURES[0], PICTURES[1].resize((9, 8))], tmp_path)


@pytest.mark.parametrize("verb", [certified, predicted], ids=lambda verb: verb.__name__)
def test_a_picture_of_another_size_than_the_encoders_is_refused(verb, tmp_path):
    with pytest.raises(SettingError, match=r"Image 1 must be \(3, 8, 8\).* got \(3, 8, 9\)"):
        verb([PICTURES[0], PICTURES[1].resize((9, 8))], tmp_path)


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (PICTURES[0], "the first is a Image.*ImageFolder"),
        (UNIT[0].numpy(), "the first is a ndarray"),
        ((UNIT[0], 1), "the first is a tuple"),
        ((UNIT[0] * 255).to(torch.uint8), "uint8. Divide 0 to 255 by 255"),
        (UNIT[0] * 255, "Divide 0 to 255 by 255"),
        (UNIT[0].permute(1, 2, 0), "Channels come before height and width"),
        (UNIT, r"must be \(C, H, W\)"),
    ],
)
def test_what_is_no_training_picture_is_refused_in_words(first, words):
    config = TrainingConfig(sigma=0.5, purifier_stage=Stage(1, batch_size=1), mapper_stage=Stage(1, batch_size=1))
    with pytest.raises(SettingError, match=words):
        train_psm(tiny_call(TinyEncoder()), [first, first], config, name="n", encoder="e")


def test_gradients_follow_a_tensor_of_pictures():
    images = UNIT.clone().requires_grad_(True)
    smoother().smooth(images)["tokens"].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_an_array_is_copied_and_its_type_kept():
    one = UNIT.numpy().astype(np.float64)
    moved = attack(smoother(), one, eps=0.25, steps=2)
    assert moved.dtype == torch.float64
    assert np.array_equal(one, UNIT.numpy().astype(np.float64))


@pytest.mark.parametrize(
    "directions",
    [
        torch.eye(24)[:3],
        np.eye(24)[:3],
        np.eye(24, dtype=np.float32)[:3].tolist(),
        list(torch.eye(24)[:3]),
        {"0": np.eye(24)[0], "1": np.eye(24)[1], "2": np.eye(24)[2]},
    ],
    ids=lambda value: type(value).__name__,
)
def test_directions_are_the_same_however_they_are_held(directions):
    options = {"n": 20, "alpha": 0.1, "seed": 3}
    (wanted,) = fs_plugins.certify_predictions(smoother(), UNIT[:1], torch.eye(24)[:3], **options)
    (found,) = fs_plugins.certify_predictions(smoother(), UNIT[:1], directions, **options)
    assert (found.predicted, found.votes, found.radius) == (wanted.predicted, wanted.votes, wanted.radius)


@pytest.mark.parametrize(
    "directions", ["ab", ["a", "b"], [PICTURES[0], PICTURES[1]], 5, torch.eye(24)[:3] * 1j, {"a": "b", "c": "d"}]
)
def test_what_is_no_direction_is_refused_in_words(directions):
    with pytest.raises(SettingError, match="directions must be"):
        fs_plugins.certify_predictions(smoother(), UNIT[:1], directions, n=20)


def test_right_values():
    assert torch.equal(torch.stack([to_unit(one) for one in PICTURES]), UNIT)
