"""What the tests of judges share: a key, and what was scored before an error."""

from __future__ import annotations

import pytest

from fs_plugins import JudgeError

SECRET = "sk-tiny-0123456789abcdef"


def taken(scores) -> tuple[list[float], JudgeError]:
    """What was yielded before the error, and the error."""
    found = []
    with pytest.raises(JudgeError) as error:
        found.extend(scores)
    return found, error.value
