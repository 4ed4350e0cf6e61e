"""The processes that train together: those that accelerate started, or this one alone."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fs_plugins.errors import SettingError

PRECISIONS = ("fp32", "bf16", "fp16")
_NOT_WHOLE = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


class Crew(Protocol):
    """What training uses of an ``accelerate.Accelerator``; see its documentation."""

    @property
    def process_index(self) -> int: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def is_main_process(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def mixed_precision(self) -> str: ...

    scaler: Any

    def prepare(self, *things: Any) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...
    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> Any: ...
    def reduce(self, value: Tensor, how: str) -> Tensor: ...
    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]: ...
    def wait_for_everyone(self) -> None: ...
    def free_memory(self) -> Any: ...
    def end_training(self) -> None: ...


class Alone:
    """A crew of one process in full precision, without accelerate.

    Args:
        device: where it trains.
    """

    process_index, num_processes, is_main_process = 0, 1, True
    mixed_precision = "no"
    scaler: Any = None

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def prepare(self, *things: Any) -> tuple[Any, ...]:
        return things

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(list(parameters), max_norm)

    def reduce(self, value: Tensor, how: str) -> Tensor:
        return value

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def wait_for_everyone(self) -> None: ...

    def free_memory(self) -> None: ...

    def end_training(self) -> None: ...


def assemble(precision: str) -> Crew:
    """The processes of ``accelerate launch``, or this one, in a precision.

    Args:
        precision: one of ``PRECISIONS``.

    Raises:
        SettingError: another one, one that this machine does not have, no accelerate, or a model that would be spread
            over processes.
    """
    cpu = not torch.cuda.is_available()
    if precision not in PRECISIONS:
        raise SettingError(f"--precision is one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if precision == "fp16" and cpu:
        raise SettingError("--precision fp16 needs a GPU; on a CPU take bf16 or fp32.")
    try:
        from accelerate import Accelerator
    except ImportError:
        raise SettingError('This training needs accelerate: pip install "fs-plugins[train]".') from None
    try:
        crew = Accelerator(cpu=cpu, mixed_precision={"fp32": "no"}.get(precision, precision))
    except ValueError as error:
        raise SettingError(f"--precision {precision} does not work here: {error}") from None
    if crew.distributed_type.value in _NOT_WHOLE:
        raise SettingError(
            "Training runs whole in every process (accelerate launch --multi_gpu), not under "
            f"{crew.distributed_type.value}."
        )
    made: Crew = crew
    return made
