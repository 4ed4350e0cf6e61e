"""The page's engine on the models that ship, made once."""

from __future__ import annotations

from threading import Event

import pytest

from fs_plugins.playground.engine import Playground, Visitor
from fs_plugins.playground.models import Models


@pytest.fixture(scope="session")
def models() -> Models:
    return Models(["demo", "demo-clip"])


@pytest.fixture
def playground(models) -> Playground:
    return Playground(models)


@pytest.fixture
def visitor() -> Visitor:
    return Visitor("somebody", Event())
