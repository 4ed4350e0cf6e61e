"""Standing where the model looks: torch hooks on the vision encoder, and nothing else.

The encoder, its class and its ``forward`` stay as they are; state_dict is untouched. Deep copies and
pickles of an enabled model are enabled too, each with its own encoder.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.errors import FSPluginsWarning, PixelError
from fs_plugins.smoothing import FeatureSmoother, Tally
from fs_plugins.vision import direct, is_direct


@dataclass(frozen=True)
class SmoothingEvent:
    """What observers are told after each smoothed vision call.

    ``seconds`` is the whole call's wall time on the host; on an accelerator work may still be queued.
    """

    adapter: str
    images: int
    n0: int
    sigma: float
    seconds: float
    non_finite: int


class _Pickled:
    """Thread-bound parts are left out of copies and made anew."""

    _fresh: tuple[tuple[str, Callable[[], Any]], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        fresh = {name for name, _ in self._fresh}
        return {name: value for name, value in self.__dict__.items() if name not in fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name, make in self._fresh:
            setattr(self, name, make())


class SmoothingHook(_Pickled):
    """The pair of hooks on one vision encoder. Holds counts, never a call's state across threads."""

    _fresh = (("_pending", threading.local), ("_lock", threading.Lock))

    def __init__(
        self, smoother: FeatureSmoother, adapter: str, observe: Callable[[SmoothingEvent], None] | None
    ) -> None:
        self.smoother = smoother
        self.adapter = adapter
        self.observe = observe
        self.calls = self.images = self.draws = self.non_finite = 0
        self.seconds = 0.0
        self.warned: set[str] = set()
        self._pending = threading.local()
        self._lock = threading.Lock()

    def attach(self) -> None:
        module = self.smoother.call.module
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        # always_call: an exception inside the encoder must not leave this thread's call pending.
        module.register_forward_hook(self.after, with_kwargs=True, always_call=True)

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._pending.call = None
        call = self.smoother.call
        name = call.pixels.argument
        pixels = kwargs.get(name, args[0] if args else None)
        if is_direct() or self.smoother.is_identity or pixels is None:
            if pixels is not None and not is_direct():
                self._count(Tally(len(pixels), 0), 0.0)
            return None
        if warning := call.pixels.check(pixels):
            self._warn("range", warning)
        if tuple(pixels.shape[-2:]) != call.image_size and self.smoother.psm is not None:
            raise PixelError(
                f"The encoder was given {pixels.shape[-2]}x{pixels.shape[-1]} pixels; its PSM was made for "
                f"{call.image_size[0]}x{call.image_size[1]}. Resize the images, or enable with psm=None."
            )
        if module.training:
            self._warn(
                "training",
                "The vision encoder is in training mode; smoothing goes on, but its features are not those of model.eval().",
            )
        if len(pixels) == 0:
            return None
        original = (args, dict(kwargs))
        tally = Tally()
        passes = self.smoother.passes(call.pixels.to_unit(pixels), pixels.dtype, tally)
        began = time.perf_counter()
        step = next(passes)
        self._pending.call = (passes, step, original, tally, began)
        return self._arguments(step, original)

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        pending = getattr(self._pending, "call", None)
        if is_direct() or pending is None:
            return None
        self._pending.call = None
        if output is None:  # the encoder raised
            return None
        passes, _, original, tally, began = pending
        try:
            while True:
                step = passes.send(output)
                step_args, step_kwargs = self._arguments(step, original)
                with direct():
                    output = module(*step_args, **step_kwargs)
        except StopIteration as stop:
            self._count(tally, time.perf_counter() - began)
            return stop.value

    def _arguments(
        self, step: Any, original: tuple[tuple[Any, ...], dict[str, Any]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The encoder's own arguments with the pass's pixels in place and batched tensors repeated with them."""
        args, kwargs = original
        name = self.smoother.call.pixels.argument
        batch = len(kwargs[name] if kwargs.get(name) is not None else args[0])

        def expanded(value: Any) -> Any:
            return step.expand(value) if isinstance(value, Tensor) and value.ndim and len(value) == batch else value

        new_kwargs = {key: expanded(value) for key, value in kwargs.items()}
        for key, value in self.smoother.call.kwargs.items():
            if not new_kwargs.get(key):
                new_kwargs[key] = value
        if kwargs.get(name) is not None:
            new_kwargs[name] = step.pixels
            return tuple(map(expanded, args)), new_kwargs
        return (step.pixels, *map(expanded, args[1:])), new_kwargs

    def _count(self, tally: Tally, seconds: float) -> None:
        with self._lock:
            self.calls += 1
            self.images += tally.images
            self.draws += tally.images * tally.draws
            self.non_finite += tally.non_finite
            self.seconds += seconds
        if tally.non_finite:
            self._warn(
                "non-finite",
                f"{tally.non_finite} draws gave NaN or infinite features and were left out of the average.",
            )
        if self.observe is not None:
            self.observe(
                SmoothingEvent(self.adapter, tally.images, tally.draws, self.smoother.sigma, seconds, tally.non_finite)
            )

    def _warn(self, kind: str, message: str) -> None:
        with self._lock:
            if kind in self.warned:
                return
            self.warned.add(kind)
        warnings.warn(message, FSPluginsWarning, stacklevel=4)


class Witness(_Pickled):
    """Counts the model's own calls that carry pixels, so that ``status`` can tell a bypassed encoder."""

    _fresh = (("_lock", threading.Lock),)

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self.calls = 0
        self._lock = threading.Lock()

    def attach(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self.before, with_kwargs=True)

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get(self.argument) is not None and not is_direct():
            with self._lock:
                self.calls += 1


def hooks_of(model: nn.Module) -> tuple[list[SmoothingHook], list[Witness]]:
    """Our hooks found on the model itself, so that copies and reloaded pickles answer for themselves."""
    smoothing: dict[int, SmoothingHook] = {}
    witnesses: dict[int, Witness] = {}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, SmoothingHook):
                smoothing[id(owner)] = owner
            elif isinstance(owner, Witness):
                witnesses[id(owner)] = owner
    return list(smoothing.values()), list(witnesses.values())


def detach(model: nn.Module) -> None:
    """Remove every hook of ours from the model."""
    for module in model.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            table = getattr(module, name)
            ours = [
                key
                for key, hook in table.items()
                if isinstance(getattr(hook, "__self__", None), SmoothingHook | Witness)
            ]
            for key in ours:
                for companion in _COMPANIONS[name]:
                    with suppress(AttributeError, KeyError):
                        del getattr(module, companion)[key]
                del table[key]


_COMPANIONS: Mapping[str, tuple[str, ...]] = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


def recompile() -> None:
    """Make torch.compile look again: compiled code that has already run does not see hooks come or go."""
    import sys

    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
