"""Standing where the model looks: torch hooks on the vision encoder, and nothing else.

The encoder, its class and its ``forward`` stay as they are; state_dict is untouched. Deep copies and
pickles of an enabled model are enabled too, each with its own encoder.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType
from typing import Any, TypeVar, cast

import torch
import wrapt
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fs_plugins.errors import ModelError, PixelError, warn
from fs_plugins.pickled import Pickled
from fs_plugins.smoothing import FeatureSmoother, Pass, Tally
from fs_plugins.vision import direct, is_direct

DYNAMO = "torch._dynamo"
NO_GRAPH = (
    "Smoothing draws fresh noise in Python at every call, and an exported or traced graph would hold one call's noise, "
    "for one number of images, for ever. Export the model without it (fs_plugins.disable(model)), and enable it where "
    "the model is called from Python; torch.compile without fullgraph works"
)
LATER = "later"
"""Stands for a call whose passes are all run after the encoder has been, once, on the pixels as they came."""
F = TypeVar("F", bound=Callable[..., Any])


def _eager(function: F) -> F:
    """``torch.compiler.disable``, but for importing the compiler before anyone else has."""
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if DYNAMO not in sys.modules:
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    run._torchdynamo_disable_msg = NO_GRAPH  # type: ignore[attr-defined]
    return cast(F, run)


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


class _Hook(Pickled):
    """What ``detach`` removes: bound methods of these are ours."""


@dataclass(frozen=True)
class _Call:
    """A vision call that is under way.

    Args:
        passes: what the encoder is still to be run on.
        step: the first of them.
        named: the arguments' names, the arguments by name, and how many came by position.
        order: the images' numbers and the pixels they came in, for putting outputs in order.
        began: when, in ``time.perf_counter``'s seconds.
    """

    passes: Generator[Pass, Any, list[Any]]
    step: Pass
    named: tuple[Sequence[str], Mapping[str, Any], int]
    order: tuple[Sequence[int], Tensor]
    tally: Tally
    began: float


class SmoothingHook(_Hook):
    """The pair of hooks on one vision encoder, the adapter's ``place``-th. No call's state crosses threads.

    Whatever others hook to the encoder stands around the pair, whenever it was registered: it is run once a call, is
    handed the arguments as they came and the smoothed output, and what it changes is what is smoothed or served.
    """

    _fresh = (("_pending", threading.local), ("_lock", threading.Lock))

    def __init__(
        self,
        smoother: FeatureSmoother,
        adapter: str,
        observe: Callable[[SmoothingEvent], None] | None,
        place: int = 0,
    ) -> None:
        self.place = place
        self.smoother = smoother
        self.adapter = adapter
        self.observe = observe
        self.calls = self.images = self.draws = self.non_finite = 0
        self.seconds = 0.0
        self.warned: set[str] = set()
        self._pending = threading.local()
        self._lock = threading.Lock()

    def attach(self) -> None:
        for module in _alternatives(self.smoother.call.module):
            module.register_forward_pre_hook(self.before, with_kwargs=True)
            # always_call: an exception inside the encoder must not leave this thread's call pending.
            module.register_forward_hook(self.after, with_kwargs=True, always_call=True, prepend=True)

    @_eager
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._pending.call = None
        if is_direct():
            return None
        if _recorded() and not self.smoother.is_identity:
            raise ModelError(f"{NO_GRAPH}.")
        if self._followed(module) or _backward(module):  # others have yet to see these arguments, or to change them
            self._pending.call = LATER
            return None
        call = self._begin(module, args, kwargs)
        if call is None:
            return None
        noisy, named = self._arguments(call.step, *call.named)
        shown = (list(noisy), named)
        self._pending.call = call, (shown, args, kwargs)
        return shown

    @_eager
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if is_direct():
            return None
        pending = getattr(self._pending, "call", None)
        self._pending.call = None
        if pending is None:
            return None
        call: _Call | None = None
        if pending is not LATER:
            call, ((positional, named), *came) = pending
            # Torch hands the same list and dictionary on to hooks after ours, which are to see what came.
            positional[:] = came[0]
            named.clear()
            named.update(came[1])
        if output is None:  # the encoder raised
            return None
        if call is None:
            call = self._begin(module, args, kwargs)
            if call is None:
                return None
            output = self._run(module, call.step, call)
        try:
            while True:
                output = self._run(module, call.passes.send(output), call)
        except StopIteration as stop:
            self._count(call.tally, time.perf_counter() - call.began)
            return self.smoother.call.pixels.layout.closed(stop.value, *call.order)

    def _run(self, module: nn.Module, step: Pass, call: _Call) -> Any:
        """A pass of the encoder by itself, inside the hooks of this one call."""
        args, kwargs = self._arguments(step, *call.named)
        with direct():
            return module.forward(*args, **kwargs)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """Check a vision call; None where there is nothing to smooth.

        Raises:
            PixelError: no pixels, or ones that cannot be smoothed.
        """
        call = self.smoother.call
        space = call.pixels
        names, given = named_arguments(module, space.argument, args, kwargs)
        pixels = given.get(space.argument)
        if pixels is None:
            raise PixelError(
                f"The vision encoder was called with {', '.join(given) or 'nothing'} and without {space.argument}, so "
                "what it looks at cannot be smoothed. Does the adapter name the right pixel argument?"
            )
        space.check(pixels)
        groups = space.layout.groups(pixels, given) if len(pixels) else []
        if self.smoother.is_identity or not groups:
            self._count(Tally(sum(len(group.units) for group in groups)), 0.0)
            return None
        for group in groups:
            if warning := space.check_range(space.to_unit(group.pixels)):
                self._warn("range", warning)
            if wrong := self.smoother.unfit(group.pixels):
                raise PixelError(wrong)
        if call.training:
            self._warn(
                "training",
                "The vision encoder is in training mode; smoothing goes on, but its features are not those of "
                "model.eval().",
            )
        tally, began = Tally(), time.perf_counter()
        passes = self.smoother.passes(groups, pixels[0].dtype, tally)
        units = [unit for group in groups for unit in group.units]
        return _Call(passes, next(passes), (names, given, len(args)), (units, pixels), tally, began)

    def _followed(self, module: nn.Module) -> bool:
        """Whether hooks of others are still to come before the encoder runs; ours are put next to it.

        Torch has listed this call's hooks before the encoder already, so there it helps from the next call on.
        """
        tables = cast("list[OrderedDict[int, Any]]", [module._forward_hooks, module._forward_pre_hooks])
        for table, last in zip(tables, (False, True), strict=True):
            keys = list(reversed(table) if last else table)
            own = next((i for i, key in enumerate(keys) if _ours(table[key]) is self), 0)
            followed = any(_ours(table[key]) is None for key in keys[:own])
            if followed:
                table.move_to_end(keys[own], last=last)
        return followed

    def _arguments(
        self, step: Pass, names: Sequence[str], given: Mapping[str, Any], positional: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The encoder's own arguments with the pass's in their place, each as it was passed."""
        call = self.smoother.call
        changed = {**given, **call.pixels.layout.taken(step.arguments(call.pixels.argument))}
        for name, value in call.kwargs.items():
            if not changed.get(name):
                changed[name] = value
        args = tuple(changed.pop(name) for name in names[:positional])
        return args, {name: value for name, value in changed.items() if name not in call.pixels.layout.derived}

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
        warn(message)


