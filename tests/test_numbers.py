"""Numbers of numpy and torch, wherever a number is taken: the plain one's result to the bit, or a refusal in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import TinyEncoder, make_llava, make_psm, tiny_call

import fs_plugins
from fs_plugins import FeatureSmoother, FSPluginsError, PixelSpace
from fs_plugins.attacks import Ball, Search, ascend, attack, check_gradients, square
from fs_plugins.attacks.victim import Stream
from fs_plugins.certificates import Angular, Certificate, Plan, PredictionCertificate, certify_folder
from fs_plugins.certificates.bounds import Band
from fs_plugins.demo.settings import Settings as DemoSettings
from fs_plugins.evaluation import Settings as EvaluationSettings
from fs_plugins.evaluation import Setup
from fs_plugins.evaluation.judges import Endpoint
from fs_plugins.settings import build
from fs_plugins.training import Settings as TrainingSettings
from fs_plugins.training import Stage, TrainingConfig, robustness_score

WHOLE: dict[str, Callable[[Any], Any]] = {
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
    "uint64": np.uint64,
    "array": np.array,
    "tensor": torch.tensor,
    "int32 tensor": lambda value: torch.tensor(value, dtype=torch.int32),
}
REAL: dict[str, Callable[[Any], Any]] = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "longdouble": np.longdouble,
    "array": np.array,
    "float32 array": lambda value: np.array(value, np.float32),
    "tensor": torch.tensor,
    "float64 tensor": lambda value: torch.tensor(value, dtype=torch.float64),
    "bfloat16 tensor": lambda value: torch.tensor(value, dtype=torch.bfloat16),
    "tensor with a gradient": lambda value: torch.tensor(value, requires_grad=True),
    "fraction": Fraction,
}
NONE: dict[str, Any] = {
    "True": True,
    "False": False,
    "numpy's True": np.True_,
    "torch's True": torch.tensor(True),
    "NaN": float("nan"),
    "infinite": float("inf"),
    "numpy's NaN": np.float32("nan"),
    "torch's infinite": torch.tensor(float("-inf")),
    "complex": 1j,
    "numpy's complex": np.complex64(1),
    "torch's complex": torch.tensor(1j),
    "text": "one",
    "bytes": b"1",
    "list": [0.25],
    "array of one": np.array([0.25]),
    "tensor of one": torch.tensor([1]),
    "on meta": torch.empty((), device="meta"),
    "object": object(),
    "thousands of digits": 10**5000,
}


@dataclass(frozen=True)
class Place:
    """Somewhere that a number is taken: a value that fits, what comes of it, and what is taken beside numbers."""

    value: int | float
    result: Callable[[Any, Path], Any]
    takes: frozenset[str] = frozenset()

    @property
    def kinds(self) -> dict[str, Callable[[Any], Any]]:
        return WHOLE if isinstance(self.value, int) else REAL

    @property
    def refused(self) -> dict[str, Any]:
        parts = {"a part": 2.5, "numpy's whole float": np.float64(2)} if isinstance(self.value, int) else {}
        return {name: value for name, value in {**NONE, **parts}.items() if name not in self.takes}


SLOW = ("checked", "certified", "predicted", "enabled")
"""Of these every third kind is tried."""
FAR = frozenset({"infinite"})
"""At an infinite distance nothing is promised, which is no fault."""
MANY = frozenset({"list", "array of one", "tensor of one"})
WRITTEN = frozenset({"bytes", "numpy's whole float"})
"""Settings come out of files and from the command line, where a number is text."""


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def call():
    return tiny_call(TinyEncoder())


def smoother(**changes) -> FeatureSmoother:
    return FeatureSmoother(call(), **{"psm": None, "sigma": 0.5, "n0": 2, "seed": 3, **changes})


def smoothed(**changes):
    one = smoother(**changes)
    kept = (one.sigma, one.n0, one.chunk_size, one.source.seed)
    return one.smooth(rand(2, 3, 8, 8))["tokens"].tolist(), json.dumps(kept), repr(one)


def enabled(**changes):
    model = make_llava()
    with fs_plugins.enable(model, **{"psm": None, "sigma": 0.5, "n0": 2, "seed": 3, **changes}) as handle:
        pixels = fs_plugins.vision_call(model).pixels.from_unit(rand(1, 3, 16, 16), torch.float32)
        (told,) = asdict(handle.status())["vision"]
        del told["seconds"]
        return model.get_image_features(pixels)[0].tolist(), json.dumps(told)


def certified(folder: Path, **changes):
    settings = {"psm": None, "sigma": 0.5, "n": 20, "seed": 3, "alpha": 0.125, "out": folder / "rows.jsonl", **changes}
    (folder / "rows.jsonl").unlink(missing_ok=True)
    made = [fs_plugins.certify(call(), rand(1, 3, 8, 8), **settings) for _ in range(2)]  # the second reads the file
    assert made[0] == made[1]
    return [one.to_json() for one in made[0]], (folder / "rows.jsonl").read_text("utf-8")


def predicted(folder: Path, **changes):
    settings = {"psm": None, "sigma": 0.5, "n": 20, "seed": 3, "alpha": 0.125, "out": folder / "rows.jsonl", **changes}
    (folder / "rows.jsonl").unlink(missing_ok=True)
    made = [fs_plugins.certify_predictions(call(), rand(1, 3, 8, 8), torch.eye(24)[:3], **settings) for _ in range(2)]
    assert made[0] == made[1]
    return [one.to_json() for one in made[0]], (folder / "rows.jsonl").read_text("utf-8")


def folder_of(out: Path, **changes):
    (out / "certificates.jsonl").unlink(missing_ok=True)
    plan = Plan(n=20, alpha=0.125)
    made = certify_folder(smoother(), {"a": rand(3, 8, 8)}, out, plan=plan, **changes)
    return made["a"].to_json(), (out / "certificates.jsonl").read_text("utf-8")


SCORES = np.linspace(0.5, 1, 40)


def certificate(**changes):
    settings = {"sigma": 0.5, "alpha": 0.125, "share": 0.5, "unrelated": 0.25, **changes}
    made = Certificate.from_scores(SCORES, **settings)
    assert Certificate.from_json(made.to_json()) == made
    return made.to_json(), made.radius(0.25), str(made)


def plugin_certificate(**changes):
    settings = {
        "sigma": 0.5,
        "n": 9,
        "alpha": 0.125,
        "mean": 0.75,
        "non_finite": 1,
        "image_shape": (3, 8, 8),
        **changes,
    }
    made = Certificate(method="plugin", **settings)
    assert Certificate.from_json(made.to_json()) == made
    return made.to_json(), made.linf_radius()


def prediction(**changes):
    settings = {"predicted": 1, "sigma": 0.5, "alpha": 0.125, "share": 0.5, "votes": 38, **changes}
    made = PredictionCertificate.from_draws(settings.pop("votes"), np.stack([SCORES] * 2, axis=1), **settings)
    assert PredictionCertificate.from_json(made.to_json()) == made
    return made.to_json(), made.radius, str(made)


def angular(**changes):
    return json.dumps(asdict(Angular(**{"t0": 0.5, "count": 8, "norm": 0.25, "n": 10, **changes})))


def attacked(**changes):
    settings = {"eps": 0.25, "step_size": 0.125, "steps": 3, "draws": 2, "seed": 3, "batch_size": 2, **changes}
    return attack(smoother(), rand(3, 3, 8, 8), rand(3, 3, 8, 8, seed=1), **settings).tolist()


def checked(**changes):
    settings = {"eps": 0.25, "steps": 1, "draws": 1, "queries": 1, "seed": 3, "batch_size": 2, "confidence": 0.75}
    found = check_gradients(smoother(), rand(2, 3, 8, 8), rand(2, 3, 8, 8, seed=1), **{**settings, **changes})
    return str(found), json.dumps(asdict(found))


def climbed(**changes):
    settings = {"steps": 3, "draws": 2, "step_size": 0.125, **changes}
    return ascend(lambda x, *_: x.flatten(1).sum(1), rand(2, 3, 4, 4), ball=Ball("linf", 0.25), **settings).tolist()


def searched(**changes):
    settings = {"eps": 0.25, "queries": 5, "draws": 1, "area": 0.5, "stream": Stream((1,), (0, 1)), **changes}
    return square(lambda x, *_: x.flatten(1).sum(1), rand(2, 3, 4, 4), **settings).tolist()


def plain(made: object, **changes: Any) -> str:
    """What is kept is what JSON can say."""
    return json.dumps(asdict(made), default=str) + repr(made)  # type: ignore[call-overload]


def settings(kind: type, **given: Any) -> dict[str, Place]:
    return {
        f"{kind.__module__}: {name}": Place(value, lambda v, folder, name=name: plain(build(kind, {name: v})), WRITTEN)
        for name, value in given.items()
    }


def space(**changes):
    made = PixelSpace(**{"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), **changes})
    return json.dumps((made.mean, made.std))


def endpoint(**changes):
    made = Endpoint("http://127.0.0.1:9", "m", api_key="", **changes)
    return repr((made.timeout, made.retries, made.parallel))


def place(function: Callable[..., Any], **given: Any) -> dict[str, Place]:
    """Places of one function by the names of its arguments, with a value that fits each."""
    return {
        f"{function.__name__}: {name}": Place(value, lambda v, folder, name=name: function(**{name: v}))
        for name, value in given.items()
    }


def filed(function: Callable[..., Any], **given: Any) -> dict[str, Place]:
    """The same of a function that writes a file."""
    return {
        f"{function.__name__}: {name}": Place(value, lambda v, folder, name=name: function(folder, **{name: v}))
        for name, value in given.items()
    }


def score(**changes) -> float:
    return robustness_score(call(), None, rand(2, 3, 8, 8), **{"sigma": 0.5, "draws": 2, "seed": 3, **changes})


def stage(**changes) -> str:
    return plain(Stage(**{"steps": 4, **changes}))


def config(**changes) -> str:
    made = TrainingConfig(**changes)
    return json.dumps(made.as_json()) + repr(made.sigmas)


def setup(**changes) -> str:
    return plain(Setup(**changes))


def plan(**changes) -> str:
    return plain(Plan(**changes))


def search(**changes) -> str:
    return plain(Search(**{"ball": Ball(), "steps": 4, **changes}))


def choice(**changes) -> str:
    (one,) = fs_plugins.smoothers(call(), **{"psm": None, "sigma": 0.5, **changes})
    return json.dumps((one.sigma, one.n0, one.chunk_size, one.source.seed))


PSM = make_psm(call(), sigma=0.5, mapper=False)


def of_psm(**changes) -> str:
    (found,) = fs_plugins.smoothers(call(), psm=PSM, **{"seed": 1, **changes})
    return json.dumps(found.smooth(rand(1, 3, 8, 8))["tokens"].tolist())


BAND = Certificate.from_scores(SCORES, sigma=0.5, alpha=0.125)

PLACES = {
    **place(smoothed, sigma=0.25, n0=3, chunk_size=2, seed=5),
    **place(enabled, sigma=0.25, n0=3, chunk_size=2, seed=5),
    **place(choice, sigma=0.25, n0=3, chunk_size=2, seed=5),
    **place(of_psm, sigma=0.5),
    **filed(certified, n=30, alpha=0.25, target=0.125, threshold=0.25, sigma=0.25, seed=5, chunk_size=7, encoder=0),
    **filed(predicted, n=30, alpha=0.25, target=0.125, sigma=0.25, seed=5, chunk_size=7, encoder=0),
    **filed(folder_of, seed=5),
    **place(plan, n=30, alpha=0.25, target=0.125, threshold=0.25),
    **place(certificate, sigma=0.25, alpha=0.25, share=0.25, unrelated=0.125),
    **place(plugin_certificate, sigma=0.25, n=8, alpha=0.25, mean=0.5, non_finite=2),
    **place(prediction, sigma=0.25, alpha=0.25, share=0.25, predicted=0, votes=39),
    **place(angular, t0=0.25, count=9, norm=0.125, n=20),
    "an image's shape": Place(6, lambda v, folder: plugin_certificate(image_shape=(3, v, v))),
    "an encoder's fingerprint": Place(0.25, lambda v, folder: certificate(encoder=(v, 1.0))),
    "a band": Place(0.25, lambda v, folder: plain(Band((v, 0.5), (0.5, v)))),
    "a certificate's radius": Place(0.25, lambda v, folder: BAND.radius(v)),
    "a certificate's distance": Place(0.25, lambda v, folder: BAND.fcsb(v), FAR),
    "a certificate's curve": Place(0.25, lambda v, folder: float(BAND.curve(v)), FAR | MANY),
    "served: distance": Place(0.25, lambda v, folder: BAND.served_fcsb(v, 2, 0.25), FAR),
    "served: draws": Place(3, lambda v, folder: BAND.served_fcsb(0.25, v, 0.25)),
    "served: chance": Place(0.25, lambda v, folder: BAND.served_fcsb(0.25, 2, v)),
    **place(attacked, eps=0.125, step_size=0.0625, steps=2, draws=1, seed=5, batch_size=3),
    **place(checked, eps=0.125, steps=2, draws=2, queries=2, seed=5, batch_size=1, confidence=0.5),
    **place(climbed, steps=2, draws=1, step_size=0.0625),
    **place(searched, eps=0.125, queries=4, draws=2, area=0.25),
    **place(search, steps=5, draws=2, step_size=0.125),
    "a ball": Place(0.25, lambda v, folder: plain(Ball("linf", v))),
    "an l2 ball": Place(2.5, lambda v, folder: plain(Ball("l2", v))),
    **place(stage, steps=5, batch_size=2, draws=3, lr=0.25, warmup=4, ema=0.5, accumulate=2),
    **place(config, sigma=0.5, lambda1=0.5, lambda2=0.5, lambda3=0.5, lambda4=0.5, lambda_diff=0.5, seed=5),
    "a range of sigmas": Place(0.125, lambda v, folder: config(sigma_range=(v, 0.5))),
    **place(score, sigma=0.25, draws=3, seed=5),
    **place(setup, steps=5, adaptive_images=2, sigma=0.25, n0=3, certified_draws=20, seed=5, robust_images=3),
    **settings(TrainingSettings, seed=5, steps=6, n=7, scenes=8, lora=9, sigma=0.25, lr=0.5, ema=0.5, alpha=0.25),
    "a range of sigmas to train": Place(
        0.25, lambda v, folder: plain(build(TrainingSettings, {"sigma_range": (v, 0.5)})), WRITTEN
    ),
    **settings(EvaluationSettings, seed=5, images=6, n0=7, steps=8, sigma=0.25),
    **settings(DemoSettings, seed=50, images=60, n0=70, draws=80),
    "a mean": Place(0.25, lambda v, folder: space(mean=(v, 0.5, 0.5))),
    "a std": Place(0.5, lambda v, folder: space(std=(v, 0.25, 0.25))),
    "the number of an encoder": Place(
        0, lambda v, folder: type(fs_plugins.vision_call(make_llava(), encoder=v).module).__name__
    ),
    **place(endpoint, timeout=0.5, retries=3, parallel=2),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_every_kind_of_number_gives_what_the_plain_one_gives(name, tmp_path):
    one = PLACES[name]
    wanted = one.result(one.value, tmp_path)
    for kind, make in list(one.kinds.items())[:: 3 if name.startswith(SLOW) else 1]:
        assert one.result(make(one.value), tmp_path) == wanted, kind


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_number_is_refused_in_words(name, tmp_path):
    one = PLACES[name]
    for kind, value in one.refused.items():
        with pytest.raises(FSPluginsError) as error:
            pytest.fail(f"{kind} was taken: {one.result(value, tmp_path)!r:.200}")
        assert len(str(error.value)) > 20, kind


def test_arrays_of_channels_make_a_pixel_space():
    for make in (np.array, torch.tensor, list):
        made = PixelSpace(make([0.5, 0.25, 0.75]), make([0.25, 0.5, 0.125]))
        assert (made.mean, made.std) == ((0.5, 0.25, 0.75), (0.25, 0.5, 0.125))
        assert {type(value) for value in (*made.mean, *made.std)} == {float}


def test_many_distances_come_as_any_array():
    wanted = BAND.curve([0.0, 0.25, 0.5])
    for make in (tuple, np.array, torch.tensor, lambda values: torch.tensor(values, dtype=torch.bfloat16)):
        assert np.array_equal(BAND.curve(make([0.0, 0.25, 0.5])), wanted, equal_nan=True)
