"""Real frameworks in environments of their own; the default suite does not look in here.

``--report FILE`` writes what each family did, for ``matrix.py``. ``--brief`` leaves out what does not differ by
version, off the pinned transformers and of the rarer families.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fs_plugins import torchvision_schemas  # noqa: F401  (before anything that imports torchvision)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(
    str(Path(__file__).parents[1])
)  # for benchmarks; last, so that an installed fs_plugins is the one tested
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--brief", action="store_true", help="off the pinned transformers, rarer families in short")
    parser.addoption("--report", type=Path, help="write the kit's results on every family to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    import versions

    versions.brief = config.getoption("--brief")
    if config.getoption("--report"):
        config.pluginmanager.register(Recorder(config.getoption("--report")))


class Recorder:
    """Family -> test -> how it went."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.families: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        self.places: dict[str, int] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for place, item in enumerate(items):
            if family := getattr(getattr(item, "cls", None), "family", None):
                # Travels with the report to the process that writes, where several share the tests.
                item.user_properties.append(("family", (place, family, item.originalname)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = dict(report.user_properties).get("family")
        if told is None or not (report.when == "call" or report.outcome != "passed"):
            return
        place, family, test = told
        self.places[family] = min(place, self.places.get(family, place))
        if hasattr(report, "wasxfail"):
            kind, why = ("expected" if report.skipped else "failed"), report.wasxfail
        elif report.skipped:
            kind, why = "skipped", report.longrepr[2].removeprefix("Skipped: ")
        else:
            kind, why = report.outcome, ""
        self.families[family][kind][test] = why

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        import exceptions
        from mapping import classes, refused
        from test_families import absent, brief
        from versions import INSTALLED

        self.path.parent.mkdir(parents=True, exist_ok=True)
        families = sorted(self.families, key=self.places.__getitem__)
        told = {
            "transformers": str(INSTALLED),
            "torch": version("torch"),
            "families": {family: self.families[family] for family in families},
            "absent": {name: exceptions.ABSENT[name] for name in absent()},
            "brief": brief(),
            "mapping": {"classes": len(classes()), "refused": refused()},
        }
        self.path.write_text(json.dumps(told, indent=1), "utf-8")
