"""What a number must be, asked in one place, and given back as Python's own.

Numbers come from numpy and torch as readily as from Python. What is kept of them is the plain number, so that files,
digests and seeds are those of the plain number too. Python counts True as a whole number; nobody else does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from fs_plugins.errors import SettingError


def plain(value: Any) -> int | float | None:
    """The real number that a value of Python, numpy or torch is; None if it is none, or beyond what a float can hold.

    Arrays and tensors of no dimension are the number they hold. Truth values, text and complex numbers are none.
    """
    held = item(value)
    if isinstance(held, bool) or not isinstance(held, Real):
        return None
    number = int(held) if isinstance(held, Integral) else float(held)
    try:
        return number if math.isfinite(number) else None
    except OverflowError:
        return None


def item(value: Any) -> Any:
    """What an array, a tensor or a numpy number of no dimension holds; anything else is itself."""
    try:
        return value.item() if getattr(value, "shape", None) == () else value
    except RuntimeError:  # a tensor on meta holds nothing
        return value


def whole(name: str, value: Any, *, least: int | None = 1) -> int:
    """A whole number, from ``least`` on, as an int.

    Args:
        name: of the setting, with what it means in brackets where that helps.

    Raises:
        SettingError: it is none.
    """
    found = plain(value)
    if not isinstance(found, int) or (least is not None and found < least):
        above = "" if least is None else f" >= {least}"
        raise SettingError(f"{name} must be a whole number{above}, got {shown(value)}.")
    return found


def number(expected: str, value: Any, fits: Callable[[float], bool] = lambda found: True) -> float:
    """A finite number that fits, as a float.

    Args:
        expected: what must be so, as a sentence begins: "threshold must be a cosine in [0, 1]".

    Raises:
        SettingError: it is none, or does not fit.
    """
    found = plain(value)
    if found is None or not fits(float(found)):
        raise SettingError(f"{expected}, got {shown(value)}.")
    return float(found)


def sigma(value: Any, *, noisy: bool = False, pixels: bool = True) -> float:
    """A noise level, as a float.

    Args:
        noisy: whether 0, no noise, is refused as well.
        pixels: whether it is in [0, 1] pixel units, as everywhere but in certificates of another space.

    Raises:
        SettingError: no number, negative, or so large that it must be in 255ths.
    """
    unit = " in [0, 1] pixel units (0.25 is usual)" if pixels else ""
    found = number(
        f"sigma must be a finite number {'>' if noisy else '>='} 0{unit}",
        value,
        lambda level: level > 0 if noisy else level >= 0,
    )
    if pixels and found > 4:
        raise SettingError(
            f"sigma is in [0, 1] pixel units (0.25 is usual), got {found:g}; did you mean {found / 255:.3f}?"
        )
    return found


def seed(value: Any) -> int:
    """A seed, as an int.

    Raises:
        SettingError: no whole number.
    """
    return whole("seed", value, least=None)


def words(name: str, value: Any) -> str:
    """A text that a tokenizer can read: not the half surrogate pairs that bytes become which are no text.

    Raises:
        SettingError: none.
    """
    if not isinstance(value, str) or value != value.encode("utf-8", "replace").decode():
        raise SettingError(f"{name} must be text in the terminal's encoding, got {shown(value)}.")
    return value


def settle(owner: object, **values: Any) -> None:
    """Put what a frozen value was found to be in place of what it was given as, when it is made."""
    for name, value in values.items():
        object.__setattr__(owner, name, value)


def shown(value: Any) -> str:
    """A value as Python writes it, in errors."""
    try:
        return repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return f"a {type(value).__name__} of thousands of digits"


def recording(what: str) -> None:
    """Refuse to begin what follows gradients inside ``torch.inference_mode``; ``no_grad`` is lifted by who does it.

    Raises:
        SettingError: torch is in that mode.
    """
    import torch  # the command line checks numbers before it needs torch

    if torch.is_inference_mode_enabled():
        raise SettingError(
            f"{what} needs gradients, and inside torch.inference_mode none are recorded. Call it outside, or inside "
            "torch.no_grad, which does no harm."
        )
