"""The conformance kit on a small framework of this test's own: a right adapter passes, and each fault is found.

And the gradient scopes that two frameworks need.
"""

from __future__ import annotations

import importlib
import re
import threading
import types
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from support import randomise
from torch import nn

import fs_plugins
from fs_plugins import FeatureSmoother, Field, PixelSpace, Readout, VisionCall, hooks
from fs_plugins.patch import attach, detach
from fs_plugins.testing import AdapterConformance

pytest_plugins = ("pytester",)
# A run inside a run forgets what it imported; this takes seconds.
importlib.import_module("diffusers.models.unets.unet_2d")

NORM = PixelSpace((0.2, 0.4, 0.6), (0.3, 0.4, 0.5), source="the framework's own")


class Vision(nn.Module):
    """(B, 3, 16, 16) -> tokens (B, 4, 6) and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.patches = nn.Conv2d(3, 6, 8, stride=8)

    def forward(self, pixels):
        tokens = torch.tanh(self.patches(torch.tanh(self.stem(pixels)))).flatten(2).transpose(1, 2)
        return {"tokens": tokens, "pooled": tokens.mean(1)}


class Chat(nn.Module):
    """Reads the tokens, and remembers what it saw while it generates."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.language = Vision(), nn.Linear(6, 5)

    def see(self, picture):
        return self.vision(picture)["tokens"]

    def forward(self, picture):
        return self.language(self.see(picture))

    def generate(self, picture, steps=3):
        seen = self.see(picture)
        return torch.stack([(self.language(seen) * step).argmax(-1) for step in range(steps)])


def answer(model: nn.Module) -> VisionCall:
    """What a right adapter says of Chat."""
    return VisionCall(
        module=model.vision,
        pixels=replace(NORM, argument="pixels"),
        readouts=(Readout("tokens", (Field("tokens", 0),), width=6, tokens=4),),
        image_size=(16, 16),
        architecture={"family": "chat"},
        inputs=("picture",),
    )


class OnChat(AdapterConformance):
    adapter = "chat"
    image_size = (16, 16)
    kind = Chat

    def make_model(self):
        return randomise(self.kind(), 0.4)

    def make_inputs(self, model, images):
        mean, std = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.3, 0.4, 0.5])
        return {"picture": (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)}

    def outcome(self, model, inputs):
        return model(**inputs)

    def generate(self, model, inputs):
        return model.generate(**inputs)


@pytest.fixture
def claimed():
    """Registers an adapter that answers this of Chat and its kin, in a manager of this test's own."""
    hooks.plugin_manager.cache_clear()

    def register(say=answer):
        def fs_vision_call(model):
            return say(model) if isinstance(model, Chat) else None

        plugin = types.ModuleType("plugin")
        plugin.fs_vision_call = fs_plugins.hookimpl(fs_vision_call)
        hooks.register(hooks.plugin_manager(), plugin, "chat")

    yield register
    hooks.plugin_manager.cache_clear()


def kit() -> list[str]:
    return [name for name in dir(AdapterConformance) if name.startswith("test_")]


def run(pytester, body: str, *options: str):
    """A suite of a stranger's, in which OnChat is imported and subclassed."""
    pytester.makepyfile(f"from test_conformance import Chat, OnChat\n\n\n{body}")
    return pytester.inline_run("-p", "no:cacheprovider", *options)


def test_a_right_adapter_passes_every_test(claimed, pytester):
    claimed()
    passed, skipped, failed = run(pytester, "class TestChat(OnChat):\n    pass\n").listoutcomes()
    assert not failed, [report.nodeid for report in failed]
    assert len(skipped) == (0 if torch.cuda.is_available() else 1)
    assert len({report.nodeid.split("::")[-1].split("[")[0] for report in passed + skipped}) == len(kit())


# Faults of an adapter.


@contextmanager
def found(words: str):
    """The kit complains, and its message or the claim that failed has these words."""
    with pytest.raises((AssertionError, fs_plugins.FSPluginsError)) as caught:
        yield
    told = f"{caught.traceback[-1].statement} {caught.value}"
    assert re.search(words, told), told


def with_pixels(mean=NORM.mean, std=NORM.std):
    return lambda model: replace(answer(model), pixels=PixelSpace(mean, std, "pixels"))