class Witness(_Hook):
    """Counts the model's own calls with pixels that succeeded, so that ``status`` can tell a bypassed encoder."""

    _fresh = (("_lock", threading.Lock),)

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = tuple(arguments)
        self.calls = 0
        self._lock = threading.Lock()

    def attach(self, model: nn.Module) -> None:
        model.register_forward_hook(self.after, with_kwargs=True)

    @_eager
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        _, given = named_arguments(module, None, args, kwargs)
        if any(given.get(name) is not None for name in self.arguments) and not is_direct():
            with self._lock:
                self.calls += 1


class GradScope(_Hook):
    """Keeps gradients on in a module around which the framework switches them off, while its inputs require them.

    OpenFlamingo and the original LLaVA run vision under ``no_grad``, which blinds whoever attacks the smoothed
    model. Where the module is called inside the ``no_grad`` the mode is set for the call; where the
    ``no_grad`` decorates the module's own ``forward`` it is kept from taking effect. A caller's own
    ``no_grad`` around a decorated module stays in force. The mode is restored after every exception; a
    KeyboardInterrupt skips torch's hooks, and may leave gradients on until the framework's or the caller's own
    ``no_grad`` ends.
    """

    _fresh = (("_entered", threading.local),)

    def __init__(self) -> None:
        self._entered = threading.local()

    @_eager
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_direct():  # around any smoothing
            return
        self._entered.undo = None
        if torch.is_inference_mode_enabled() or not _requires_grad((args, kwargs)):
            return
        if torch.is_grad_enabled():
            mode = _KeepGradients()
            mode.__enter__()
            self._entered.undo = lambda: mode.__exit__(None, None, None)
        else:
            torch.set_grad_enabled(True)
            self._entered.undo = lambda: torch.set_grad_enabled(False)

    @_eager
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        undo = getattr(self._entered, "undo", None)
        if undo is not None and not is_direct():
            self._entered.undo = None
            undo()


