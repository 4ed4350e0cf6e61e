"""SHA-256 of what a state dict holds, in another process as in this one: tensors bit for bit, and all else by value.

Besides plain tensors there are quantised ones, tensors made of tensors (torchao, DTensor), packed weights in tuples and
in torch's own script objects, and what modules keep by ``get_extra_state``.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Set
from hashlib import sha256
from pickle import PicklingError
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fs_plugins.errors import ModelError


class Sink(Protocol):
    """A hash under way."""

    def update(self, data: Any, /) -> None: ...


def is_plain(value: object) -> bool:
    """Whether a value is a tensor whose numbers are its storage's: not quantised, and not made of other tensors."""
    return isinstance(value, Tensor) and not value.is_quantized and not is_traceable_wrapper_subclass(value)


def feed(sink: Sink, name: str, value: object) -> None:
    """Put a named value into a hash; of a tensor on the meta device only its type and shape.

    Raises:
        ModelError: it holds something that cannot be written down, such as an open file.
    """
    try:
        _feed(sink, name, value)
    except (TypeError, AttributeError, RuntimeError, PicklingError) as error:
        if isinstance(value, Tensor):
            raise
        raise ModelError(
            f"{name} of the model is a {type(value).__name__} whose content cannot be read ({error}), so nobody can "
            "tell these weights from others. Give its class a __reduce__ or a __getstate__ that says it."
        ) from None


def _feed(sink: Sink, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        sink.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.is_meta:
            return
        if is_traceable_wrapper_subclass(value):
            inner, more = value.__tensor_flatten__()
            _feed(sink, _kind(value), [getattr(value, part) for part in inner])
            _feed(sink, "with", more)
        elif value.is_quantized:
            _feed(sink, str(value.qscheme()), [value.int_repr(), *_scales(value)])
        else:
            sink.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    elif value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device):
        text = repr(value)
        sink.update(f"{name} {_kind(value)} {len(text)} {text}".encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        sink.update(f"{name} bytes {len(data)} ".encode() + data)
    elif isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        sink.update(f"{name} is {value.__module__}.{value.__qualname__} ".encode())
    elif type(value) in (tuple, list):
        sink.update(f"{name} {_kind(value)} {len(value)} ".encode())
        for i, part in enumerate(value):
            _feed(sink, f"{i}", part)
    elif isinstance(value, Mapping):
        # In whatever order they were put in: some come out of sets.
        _feed(sink, f"{name} {_kind(value)}", sorted(_alone(pair) for pair in value.items()))
    elif isinstance(value, Set):
        _feed(sink, f"{name} {_kind(value)}", sorted(_alone(part) for part in value))
    else:
        made = value.__reduce_ex__(4)
        listed = made if isinstance(made, str) else [list(part) if hasattr(part, "__next__") else part for part in made]
        _feed(sink, f"{name} {_kind(value)}", listed)


def _scales(tensor: Tensor) -> tuple[Any, ...]:
    if "per_tensor" in str(tensor.qscheme()):
        return tensor.q_scale(), tensor.q_zero_point()
    return tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()


def _alone(value: object) -> bytes:
    own = sha256()
    _feed(own, "", value)
    return own.digest()


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
