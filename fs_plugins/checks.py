"""What a number must be, asked in one place: Python counts True as a whole number, nobody else does."""

from __future__ import annotations

import math
from numbers import Real

from fs_plugins.errors import SettingError


def is_whole(value: object) -> bool:
    """Whether a value is an integer, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite real number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_whole(name: str, value: object, *, least: int = 1) -> None:
    """Refuse what is no whole number from ``least`` on.

    Args:
        name: of the setting, with what it means in brackets where that helps.

    Raises:
        SettingError: it is none.
    """
    if not (isinstance(value, int) and is_whole(value) and value >= least):
        raise SettingError(f"{name} must be a whole number >= {least}, got {value!r}.")


def check_sigma(sigma: object) -> None:
    """Refuse what is no noise level in [0, 1] pixel units.

    Raises:
        SettingError: no number, negative, or so large that it must be in 255ths.
    """
    if not (isinstance(sigma, int | float) and is_number(sigma) and sigma >= 0):
        raise SettingError(f"sigma must be a finite number >= 0 in [0, 1] pixel units (0.25 is usual), got {sigma!r}.")
    if sigma > 4:
        raise SettingError(
            f"sigma is in [0, 1] pixel units (0.25 is usual), got {sigma:g}; did you mean {sigma / 255:.3f}?"
        )
