"""The transformers that is installed here, and the one that all of this is asked of in full."""

from __future__ import annotations

import re
from pathlib import Path

import transformers
from packaging.version import Version

INSTALLED = Version(transformers.__version__)
_CONSTRAINTS = (Path(__file__).parents[1] / "constraints.txt").read_text("utf-8")
PINNED = Version(re.search(r"^transformers==(\S+)$", _CONSTRAINTS, re.MULTILINE)[1])
brief = False
"""Whether this run was told to be brief."""
