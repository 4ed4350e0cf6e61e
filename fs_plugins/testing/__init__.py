"""The conformance kit for adapter authors: ``class TestMine(AdapterConformance): ...``.

Strangers' test suites inherit from it: moving or renaming a test here breaks their lists of expected failures.
"""

from fs_plugins.testing.conformance import AdapterConformance

__all__ = ["AdapterConformance"]
