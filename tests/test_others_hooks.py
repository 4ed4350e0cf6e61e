"""What hooks of others see of a smoothed encoder: one call, the pixels as they came, and what is served."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from support import TinyEncoder, plugin, tiny_call
from torch import nn

import fs_plugins
from fs_plugins import hooks


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = TinyEncoder()

    def forward(self, pixel_values, named=False):
        pixels = {"pixel_values": pixel_values} if named else pixel_values
        return self.encoder(**pixels) if named else self.encoder(pixels)


@pytest.fixture
def model(manager) -> Model:
    claim = lambda model: tiny_call(model.encoder) if isinstance(model, Model) else None  # noqa: E731
    hooks.register(manager, plugin(fs_vision_call=claim), "watched")
    return Model().eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5


def smoothing(model, **changes):
    return fs_plugins.enable(model, **{"psm": None, "sigma": 0.25, "n0": 4, "seed": 1, **changes})


KINDS = {
    "before the call": ("register_forward_pre_hook", {}),
    "before the call, first": ("register_forward_pre_hook", {"prepend": True}),
    "before the call, with keywords": ("register_forward_pre_hook", {"with_kwargs": True}),
    "after the call": ("register_forward_hook", {}),
    "after the call, first": ("register_forward_hook", {"prepend": True}),
    "after the call, with keywords": ("register_forward_hook", {"with_kwargs": True}),
    "after the call, always": ("register_forward_hook", {"always_call": True}),
    "after the call, first, always, with keywords": (
        "register_forward_hook",
        {"prepend": True, "always_call": True, "with_kwargs": True},
    ),
}


def watch(module: nn.Module, kind: str, seen: list) -> torch.utils.hooks.RemovableHandle:
    """Note the arguments and, after the call, the output, as (args, kwargs, output)."""
    register, options = KINDS[kind]

    def hook(module, args, *rest):
        kwargs = dict(rest[0]) if options.get("with_kwargs") else None
        output = dict(rest[-1]) if register == "register_forward_hook" else None
        seen.append((list(args), kwargs, output))

    return getattr(module, register)(hook, **options)


@pytest.mark.parametrize("chunk_size", [1, 3, 32])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("when", ["before enable", "after enable", "after a call", "before and after"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_on_the_encoder_sees_one_call_its_own_pixels_and_what_is_served(
    model, pixels, kind, when, named, chunk_size
):
    with smoothing(model, chunk_size=chunk_size):
        model(pixels)
        wanted = [model(pixels) for _ in range(2)]
    seen: list = []
    many = 2 if when == "before and after" else 1
    if when.startswith("before"):
        watch(model.encoder, kind, seen)
    with smoothing(model, chunk_size=chunk_size) as handle:
        if (when.endswith("enable") and when.startswith("after")) or when == "before and after":
            watch(model.encoder, kind, seen)
        model(pixels)
        if when == "after a call":
            watch(model.encoder, kind, seen)
        seen.clear()
        served = [model(pixels, named=named) for _ in range(2)]
        assert handle.status().vision[0].calls == 3
    assert len(seen) == 2 * many
    for args, kwargs, _ in seen:
        assert len(args) == (0 if named else 1)
        assert all(shown is pixels for shown in args)
        if kwargs is not None:
            assert kwargs.keys() == ({"pixel_values"} if named else set())
            assert all(shown is pixels for shown in kwargs.values())
    for result, right in zip(served, wanted, strict=True):
        assert all(torch.equal(result[name], right[name]) for name in right), "watching changes nothing"
    for i, (_, _, output) in enumerate(seen):
        if output is not None:
            assert torch.equal(output["tokens"], served[i // many]["tokens"])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 32])
def test_what_a_hook_changes_is_what_is_smoothed_and_served(model, pixels, late, chunk_size):
    with smoothing(model, chunk_size=chunk_size):
        wanted = model(pixels.flip(-1))["tokens"] * 2
    handles = []

    def hook_up():
        handles.append(model.encoder.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),)))
        handles.append(
            model.encoder.register_forward_hook(lambda module, args, output: {**output, "tokens": output["tokens"] * 2})
        )

    if not late:
        hook_up()
    with smoothing(model, chunk_size=chunk_size):
        if late:
            hook_up()
        assert torch.equal(model(pixels)["tokens"], wanted)


def test_disabling_leaves_the_hooks_of_others_as_they_were(model, pixels):
    seen: list = []
    for kind in KINDS:
        watch(model.encoder, kind, seen)
    tables = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    before = [list(getattr(model.encoder, name).items()) for name in tables]
    with smoothing(model):
        model(pixels)
    assert [list(getattr(model.encoder, name).items()) for name in tables] == before
    seen.clear()
    plain = model(pixels)
    assert len(seen) == len(KINDS)
    assert torch.equal(seen[-1][2]["tokens"], plain["tokens"])


def test_a_hook_that_removes_itself_is_run_once_and_the_next_call_is_smoothed(model, pixels):
    seen: list = []
    with smoothing(model) as handle:
        for kind in KINDS:
            holder: list = []
            register, options = KINDS[kind]

            def hook(module, *rest, holder=holder):
                seen.append(holder)
                holder[0].remove()

            holder.append(getattr(model.encoder, register)(hook, **options))
        plain = model.encoder.forward(pixels)["tokens"]
        one, two = model(pixels)["tokens"], model(pixels)["tokens"]
        assert len(seen) == len(KINDS)
        assert handle.status().vision[0].calls == 2
    assert not torch.equal(one, plain)
    assert not torch.equal(two, plain)


@pytest.mark.parametrize("kind", ["before the call", "before the call, with keywords", "after the call"])
@pytest.mark.parametrize("early", [True, False])
def test_a_hook_that_fails_leaves_everything_in_order(model, pixels, kind, early):
    def fail(*_):
        raise ZeroDivisionError

    register, options = KINDS[kind]
    bomb = getattr(model.encoder, register)(fail, **options) if early else None
    with smoothing(model):
        bomb = bomb or getattr(model.encoder, register)(fail, **options)
        with pytest.raises(ZeroDivisionError):
            model(pixels)
        bomb.remove()
        plain = model.encoder.forward(pixels)["tokens"]
        assert not any(torch.equal(model(pixels)["tokens"], plain) for _ in range(2))


def test_modules_inside_the_encoder_see_the_noisy_rows_they_are_run_on(model, pixels):
    rows: list = []
    model.encoder.tokens.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    with smoothing(model, chunk_size=3):
        model(pixels)
    assert rows == [2, 2, 2, 2], "two images, four draws, at most three rows a forward"


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("chunk_size", [3, 32])
def test_a_hook_on_gradients_sees_those_of_the_pixels_as_they_came(model, pixels, early, chunk_size):
    class Bare(TinyEncoder):
        def forward(self, pixel_values):
            return super().forward(pixel_values)["tokens"]

    def gradients(hooked: bool):
        given, seen = pixels.clone().requires_grad_(True), []
        model.encoder = Bare().eval()

        def hook_up():
            model.encoder.register_full_backward_hook(lambda module, ins, outs: seen.append((*ins, *outs)))

        if hooked and early:
            hook_up()
        with smoothing(model, chunk_size=chunk_size):
            if hooked and not early:
                hook_up()
            served = model(given)
        served.square().sum().backward()
        return given.grad, served, seen

    wanted, served, _ = gradients(False)
    found, _, [(arriving, leaving)] = gradients(True)
    assert torch.allclose(found, wanted)
    assert torch.allclose(arriving, wanted)
    assert torch.allclose(leaving, 2 * served)


def test_copies_keep_the_order_and_threads_do_not_meet(model, pixels):
    seen: list = []
    with smoothing(model, noise_scope="image"):
        watch(model.encoder, "after the call", seen)
        wanted = model(pixels)["tokens"]
        twin = copy.deepcopy(model)
        assert torch.equal(twin(pixels)["tokens"], wanted)
        seen.clear()
        found: list = []

        def ask(late: bool) -> None:
            for _ in range(20):
                if late:
                    watch(model.encoder, "before the call", seen).remove()
                found.append(model(pixels)["tokens"])

        threads = [threading.Thread(target=ask, args=(i == 0,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 80
    assert all(torch.equal(one, wanted) for one in found)
