"""What every adapter owes, as tests. Needs pytest (``pip install "fs-plugins[testing]"``)."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fs_plugins
from fs_plugins import PSM, FeatureSmoother, PixelError, VisionCall, registry
from fs_plugins.identity import fingerprint
from fs_plugins.noise import normal, uniform
from fs_plugins.outputs import map_tensors
from fs_plugins.patch import named_arguments
from fs_plugins.plugins import claim
from fs_plugins.probing import hooked, kept, probe
from fs_plugins.psm import Part, PSMConfig, ReadoutSpec
from fs_plugins.vision import Features, direct

SIGMA = 0.25


class AdapterConformance:
    """Subclass it in a test module, fill in ``make_model`` and ``make_inputs``, and run pytest.

    ``make_inputs`` gets images in [0, 1] and must normalise them as the framework really does, not by way of
    the adapter: that is how a wrong mean, std or patch order is found. It must be differentiable.

    Attributes:
        adapter: entry-point name of the adapter that must claim the model; None to accept any.
        image_size: (H, W) of the images that ``make_inputs`` is given: the encoder's own resolution.
        images: how many images a test uses at once.
        shown_whole: whether the encoder sees each image as it is; False where tiles or frames are made of it.
        calls_per_generate: how often one ``generate`` runs the vision module.
        expected_failures: test name -> reason; each must really fail, so that a mended cause is noticed.
        not_run: test name -> reason, for what fails now and then.
        tolerance: relative, of results that agree up to rounding.
        kinks: whether the encoder is not smooth, as with ReLU: its gradients are then checked by smaller steps, for
            which it must run in float64 too.
    """

    # Small models have no processor beside them, and ``make_inputs`` is what the adapter's own constants are held to.
    pytestmark = pytest.mark.filterwarnings("ignore:Nobody knows how this model's pixels:fs_plugins.FSPluginsWarning")

    adapter: str | None = None
    image_size: tuple[int, int] = (32, 32)
    images: int = 2
    shown_whole: bool = True
    calls_per_generate: int = 1
    expected_failures: ClassVar[Mapping[str, str]] = {}
    not_run: ClassVar[Mapping[str, str]] = {}
    tolerance: float = 1e-4
    kinks: bool = False

    def make_model(self) -> nn.Module:
        """A new small model of the real class, in eval mode, whose weights let the image matter."""
        raise NotImplementedError("An adapter's test class says make_model.")

    def make_inputs(self, model: nn.Module, images: Tensor) -> dict[str, Any]:
        """(B, 3, H, W) images in [0, 1] -> keyword arguments of the model, normalised by the framework's rule."""
        raise NotImplementedError("An adapter's test class says make_inputs.")

    def outcome(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """What the images do to the model's answer; by default its logits."""
        return model(**inputs).logits

    def generate(self, model: Any, inputs: dict[str, Any]) -> Any:
        """A short generation, or None (the default) for models that do not generate."""
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        marks = {name: pytest.mark.xfail(reason=reason, strict=True) for name, reason in cls.expected_failures.items()}
        marks |= {name: pytest.mark.skip(reason=reason) for name, reason in cls.not_run.items()}
        for name, mark in marks.items():
            test = getattr(cls, name, None)
            if not name.startswith("test_") or test is None:
                raise TypeError(f"{cls.__name__} expects {name!r} to fail, which is no test of the kit.")
            own = functools.wraps(test)(types.FunctionType(test.__code__, test.__globals__, name, test.__defaults__))
            setattr(cls, name, mark(own))

    # What it is.

    def test_exactly_one_adapter_claims_the_model(self) -> None:
        model = self.make_model()
        name, calls = claim(model)
        assert self.adapter in (None, name)
        modules = list(model.modules())
        for call in calls:
            assert any(call.module is module for module in modules), "the vision module is not inside the model"
            assert call.readouts, "an adapter names what is consumed"

    def test_claiming_leaves_the_model_alone(self) -> None:
        model, images = self._model_and_images()
        before = self._outcome(model, images)
        claim(model)
        assert torch.equal(self._outcome(model, images), before)

    # Identity and restoring.

    def test_sigma_zero_is_bit_for_bit_the_model(self) -> None:
        model, images = self._model_and_images()
        before = self._outcome(model, images)
        with fs_plugins.enable(model, psm=None, sigma=0):
            assert torch.equal(self._outcome(model, images), before)

    def test_the_full_path_without_noise_agrees_up_to_rounding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, images = self._model_and_images()
        before = self._outcome(model, images)
        monkeypatch.setattr(FeatureSmoother, "is_identity", False)
        with fs_plugins.enable(model, psm=None, sigma=0, n0=3) as handle:
            self._agree(self._outcome(model, images), before)
            assert sum(v.draws for v in handle.status().vision) >= 3 * self.images, "the full path was not taken"

    def test_disabling_restores_bit_for_bit_and_leaves_no_trace(self) -> None:
        model, images = self._model_and_images()
        before, keys, hooks = self._outcome(model, images), list(model.state_dict()), _hooks(model)
        with fs_plugins.enable(model, psm=None, sigma=SIGMA):
            assert not torch.equal(self._outcome(model, images), before)
            assert list(model.state_dict()) == keys
        assert torch.equal(self._outcome(model, images), before)
        assert _hooks(model) == hooks

    def test_enable_needs_nothing_but_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An encoder without a PSM of its own gets the registry's purifier of photographs."""
        monkeypatch.setenv(registry.USER, os.devnull)
        model, images = self._model_and_images()
        before = self._outcome(model, images)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fs_plugins.FSPluginsWarning)
            handle = fs_plugins.enable(model)
        with handle:
            after = self._outcome(model, images)
            assert after.isfinite().all()
            assert not torch.equal(after, before)
            vision = handle.status().vision
            assert all(v.psm for v in vision)
            assert any(v.calls for v in vision)

    def test_an_exception_inside_the_encoder_leaves_everything_in_order(self) -> None:
        model, images = self._model_and_images()
        before = self._outcome(model, images)
        handle = fs_plugins.enable(model, psm=None, sigma=SIGMA)
        parts = [part for call in claim(model)[1] for part in call.module.modules() if part is not call.module]
        assert parts, "a vision module without parts cannot fail inside"
        bombs = [part.register_forward_pre_hook(_fail) for part in parts]
        with pytest.raises(ZeroDivisionError), torch.enable_grad():
            self.outcome(model, self._inputs(model, images.requires_grad_(True)))
        assert torch.is_grad_enabled(), "the framework's gradient mode leaked out"
        for bomb in bombs:
            bomb.remove()
        assert not torch.equal(self._outcome(model, images), before)
        handle.disable()
        assert torch.equal(self._outcome(model, images), before)

    # What the encoder is shown.

    def test_pixels_are_images_in_unit_range(self) -> None:
        model, images = self._model_and_images()
        calls = self._calls(model, images)
        assert calls, "no vision module was called with pixels"
        for call in calls:
            shown = self._shown(model, call, images)
            frames = torch.cat([frame.flatten(0, -4) for frame in shown])
            assert frames.min() > -0.01, "mean and std do not bring the pixels back to [0, 1]"
            assert frames.max() < 1.01, "mean and std do not bring the pixels back to [0, 1]"
            if self.shown_whole:
                for image in images:
                    alike = [frame for frame in frames if frame.shape == image.shape]
                    nearest = min((float((frame - image).abs().max()) for frame in alike), default=1.0)
                    assert nearest < 1e-3, f"no image that the encoder sees is the one given; off by {nearest:.3f}"

    def test_noise_has_standard_deviation_sigma_in_unit_pixels(self) -> None:
        model, images = self._model_and_images()
        calls = self._calls(model, images)
        clean = {id(call): self._shown(model, call, images) for call in calls}
        numbers = 3 * self.image_size[0] * self.image_size[1] * self.images
        n0 = max(2, 30_000 // numbers)
        for call in calls:
            with fs_plugins.enable(model, psm=None, sigma=SIGMA, n0=n0, noise="iid", seed=0, chunk_size=10_000):
                noisy = self._shown(model, call, images)
            for quiet, loud in zip(clean[id(call)], noisy, strict=True):
                noise = loud - quiet.repeat(n0, *[1] * (quiet.ndim - 1))
                assert abs(float(noise.std()) - SIGMA) < 0.03 * SIGMA
                assert abs(float(noise.mean())) < 0.03 * SIGMA
                for channel in range(noise.shape[-3]):
                    assert abs(float(noise[..., channel, :, :].std()) - SIGMA) < 0.06 * SIGMA
                assert loud.min() < -0.2, "noise must not be clamped before the encoder"

    # What is served.

    def test_what_is_consumed_is_the_smoothed_feature(self) -> None:
        model, images = self._model_and_images()
        for call in self._calls(model, images):
            with fs_plugins.enable(model, psm=None, sigma=SIGMA, n0=3, seed=1, chunk_size=10_000):
                arguments: list[Any] = []
                outputs: list[Any] = []
                with _watching(call.module, arguments, outputs):
                    self._outcome(model, images)
            args, kwargs = arguments[0]
            with torch.no_grad(), direct():
                raw = call.module(*args, **kwargs)
            layout = call.pixels.layout
            count = self._units(call, args, kwargs) // 3
            each = _unit_mean(call, call.features(layout.opened(raw, 3 * count)), 3)
            served = call.features(layout.opened(outputs[0], count))
            for name, value in served.items():
                self._agree(value, each[name])

    def test_nothing_but_the_readouts_reaches_the_language_side(self) -> None:
        """Two pictures, one's readouts put in the other's place: the answer must be the one's."""
        model, images = self._model_and_images()
        one, other = self._inputs(model, images), self._inputs(model, 1 - images.flip(-1))
        probe(model, one, other, outcome=self.outcome, tolerance=self.tolerance)

    def test_every_readout_matters(self) -> None:
        model, images = self._model_and_images()
        before = self._outcome(model, images)
        for call in self._calls(model, images):
            for readout in call.readouts:
                with hooked([(call.module, _perturb(call, readout))]):
                    assert not torch.allclose(self._outcome(model, images), before, atol=1e-5), readout.name

    def test_encoding_images_directly_gives_the_models_features(self) -> None:
        model, images = self._model_and_images()
        if not self.shown_whole:
            pytest.skip("the encoder is not shown the images as they are")
        for call in self._calls(model, images):
            arguments: list[Any] = []
            outputs: list[Any] = []
            with _watching(call.module, arguments, outputs):
                self._outcome(model, images)
            count = self._units(call, *arguments[0])
            own = call.features(call.pixels.layout.opened(outputs[0], count))
            with torch.no_grad():
                direct_features = call.encode(images)
            for name, value in direct_features.items():
                self._agree(value, own[name])

    def test_a_purifier_and_mappers_apply(self) -> None:
        model, images = self._model_and_images()
        psms = self._psms(model, images)
        plain = self._smoothed(model, images, psm=None, sigma=SIGMA)
        purified = self._smoothed(model, images, psm=[psm.only(mapper=False) for psm in psms])
        assert not torch.allclose(purified, plain, atol=1e-5), "the purifier changes nothing"
        calls = self._calls(model, images)
        if any(call.image_size is None and self._shown(model, call, images)[0].ndim > 4 for call in calls):
            with pytest.raises(PixelError, match="video"):
                self._smoothed(model, images, psm=psms)
            return
        whole = self._smoothed(model, images, psm=psms)
        assert not torch.allclose(whole, purified, atol=1e-5), "the mappers change nothing"
        assert whole.isfinite().all()

    # Draws.

    def test_every_call_takes_fresh_noise(self) -> None:
        model, images = self._model_and_images()
        with fs_plugins.enable(model, psm=None, sigma=SIGMA):
            assert not torch.equal(self._outcome(model, images), self._outcome(model, images))

    def test_noise_scope_image_repeats_itself(self) -> None:
        model, images = self._model_and_images()
        with fs_plugins.enable(model, psm=None, sigma=SIGMA, noise_scope="image"):
            first = self._outcome(model, images)
            assert torch.equal(self._outcome(model, images), first)
            assert not torch.equal(self._outcome(model, images.flip(-1)), first)

    def test_chunks_never_change_a_result(self) -> None:
        model, images = self._model_and_images()
        whole = self._smoothed(model, images, psm=None, sigma=SIGMA, n0=3, chunk_size=10_000)
        for chunk_size in (1, 2):
            self._agree(self._smoothed(model, images, psm=None, sigma=SIGMA, n0=3, chunk_size=chunk_size), whole)

    def test_calls_per_generate(self) -> None:
        model, images = self._model_and_images()
        inputs = self._inputs(model, images)
        with fs_plugins.enable(model, psm=None, sigma=SIGMA) as handle, torch.no_grad():
            if self.generate(model, inputs) is None:
                pytest.skip("this model does not generate")
            assert sum(v.calls for v in handle.status().vision) == self.calls_per_generate

    def test_status_is_a_proof_of_life(self) -> None:
        model, images = self._model_and_images()
        with fs_plugins.enable(model, psm=None, sigma=SIGMA) as handle:
            self._outcome(model, images)
            told = handle.status()
        assert told.model_calls == 1, "the adapter does not say under which names the model takes pixels (inputs)"
        assert sum(v.calls for v in told.vision) >= 1
        assert not told.warnings
        assert all(v.pixels for v in told.vision), "the adapter does not say where mean and std come from"

    # Gradients.

    def test_gradients_reach_the_images(self) -> None:
        model, images = self._model_and_images()
        images.requires_grad_(True)
        with fs_plugins.enable(model, psm=None, sigma=SIGMA, n0=2):
            _number(self.outcome(model, self._inputs(model, images))).backward()
        assert images.grad is not None
        assert images.grad.isfinite().all()
        assert (images.grad != 0).float().mean() > 0.9
        assert torch.is_grad_enabled()

    def test_gradients_match_finite_differences(self) -> None:
        """To a tenth: a path that is cut off is missing altogether, and fp32 allows no more.

        Between its kinks a net is smooth, and a step of a millionth hardly ever meets one.
        """
        model, images = self._model_and_images()
        steps = (3e-3, 1e-3, 3e-4)
        if self.kinks:
            model, images, steps = model.double(), images.double(), (1e-6, 1e-7, 1e-8)
        direction = normal(torch.Generator().manual_seed(2), images.shape)

        def value(x: Tensor) -> Tensor:
            # The same seed anew: the same draws for every x.
            with fs_plugins.enable(model, psm=None, sigma=SIGMA, n0=2, seed=3):
                return _number(self.outcome(model, self._inputs(model, x)))

        point = images.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(value(point), point)
        along = float((slope * direction).sum())

        def difference(step: float) -> float:
            with torch.no_grad():
                return float(value(images + step * direction) - value(images - step * direction)) / (2 * step)

        nearest = min(abs(along - difference(step)) for step in steps)
        assert nearest < 0.1 * abs(along) + 1e-6, f"off by {nearest:.3g} of {along:.3g}"

    def test_no_graph_is_built_where_nobody_asked_for_one(self) -> None:
        model, images = self._model_and_images()
        model.requires_grad_(False)
        with fs_plugins.enable(model, psm=None, sigma=SIGMA):
            assert not self.outcome(model, self._inputs(model, images)).requires_grad
            with torch.no_grad():
                assert not self.outcome(model, self._inputs(model, images)).requires_grad

    # Dtypes, devices, copies, threads.

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        model, images = self._model_and_images()
        wide, wide_plain = self._served(model, images), self._served(model, images, smoothed=False)
        half, half_plain = self._served(model.to(dtype), images), self._served(model, images, smoothed=False)
        for i, served in enumerate(half):
            assert served.dtype == half_plain[i].dtype
            assert served.isfinite().all()
            allowed = max(0.15, 1.5 * _distance(half_plain[i], wide_plain[i]))
            assert _distance(served, wide[i]) < allowed, "half precision costs more than it does the model itself"

    def test_devices(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("no second device here")
        model, images = self._model_and_images()
        moved = self._smoothed(model.cuda(), images.cuda(), psm=self._psms(model, images))
        assert moved.is_cuda
        assert moved.isfinite().all()

    def test_copies_are_enabled_on_their_own_encoder(self) -> None:
        model, images = self._model_and_images()
        fs_plugins.enable(model, psm=None, sigma=SIGMA, seed=1)
        twin = copy.deepcopy(model)
        self._agree(self._outcome(twin, images), self._outcome(copy.deepcopy(model), images))
        inner = list(twin.modules())
        assert all(any(s.call.module is m for m in inner) for s in fs_plugins.SmoothingHandle(twin).smoothers)
        fs_plugins.disable(twin)
        assert fs_plugins.status(model).enabled
        assert not fs_plugins.status(twin).enabled

    def test_pickles_keep_the_protection(self) -> None:
        model, images = self._model_and_images()
        try:
            pickle.dumps(model)
        except Exception as error:
            pytest.skip(f"the model itself does not pickle: {error}")
        fs_plugins.enable(model, psm=None, sigma=SIGMA, seed=1)
        twin = pickle.loads(pickle.dumps(model))
        self._agree(self._outcome(twin, images), self._outcome(model, images))

    def test_threads_do_not_disturb_each_other(self) -> None:
        model, images = self._model_and_images()
        with fs_plugins.enable(model, psm=None, sigma=SIGMA, noise_scope="image", seed=1, chunk_size=3):
            pictures = [images, images.flip(-1)]
            wanted = [self._outcome(model, picture) for picture in pictures]
            results: list[tuple[int, Tensor | Exception]] = []

            def work(i: int) -> None:
                try:
                    results.append((i, self._outcome(model, pictures[i])))
                except Exception as error:
                    results.append((i, error))

            threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for i, result in results:
            assert isinstance(result, Tensor), result
            self._agree(result, wanted[i])

    # Helpers below; an author need not read on.

    def _calls(self, model: nn.Module, images: Tensor) -> list[VisionCall]:
        """The vision calls that these images go through; a model may have a tower for video that they do not."""
        return [call for call in claim(model)[1] if self._shown(model, call, images)]

    def _model_and_images(self) -> tuple[nn.Module, Tensor]:
        generator = torch.Generator().manual_seed(7)
        return self.make_model(), uniform(generator, (self.images, 3, *self.image_size))

    def _inputs(self, model: nn.Module, images: Tensor) -> dict[str, Any]:
        """The model's inputs, floating-point ones in the model's own type."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return map_tensors(
            [self.make_inputs(model, images)], lambda one: one[0].to(dtype) if one[0].is_floating_point() else one[0]
        )

    def _outcome(self, model: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.outcome(model, self._inputs(model, images)).clone()

    def _smoothed(self, model: nn.Module, images: Tensor, **settings: Any) -> Tensor:
        with fs_plugins.enable(model, seed=1, **settings):
            return self._outcome(model, images)

    def _agree(self, one: Tensor, other: Tensor) -> None:
        assert one.shape == other.shape
        scale = float(other.detach().abs().max()) + 1e-6
        off = float((one - other).detach().abs().max())
        assert off < self.tolerance * scale, f"off by {off:.2e} of {scale:.2e}"

    def _psms(self, model: nn.Module, images: Tensor) -> list[PSM]:
        """A random PSM for each vision encoder."""
        return [_random_psm(call, self._shown(model, call, images), self.image_size) for call in claim(model)[1]]

    def _units(self, call: VisionCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return sum(len(group.units) for group in _groups(call, args, kwargs))

    def _shown(self, model: nn.Module, call: VisionCall, images: Tensor) -> list[Tensor]:
        """Images in [0, 1] as the encoder gets them, those of one shape together."""
        arguments: list[Any] = []
        with _watching(call.module, arguments, []):
            self._outcome(model, images)
        groups = [group for args, kwargs in arguments for group in _groups(call, args, kwargs)]
        return [call.pixels.to_unit(group.pixels) for group in groups]

    def _served(self, model: nn.Module, images: Tensor, *, smoothed: bool = True) -> list[Tensor]:
        """The readouts that the language side gets, under smoothing for one seed."""
        served = []
        for call in self._calls(model, images):
            outputs: list[Any] = []
            enabled = fs_plugins.enable(model, psm=None, sigma=SIGMA if smoothed else 0, seed=1)
            with enabled, _watching(call.module, [], outputs):
                self._outcome(model, images)
            served += [readout.get(outputs[0]) for readout in call.readouts]
        return served


def _groups(call: VisionCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _, given = named_arguments(call.module, call.pixels.argument, args, kwargs)
    return call.pixels.layout.groups(given[call.pixels.argument], given)


def _unit_mean(call: VisionCall, features: Features, n0: int) -> Features:
    """What must be served, written out: the mean of unit embeddings at the draws' mean length."""
    lengths = call.embed(features).norm(dim=-1)
    units = {
        name: (value / lengths.view(-1, *[1] * (value.ndim - 1))).unflatten(0, (n0, -1)).mean(0)
        for name, value in features.items()
    }
    scale = lengths.view(n0, -1).mean(0) / call.embed(units).norm(dim=-1)
    return {name: value * scale.view(-1, *[1] * (value.ndim - 1)) for name, value in units.items()}


def _random_psm(call: VisionCall, shown: list[Tensor], fallback: tuple[int, int]) -> PSM:
    """A PSM of random weights that fits what the call is shown."""
    height, width = call.image_size or (shown[0].shape[-2:] if shown else fallback)
    with torch.no_grad():
        features = call.encode(uniform(torch.Generator().manual_seed(1), (1, 3, height, width)))
    lengths = {name: value.shape[1] if value.ndim == 3 else 0 for name, value in features.items()}
    config = PSMConfig(
        name="random",
        sigma=SIGMA,
        sigma_range=(SIGMA, SIGMA),
        image_size=(height, width),
        purifier=Part(kind="unet", args={"channels": [8, 16], "unshuffle": 2}),
        readouts=tuple(
            ReadoutSpec(
                name=readout.name,
                width=readout.width,
                tokens=lengths[readout.name],
                mapper=Part(kind="residual", args={"width": readout.width, "heads": 2}),
            )
            for readout in call.readouts
        ),
        encoder="test",
        fingerprint=fingerprint(call.module),
    )
    psm = PSM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in psm.parameters():
            parameter.add_(normal(generator, parameter.shape) * 0.05)
    return psm


def _number(outcome: Tensor) -> Tensor:
    """One number that every entry of the outcome moves; a sum of squares would not see embeddings of length 1 turn."""
    weights = torch.linspace(-1, 1, outcome.numel(), dtype=torch.float64, device=outcome.device)
    return (outcome.double() * weights.view(outcome.shape)).sum()


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def _hooks(model: nn.Module) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


def _fail(*_: Any) -> None:
    raise ZeroDivisionError("inside the encoder")


@contextmanager
def _watching(module: nn.Module, arguments: list[Any], outputs: list[Any]) -> Iterator[None]:
    """Record what the module is run on, which hooks do not see while it is smoothed, and what it answers."""
    own, run = vars(module).get("forward"), module.forward

    @functools.wraps(run)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        arguments.append((args, kwargs))
        return run(*args, **kwargs)

    module.forward = recorded
    after = module.register_forward_hook(lambda module, args, output: outputs.append(kept(output)))
    try:
        yield
    finally:
        after.remove()
        if own is None:
            del module.forward
        else:
            module.forward = own


def _perturb(call: VisionCall, readout: fs_plugins.Readout) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        value = readout.get(output)
        noise = normal(torch.Generator().manual_seed(0), value.shape)
        return readout.put(output, value + noise.to(value) * value.std())

    return hook