def with_readouts(*readouts: Readout):
    return lambda model: replace(answer(model), readouts=readouts)


TOKENS = Readout("tokens", (Field("tokens", 0),), width=6, tokens=4)
POOLED = Readout("pooled", (Field("pooled", 1),), width=6)

ADAPTERS = {
    "another mean": (
        with_pixels(mean=(0.3, 0.4, 0.6)),
        "test_pixels_are_images_in_unit_range",
        "mean and std do not bring",
    ),
    "another std": (with_pixels(std=(0.3, 0.4, 0.4)), "test_pixels_are_images_in_unit_range", "off by"),
    "channels in another order": (
        with_pixels(NORM.mean[::-1], NORM.std[::-1]),
        "test_pixels_are_images_in_unit_range",
        "mean and std do not bring",
    ),
    "far too wide": (with_pixels(std=(0.6,) * 3), "test_pixels_are_images_in_unit_range", "mean and std do not bring"),
    "a readout nobody consumes": (with_readouts(TOKENS, POOLED), "test_every_readout_matters", "pooled"),
    "another readout than is consumed": (
        with_readouts(POOLED),
        "test_nothing_but_the_readouts_reaches_the_language_side",
        "off by",
    ),
    "the readout's first token left out": (
        with_readouts(replace(TOKENS, tokens=3, skip=1)),
        "test_nothing_but_the_readouts_reaches_the_language_side",
        "off by",
    ),
    "no readout": (with_readouts(), "test_exactly_one_adapter_claims_the_model", "names what is consumed"),
    "an inner layer": (
        lambda model: replace(
            answer(model),
            module=model.vision.patches,
            pixels=PixelSpace((0.5,) * 3, (0.5,) * 3, "input"),  # brings what tanh makes to [0, 1]
            readouts=(Readout("maps", (), width=2, tokens=None),),
        ),
        "test_pixels_are_images_in_unit_range",
        "no image that the encoder sees is the one given",
    ),
    "an encoder of another model": (
        lambda model: replace(answer(model), module=Vision()),
        "test_exactly_one_adapter_claims_the_model",
        "not inside the model",
    ),
    "the model's own argument not named": (
        lambda model: replace(answer(model), inputs=()),
        "test_status_is_a_proof_of_life",
        "under which names",
    ),
    "a source nobody knows": (
        lambda model: replace(answer(model), pixels=replace(NORM, argument="pixels", source="")),
        "test_sigma_zero_is_bit_for_bit_the_model",
        "Nobody knows how pixels are normalised",
    ),
}


@pytest.mark.parametrize(("say", "name", "message"), ADAPTERS.values(), ids=ADAPTERS)
def test_a_fault_of_an_adapter_is_found(claimed, say, name, message):
    claimed(say)
    with found(message):
        getattr(OnChat(), name)()


def test_a_model_that_nobody_or_another_claims_is_found(claimed):
    claimed()
    suite = OnChat()
    suite.adapter = "somebody_else"
    with pytest.raises(AssertionError):
        suite.test_exactly_one_adapter_claims_the_model()
    suite.make_model = lambda: nn.Linear(2, 2)
    with pytest.raises(fs_plugins.ModelError, match="No adapter claims"):
        suite.test_exactly_one_adapter_claims_the_model()


# Faults of a framework, which its adapter would have to answer for.


class Peeks(Chat):
    """The language side looks past the encoder."""

    def forward(self, picture):
        return super().forward(picture) + picture.mean((1, 2, 3)).view(-1, 1, 1)


class Blind(Chat):
    """Runs the encoder without gradients, calling it inside."""

    def see(self, picture):
        with torch.no_grad():
            return super().see(picture)


class BlindTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = Vision()

    @torch.no_grad()
    def forward(self, picture):
        return self.vision(picture)["tokens"]


class Decorated(Chat):
    """Runs the encoder without gradients, in a tower whose own forward says so."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = BlindTower()
        self.vision = self.tower.vision

    def see(self, picture):
        return self.tower(picture)


class Forgetful(Chat):
    """Looks at the picture again at every step."""

    def generate(self, picture, steps=3):
        return torch.stack([self.language(self.see(picture)).argmax(-1) for _ in range(steps)])


class Cached(Chat):
    """Answers from the first picture it saw."""

    kept = None

    def see(self, picture):
        self.kept = super().see(picture) if self.kept is None else self.kept
        return self.kept


class Changed(Chat):
    """Is changed by being asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, picture):
        return super().forward(picture) + self.asked


