"""The conformance kit for adapter authors: ``class TestMine(AdapterConformance): ...``.

Strangers' test suites inherit from it: moving or renaming a test here breaks their lists of expected failures.
"""

import pytest

# Without this a stranger's failing test would show a bare assert.
pytest.register_assert_rewrite("fs_plugins.testing.conformance")

from fs_plugins.testing.conformance import AdapterConformance  # noqa: E402

__all__ = ["AdapterConformance"]
