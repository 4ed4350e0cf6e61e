"""What numbers a file may hold, as pydantic's fields: the rules of ``checks``, where pydantic alone would take a truth
value, a text of digits, NaN and infinity.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import BeforeValidator, Field

from fs_plugins import checks

is_whole = BeforeValidator(partial(checks.whole, "it", least=None))
"""For types that pydantic compares by value, to which True is 1."""

Number = Annotated[float, BeforeValidator(partial(checks.number, "it must be a finite number"))]
Whole = Annotated[int, is_whole]
Count = Annotated[Whole, Field(ge=1)]
Sigma = Annotated[float, BeforeValidator(partial(checks.sigma, noisy=True))]
"""A level of noise: what something is trained for cannot be none."""
Level = Annotated[float, BeforeValidator(checks.sigma)]
"""A level of noise, or none."""