def asking(model):
    model.asked = getattr(model, "asked", 0) + 1
    return answer(model)


FRAMEWORKS = {
    "a path past the encoder": (Peeks, "test_nothing_but_the_readouts_reaches_the_language_side", "off by"),
    "no_grad around the encoder": (Blind, "test_gradients_reach_the_images", r"images\.grad is not None"),
    "no_grad on the tower": (Decorated, "test_gradients_reach_the_images", r"images\.grad is not None"),
    "the encoder once a step": (Forgetful, "test_calls_per_generate", "== self.calls_per_generate"),
    "one answer for every picture": (Cached, "test_every_call_takes_fresh_noise", "assert not torch.equal"),
}


@pytest.mark.parametrize(("kind", "name", "message"), FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_a_fault_of_a_framework_is_found(claimed, kind, name, message):
    claimed()
    suite = OnChat()
    suite.kind = kind
    with found(message):
        getattr(suite, name)()


def test_an_adapter_that_changes_the_model_is_found(claimed):
    claimed(asking)
    suite = OnChat()
    suite.kind = Changed
    with pytest.raises(AssertionError):
        suite.test_claiming_leaves_the_model_alone()


class Wave(Chat):
    """A triangular wave of the tokens, with a kink every other step of the usual comparison."""

    def see(self, picture):
        return torch.asin(torch.sin(3e4 * super().see(picture)))


def test_gradients_are_compared_between_an_encoders_kinks(claimed):
    claimed()
    suite = OnChat()
    suite.kind = Wave
    with found("off by"):
        suite.test_gradients_match_finite_differences()
    suite.kinks = True
    suite.test_gradients_match_finite_differences()


@pytest.mark.parametrize("kinks", [False, True])
def test_a_cut_gradient_path_is_found(claimed, kinks):
    """Gradients reach the images, but not by every way."""

    class Cut(Chat):
        def see(self, picture):
            tokens = super().see(picture)
            return torch.cat([tokens[:, :2], tokens[:, 2:].detach() * tokens[:, :2].mean().sigmoid()], dim=1)

    claimed()
    suite = OnChat()
    suite.kind, suite.kinks = Cut, kinks
    with found("off by"):
        suite.test_gradients_match_finite_differences()


@pytest.mark.parametrize(("kind", "scope"), [(Blind, "vision"), (Decorated, "tower")])
@pytest.mark.parametrize(
    "name", [name for name in kit() if "gradient" in name or "graph" in name or "exception" in name]
)
def test_a_gradient_scope_mends_a_framework_that_switches_gradients_off(claimed, kind, scope, name):
    claimed(lambda model: replace(answer(model), grad_scope=getattr(model, scope)))
    suite = OnChat()
    suite.kind = kind
    getattr(suite, name)()


def test_the_calls_of_a_generation_are_counted_exactly(claimed):
    claimed()
    suite = OnChat()
    suite.kind, suite.calls_per_generate = Forgetful, 3
    suite.test_calls_per_generate()
    suite.calls_per_generate = 2
    with found("== self.calls_per_generate"):
        suite.test_calls_per_generate()


# Faults of this package: the kit would notice them too.


def unscaled(monkeypatch):
    monkeypatch.setattr(FeatureSmoother, "views", lambda self, images, noise: images + noise)


def clamped(monkeypatch):
    real = FeatureSmoother.views
    monkeypatch.setattr(FeatureSmoother, "views", lambda self, images, noise: real(self, images, noise).clamp(0, 1))


def detached(monkeypatch):
    real = FeatureSmoother.views
    monkeypatch.setattr(FeatureSmoother, "views", lambda self, images, noise: real(self, images, noise).detach())


def unpurified(monkeypatch):
    monkeypatch.setattr(fs_plugins.PSM, "purify", lambda self, images, sigma: images)


def unmapped(monkeypatch):
    monkeypatch.setattr(fs_plugins.PSM, "map", lambda self, readout, feature, sigma: feature)


def unweighted(monkeypatch):
    """A plain mean instead of the mean of unit embeddings."""
    monkeypatch.setattr("fs_plugins.smoothing._Mean.result", lambda self: self.output)


def not_undone(monkeypatch):
    monkeypatch.setattr("fs_plugins.api.detach", lambda model: None)


def left_behind(monkeypatch):
    """Everything is undone but for a hook that does nothing."""

    def detached(model):
        detach(model)
        model.register_forward_hook(lambda module, args, output: None)

    monkeypatch.setattr("fs_plugins.api.detach", detached)


PACKAGE = {
    "noise of another size": (unscaled, "test_noise_has_standard_deviation_sigma_in_unit_pixels"),
    "noise clamped": (clamped, "test_noise_has_standard_deviation_sigma_in_unit_pixels"),
    "gradients cut": (detached, "test_gradients_reach_the_images"),
    "no purifier": (unpurified, "test_a_purifier_and_mappers_apply"),
    "no mappers": (unmapped, "test_a_purifier_and_mappers_apply"),
    "another average": (unweighted, "test_what_is_consumed_is_the_smoothed_feature"),
    "not disabled": (not_undone, "test_disabling_restores_bit_for_bit_and_leaves_no_trace"),
    "a hook left behind": (left_behind, "test_disabling_restores_bit_for_bit_and_leaves_no_trace"),
}


@pytest.mark.parametrize(("break_it", "name"), PACKAGE.values(), ids=PACKAGE)
def test_a_fault_of_the_package_is_found(claimed, monkeypatch, break_it, name):
    claimed()
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        getattr(OnChat(), name)()


# What an author may expect to fail.


def test_an_expected_failure_must_be_a_test_of_the_kit():
    for name in ("test_no_such_thing", "make_model", "kit"):
        with pytest.raises(TypeError, match=f"Suite expects '{name}' to fail, which is no test of the kit"):
            type("Suite", (AdapterConformance,), {"expected_failures": {name: "some reason"}})
    with pytest.raises(TypeError, match="test_no_such_thing"):
        type("Suite", (AdapterConformance,), {"not_run": {"test_no_such_thing": "some reason"}})


def test_an_expected_failure_is_strict_and_its_siblings_are_not_touched(claimed, pytester):
    claimed()
    body = """
class TestMended(OnChat):
    expected_failures = {"test_calls_per_generate": "was broken once"}


class TestBroken(OnChat):
    calls_per_generate = 2
    expected_failures = {"test_calls_per_generate": "looks twice"}


class TestNotRun(OnChat):
    calls_per_generate = 2
    not_run = {"test_calls_per_generate": "now and then"}


class TestPlain(OnChat):
    pass
"""
    reports = run(pytester, body, "-k", "test_calls_per_generate").getreports("pytest_runtest_logreport")
    told = {report.nodeid.split("::")[1]: report for report in reports if report.when == "call" or report.skipped}
    assert told["TestMended"].outcome == "failed"
    assert "[XPASS(strict)] was broken once" in told["TestMended"].longreprtext
    assert (told["TestBroken"].outcome, told["TestBroken"].wasxfail) == ("skipped", "looks twice")
    assert told["TestNotRun"].outcome == "skipped"
    assert "now and then" in str(told["TestNotRun"].longrepr)
    assert told["TestPlain"].outcome == "passed"


def test_marks_of_a_parametrised_test_keep_its_parameters(claimed, pytester):
    claimed()
    body = "class TestChat(OnChat):\n    not_run = {'test_half_precision': 'no time'}\n"
    _, skipped, failed = run(pytester, body, "-k", "half_precision").listoutcomes()
    assert (len(skipped), len(failed)) == (2, 0)


def test_a_suite_that_says_nothing_is_told_what_to_say():
    with pytest.raises(NotImplementedError, match="make_model"):
        AdapterConformance().make_model()
    with pytest.raises(NotImplementedError, match="make_inputs"):
        AdapterConformance().make_inputs(nn.Identity(), torch.zeros(1, 3, 2, 2))


# Gradient scopes.


@pytest.fixture(autouse=True)
def _tidy():
    """What a failing scope leaves behind is no other test's business."""
    yield
    while torch._C._len_torch_function_stack():
        torch.overrides._pop_mode()
    torch.set_grad_enabled(True)


class Twice(nn.Module):
    """A smooth map of two parts; it may be made to fail, and says how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        randomise(self, 0.5)
        self.error: BaseException | None = None
        self.modes: list[bool] = []

    def forward(self, x):
        self.modes.append(torch.is_grad_enabled())
        if self.error is not None:
            raise self.error
        return torch.tanh(self.two(torch.tanh(self.one(x))))


class Inside(nn.Module):
    """A framework that calls its tower inside no_grad, as OpenFlamingo does."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = self.encoder = Twice()

    def forward(self, x):
        with torch.no_grad():
            seen = self.tower(x)
        return seen.sum(-1)


class Decorates(nn.Module):
    """A framework whose tower's forward is decorated, as the original LLaVA's is; it casts inside."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = DecoratedTower()
        self.encoder = self.tower.encoder

    def forward(self, x):
        return self.tower(x).sum(-1)


class DecoratedTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Twice()

    @torch.no_grad()
    def forward(self, x):
        return self.encoder(x.to(torch.float64).to(x.dtype)) * 2


BOTH = pytest.mark.parametrize("kind", [Inside, Decorates])


def scoped(kind: type[nn.Module]) -> nn.Module:
    """A framework with a gradient scope and no smoothing."""
    model = kind()
    call = types.SimpleNamespace(grad_scope=model.tower)
    attach([types.SimpleNamespace(smoother=types.SimpleNamespace(call=call), attach=lambda: None)], model, ())
    return model


def undecorated(model: nn.Module, x):
    factor = 1 if isinstance(model, Inside) else 2
    encoder = model.encoder
    return factor * torch.tanh(encoder.two(torch.tanh(encoder.one(x)))).sum(-1)


def pixels() -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)


def assert_in_order(model: nn.Module) -> None:
    """Nothing of a call is left: gradient mode, the next call's gradients, and a later no_grad."""
    model.encoder.error = None
    assert torch.is_grad_enabled()
    x = pixels()
    with torch.no_grad():
        assert not torch.is_grad_enabled(), "a user's own no_grad is ignored"
        assert not (x * 2).requires_grad
        with torch.enable_grad():
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    (got,) = torch.autograd.grad(model(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(undecorated(model, x).square().sum(), x)
    assert torch.equal(got, wanted)
    with torch.no_grad():
        assert not (x * 2).requires_grad


@BOTH
def test_gradients_are_those_of_the_undecorated_module(kind):
    x = pixels()
    assert not kind()(x).requires_grad, "the framework itself cuts them off"
    model = scoped(kind)
    for _ in range(2):
        assert_in_order(model)
    parameters = list(model.encoder.parameters())
    got = torch.autograd.grad(model(x).sum(), parameters)
    wanted = torch.autograd.grad(undecorated(model, x).sum(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@BOTH
def test_nothing_is_lifted_where_the_pixels_require_no_gradient(kind):
    """The encoder's weights do, as in every model that is not frozen."""
    model = scoped(kind)
    assert next(model.encoder.parameters()).requires_grad
    assert not model(pixels().detach()).requires_grad
    assert model.encoder.modes == [False]
    assert_in_order(model)


def test_a_users_own_no_grad_around_a_decorated_module_builds_no_graph():
    model = scoped(Decorates)
    with torch.no_grad():
        assert not model(pixels()).requires_grad
        assert not torch.is_grad_enabled()
    assert model.encoder.modes == [False]
    assert_in_order(model)


@BOTH
def test_inference_mode_stays_inference_mode(kind):
    model = scoped(kind)
    x = pixels()
    with torch.inference_mode():
        assert not model(x).requires_grad
        assert model(x).is_inference()
    assert_in_order(model)


SKIPPED = pytest.mark.xfail(strict=True, reason="KeyboardInterrupt skips the hooks, and what they had begun stays")
ERRORS = pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
HARDER = pytest.mark.parametrize("error", [RuntimeError, pytest.param(KeyboardInterrupt, marks=SKIPPED)])


@BOTH
@ERRORS
@pytest.mark.parametrize("times", [1, 3])
def test_the_gradient_mode_is_restored_after_a_failure_inside_the_encoder(kind, error, times):
    model = scoped(kind)
    for _ in range(times):
        model.encoder.error = error("inside the encoder")
        with pytest.raises(error):
            model(pixels())
        assert torch.is_grad_enabled()
    assert_in_order(model)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Inside, RuntimeError),
        (Inside, KeyboardInterrupt),
        (Decorates, RuntimeError),
        pytest.param(Decorates, KeyboardInterrupt, marks=SKIPPED),
    ],
)
def test_a_users_own_no_grad_outlasts_a_failure_inside_the_encoder(kind, error):
    model = scoped(kind)
    with torch.no_grad():
        model.encoder.error = error("inside the encoder")
        with pytest.raises(error):
            model(pixels())
        assert not torch.is_grad_enabled()
    assert_in_order(model)


@HARDER
def test_a_failure_in_a_call_of_the_tower_alone_leaves_nothing_behind(error):
    """Gradients are on, and no no_grad comes that could be kept from taking effect."""
    model = scoped(Inside)
    model.encoder.error = error("inside the encoder")
    with pytest.raises(error):
        model.tower(pixels())
    assert_in_order(model)


@HARDER
def test_a_failure_before_the_decorated_forward_is_reached_leaves_nothing_behind(error):
    model = scoped(Decorates)

    def fail(module, args):
        raise error("in another hook")

    bomb = model.tower.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(pixels())
    bomb.remove()
    assert_in_order(model)


@pytest.mark.parametrize(
    ("kind", "scope", "chunk_size"),
    [
        (Blind, "vision", 1),
        (Decorated, "tower", 1),
        (Chat, "vision", 100),
        (Chat, "vision", 2),
        (Chat, "vision", 1),
    ],
)
def test_a_scope_holds_for_every_pass_of_the_encoder_and_ends_after_the_last(claimed, kind, scope, chunk_size):
    """Smoothing calls the encoder again for each chunk."""
    claimed(lambda model: replace(answer(model), grad_scope=getattr(model, scope)))
    model = randomise(kind(), 0.4)
    images = torch.rand(2, 3, 16, 16)
    gradients = []
    for size in (100, chunk_size):
        x = NORM.from_unit(images, torch.float32).requires_grad_(True)
        with fs_plugins.enable(model, psm=None, sigma=0.25, n0=3, seed=1, chunk_size=size):
            out = model(x)
            assert torch.is_grad_enabled()
            with torch.no_grad():
                assert not (x * 2).requires_grad, "a user's own no_grad is ignored"
        gradients += torch.autograd.grad(out.square().sum(), x)
    assert (gradients[1] != 0).all()
    assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [100, 1])
def test_what_follows_the_encoder_inside_the_frameworks_no_grad_stays_under_it(claimed, chunk_size):
    modes = []

    class Watches(Chat):
        def see(self, picture):
            with torch.no_grad():
                tokens = super().see(picture)
                modes.append(torch.is_grad_enabled())
            return tokens

    claimed(lambda model: replace(answer(model), grad_scope=model.vision))
    model = randomise(Watches(), 0.4)
    with fs_plugins.enable(model, psm=None, sigma=0.25, chunk_size=chunk_size):
        model(NORM.from_unit(torch.rand(2, 3, 16, 16), torch.float32).requires_grad_(True))
    assert modes == [False]


def test_a_call_in_another_thread_does_not_end_this_ones_scope():
    model = scoped(Inside)
    inside, go_on, finished = threading.Event(), threading.Event(), []

    def wait(module, args):
        if threading.current_thread().name == "attack":
            inside.set()
            assert go_on.wait(10)

    def attack() -> None:
        x = pixels()
        assert model.tower(x).requires_grad
        with torch.no_grad():
            assert not (x * 2).requires_grad, "a user's own no_grad is ignored"
        finished.append("attack")

    model.encoder.one.register_forward_pre_hook(wait)
    thread = threading.Thread(target=attack, name="attack")
    thread.start()
    assert inside.wait(10)
    assert not model(pixels().detach()).requires_grad, "a graph nobody asked for"
    go_on.set()
    thread.join()
    assert finished == ["attack"]
    assert_in_order(model)