class _KeepGradients(TorchFunctionMode):
    """Ignores the first ``no_grad`` and what it restores; after that it does nothing.

    A KeyboardInterrupt skips torch's hooks, so the mode can be left behind: inert by then, for ``no_grad``
    has been left on the way out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._depth, self._done = 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled and not self._done:
            self._depth += -1 if args[0] else 1
            self._done = self._depth <= 0
            return None
        return func(*args, **(kwargs or {}))


def attach(hooks: Sequence[SmoothingHook], model: nn.Module, inputs: Sequence[str]) -> None:
    """Attach everything. Gradient scopes go outermost: first before, last after."""
    scopes = [(GradScope(), hook.smoother.call.grad_scope) for hook in hooks]
    for scope, module in scopes:
        if module is not None:
            module.register_forward_pre_hook(scope.before, with_kwargs=True)
    for hook in hooks:
        hook.attach()
    for scope, module in scopes:
        if module is not None:
            module.register_forward_hook(scope.after, with_kwargs=True, always_call=True)
    Witness(inputs).attach(model)


def _alternatives(module: nn.Module) -> list[nn.Module]:
    """The module, or those that PEFT's ``modules_to_save`` wrapper chooses from: merging throws the wrapper away."""
    saved = getattr(module, "modules_to_save", None)
    original = getattr(module, "original_module", None)
    if isinstance(saved, nn.ModuleDict) and isinstance(original, nn.Module):
        return [original, *saved.values()]
    return [module]


def named_arguments(
    module: nn.Module, first: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """Names of the positional arguments, and all arguments by name. ``first`` is what we call the first one."""
    if not args:
        return [], kwargs
    names = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ][: len(args)]
    names += [f"*{i}" for i in range(len(names), len(args))]
    if first is not None:
        names[0] = first
    return names, {**dict(zip(names, args, strict=True)), **kwargs}


def _recorded() -> bool:
    """Whether torch is making a graph of this call, and of the tensors in it (torch.jit.trace, torch.export, ONNX)."""
    # What torch.compile breaks its graph for, as it does for our hooks, runs after it has compiled.
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def _backward(module: nn.Module) -> bool:
    """Whether hooks on gradients see the arguments: torch wraps them after all hooks before the call."""
    everywhere = torch.nn.modules.module
    return any(
        (
            module._backward_hooks,
            module._backward_pre_hooks,
            everywhere._global_backward_hooks,
            everywhere._global_backward_pre_hooks,
        )
    )


def _requires_grad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(map(_requires_grad, items))


def hooks_of(model: nn.Module) -> tuple[list[SmoothingHook], list[Witness]]:
    """Our hooks found on the model itself, so that copies and reloaded pickles answer for themselves."""
    owners = {id(owner): owner for module in model.modules() for hook in _hooks(module) if (owner := _ours(hook))}
    smoothing = [owner for owner in owners.values() if isinstance(owner, SmoothingHook)]
    witnesses = [owner for owner in owners.values() if isinstance(owner, Witness)]
    return sorted(smoothing, key=lambda hook: hook.place), witnesses


def _hooks(module: nn.Module) -> list[Callable[..., Any]]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _ours(hook: Callable[..., Any]) -> _Hook | None:
    """Whose method a hook is, if it is one of ours."""
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, _Hook) else None


def detach(model: nn.Module) -> None:
    """Remove every hook of ours from the model."""
    for module in model.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            table = getattr(module, name)
            ours = [key for key, hook in table.items() if _ours(hook)]
            for key in ours:
                for companion in _COMPANIONS[name]:
                    with suppress(AttributeError, KeyError):
                        del getattr(module, companion)[key]
                del table[key]


_COMPANIONS: Mapping[str, tuple[str, ...]] = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


def patched(model: nn.Module) -> list[nn.Module]:
    """The modules of the model that carry hooks of ours."""
    return [module for module in model.modules() if any(map(_ours, _hooks(module)))]


def recompile(modules: Sequence[nn.Module]) -> None:
    """Make torch.compile look again at these modules: compiled code that has run does not see hooks come or go.

    By default dynamo checks no hooks that were not there when it compiled. So a model may stay unsmoothed that was
    compiled before, and also one of whose class another model, without smoothing, was compiled first. From the first
    ``enable`` on it is told to check, as soon as anybody imports it; and what it compiled of these modules' classes
    before is dropped. Code of other classes stays.
    """
    wrapt.register_post_import_hook(_check_hooks, f"{DYNAMO}.config")
    if DYNAMO not in sys.modules:
        return
    from torch._dynamo import convert_frame, eval_frame

    marks = {str(mark) for module in modules for mark in (id(module), id(type(module)))}
    try:
        seen = [*convert_frame.input_codes.seen, *convert_frame.output_codes.seen]
        codes = [code for reference in seen if (code := reference()) is not None]
        concerned = [code for code in codes if marks & set(re.findall(r"\d+", _guards(code)))]
    except AttributeError:  # another version's internals
        torch._dynamo.reset()
        return
    for code in concerned:
        eval_frame.remove_from_cache(code)


def _check_hooks(config: Any) -> None:
    config.skip_nnmodule_hook_guards = False


def _guards(code: CodeType) -> str:
    """What the compiled code of a function depends on, in dynamo's words; ids of modules and classes are among them."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return "\n".join(str(entry.guard_manager) for entry in _debug_get_cache_entry_list(code))
