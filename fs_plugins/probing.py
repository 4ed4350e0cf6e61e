"""Whether smoothing stands on the only way from a picture to the answer: tried on two pictures, not believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.errors import ModelError
from fs_plugins.outputs import map_tensors
from fs_plugins.plugins import claim
from fs_plugins.vision import VisionCall, direct

Outcome = Callable[[Any, Any], Tensor]
"""Model, keyword arguments -> what it answers."""


def logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """What most models of transformers answer."""
    found: Tensor = model(**inputs).logits
    return found


@torch.no_grad()
def probe(
    model: nn.Module,
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    *,
    calls: Sequence[VisionCall] | None = None,
    outcome: Outcome = logits,
    tolerance: float = 1e-4,
) -> None:
    """Refuse a model whose answer takes anything from a picture beside the features that are smoothed.

    Two pictures are shown. Then the second is shown once more, with the features of the first in the place of its own:
    the answer must be the first's. It is not if the language side reads pixels, another layer, or a token that
    the readouts leave out. Whether smoothing is enabled plays no part.

    Args:
        one, other: the model's arguments by name, alike but for the picture.
        calls: where it looks at images; by default its adapter's answer.
        outcome: what it answers; its logits, if it returns them.
        tolerance: of that, relative to its largest number.

    Raises:
        ModelError: nothing that is hooked was called, the picture does not matter, or more of it reaches the answer.
    """
    stands = claim(model)[1] if calls is None else calls
    seen, wanted = witnessed(model, one, other, stands, outcome=outcome, tolerance=tolerance)
    with direct(), hooked((call.module, transplanting(call, iter(seen[i]))) for i, call in enumerate(stands)):
        found = outcome(model, other)
    if not (off := gap(found, wanted)) < tolerance:
        names = ", ".join(readout.name for call in stands for readout in call.readouts)
        raise ModelError(
            f"The answer takes more from a picture than {names} of the vision encoder: with these of one picture in "
            f"the place of another's it is not the one's (off by {off:.1e}). Smoothing them would leave a way around."
        )


@torch.no_grad()
def witnessed(
    model: nn.Module,
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    calls: Sequence[VisionCall],
    *,
    outcome: Outcome = logits,
    tolerance: float = 1e-4,
) -> tuple[list[list[Any]], Tensor]:
    """What each encoder returned about the first picture, call by call, and the answer.

    Args:
        one, other, outcome, tolerance: see ``probe``.

    Raises:
        ModelError: nothing that is hooked was called, or the picture does not matter.
    """
    seen: list[list[Any]] = [[] for _ in calls]
    with direct():
        with hooked((call.module, recording(into)) for call, into in zip(calls, seen, strict=True)):
            answer = outcome(model, one).clone()
        if not any(seen):
            kinds = ", ".join(type(call.module).__name__ for call in calls)
            raise ModelError(
                f"The model answered about a picture, and {kinds} was not called as a module (model.forward(...) "
                "called directly goes around hooks). What is never called cannot be smoothed."
            )
        if gap(outcome(model, other), answer) < tolerance:
            raise ModelError(
                "The model answers alike whatever picture it is shown, so how it looks at one cannot be learned."
            )
    return seen, answer


def gap(one: Tensor, other: Tensor) -> float:
    """How far two answers are apart, relative to the second's largest number."""
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max()) / (float(other.abs().max()) + 1e-6)


@contextmanager
def hooked(pairs: Any) -> Iterator[None]:
    """Post-hooks on modules, for the duration."""
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recording(into: list[Any]) -> Callable[..., None]:
    """A post-hook that keeps what a module returns."""
    return lambda module, args, output: into.append(kept(output))


def kept(output: Any) -> Any:
    """A copy that the model's own later assignments to fields, and arithmetic in place, do not reach."""
    return map_tensors([output], lambda one: one[0].clone())


def transplanting(call: VisionCall, recorded: Iterator[Any]) -> Callable[..., Any]:
    """A post-hook that puts recorded readouts in the place of what the module returns."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        donor = next(recorded)
        for readout in call.readouts:
            output = readout.put(output, readout.get(donor))
        return output

    return hook
