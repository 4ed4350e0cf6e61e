"""What a vision module returns, and the parts of it that the language side consumes.

Shapes: N rows (draws times images), L tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fs_plugins.errors import ModelError


@dataclass(frozen=True)
class Field:
    """One field of a module's output: by name, or by position where the output is a plain tuple.

    A bare tensor stands for its own first field.
    """

    name: str
    position: int


@dataclass(frozen=True)
class Readout:
    """One thing the language side consumes out of the vision module's output.

    Args:
        name: part of a PSM's key, e.g. ``"hidden_states[-2][1:]"`` or ``"pooler_output"``.
        path: the way through the output: Fields, and ints for tuples and lists.
        width: D.
        tokens: L as consumed; 0 for a pooled vector (N, D), None where it follows from the image's size.
        skip: leading tokens that are not consumed (1 where the class token is dropped).
        channels_first: maps are (N, D, h, w), as of convolutional networks, not (N, h, w, D); each is L = h w tokens.
    """

    name: str
    path: tuple[Field | int, ...]
    width: int
    tokens: int | None = 0
    skip: int = 0
    channels_first: bool = False

    def get(self, output: Any) -> Tensor:
        """The consumed tensor, (N, L, D) or (N, D); tokens of several tiles side by side.

        Raises:
            ModelError: the output has no such field.
        """
        value = output
        for step in self.path:
            value = _step(value, step, self.name)
        if not isinstance(value, Tensor):
            raise ModelError(
                f"The vision module's output holds {type(value).__name__} where readout {self.name!r} expects a "
                "tensor. Ask the module for it (output_hidden_states=True), or name another readout."
            )
        if value.ndim > 3:
            value = value.flatten(2).transpose(1, 2) if self.channels_first else value.flatten(1, -2)
        return value[:, self.skip :] if self.skip else value

    def put(self, output: Any, value: Tensor) -> Any:
        """A copy of ``output`` with ``value`` in the readout's place; ``output`` is left alone."""
        return _put(output, self.path, value, self)


def _step(value: Any, step: Field | int, readout: str) -> Any:
    if isinstance(value, Tensor) and isinstance(step, Field) and step.position == 0:
        return value
    try:
        if isinstance(step, int):
            return value[step]
        return value[step.name] if isinstance(value, Mapping) else value[step.position]
    except (KeyError, IndexError, TypeError):
        raise ModelError(
            f"The vision module's output has no {step} for readout {readout!r}. "
            "Ask the module for it (output_hidden_states=True), or name another readout."
        ) from None


def _put(output: Any, path: tuple[Field | int, ...], value: Tensor, readout: Readout) -> Any:
    if not path or isinstance(output, Tensor):
        if readout.skip:
            value = torch.cat([output[:, : readout.skip], value], dim=1)
        if output.ndim > 3:
            value = (value.transpose(1, 2) if readout.channels_first else value).reshape(output.shape)
        return value
    step, rest = path[0], path[1:]
    inner = _put(_step(output, step, readout.name), rest, value, readout)
    if isinstance(output, Mapping):
        assert isinstance(step, Field)
        changed: Any = copy.copy(output)
        changed[step.name] = inner
        return changed
    at = step if isinstance(step, int) else step.position
    items = list(output)
    items[at] = inner
    return _sequence_like(output, items)


def map_tensors(outputs: Sequence[Any], change: Callable[[Sequence[Tensor]], Any]) -> Any:
    """Rebuild a nested output (mapping, tuple, list, tensor) from several of the same shape.

    ``change`` gets the tensors found at one place of all ``outputs``; what is no tensor comes from the first.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        return change(outputs)
    if isinstance(first, Mapping):
        changed: Any = copy.copy(first)
        for key in first:
            changed[key] = map_tensors([output[key] for output in outputs], change)
        return changed
    if isinstance(first, list | tuple):
        return _sequence_like(first, [map_tensors(items, change) for items in zip(*outputs, strict=True)])
    return first


def _sequence_like(original: Any, items: list[Any]) -> Any:
    if isinstance(original, tuple):
        return type(original)(*items) if hasattr(original, "_fields") else tuple(items)
    return items
