"""Write docs/reference/compatibility.md from the reports of the integration runs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from exceptions import EXEMPTIONS

HEAD = """# Compatibility

Every family is a small, randomly initialised model of the framework's own class, and every cell is a run of the
[conformance kit](../how-to/write-an-adapter.md#the-conformance-kit) on it. `make integration` builds the environments,
runs the kit and writes this page.

A number is of tests that passed. `+1 (a)` is a test that must fail or is not run, for the reason (a) below, and
`+2 (a)` is two such. It is the whole kit but where it says *model only*: image models share one adapter, so the whole
kit is run on all of them in one version of transformers, and in the others on one for each way through it, with the
tests about the model itself on the rest.
"""


def main(out: Path, reports: list[Path]) -> None:
    runs = sorted(
        (json.loads(path.read_text("utf-8")) for path in reports), key=lambda run: _order(run["transformers"])
    )
    reasons: dict[str, str] = {}
    rows = [_row(family, runs, reasons) for family in _families(runs)]
    columns = [f"transformers {run['transformers']}" for run in runs]
    lines = [HEAD, f"| family | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}", *rows, ""]
    lines += [f"- ({mark}) {reason}" for reason, mark in reasons.items()]
    lines += ["", *_counted(runs)]
    lines += [
        "",
        "Tests that do not apply are not counted: generating where a model does not, pickling where the model itself "
        f"does not, a second device where there is none. Everything ran on torch {runs[0]['torch']}.",
        "",
    ]
    out.write_text("\n".join(lines), encoding="utf-8")
    failed = [
        f"{family}: {test}"
        for run in runs
        for family, kinds in run["families"].items()
        for test in kinds.get("failed", ())
    ]
    print(f"Written: {out}; {len(rows)} families on {', '.join(columns)}; {len(failed)} failures.")
    for line in failed:
        print("  failed", line)


def _counted(runs: list[dict[str, Any]]) -> list[str]:
    """How many of transformers' own classes are covered, and why the others are not."""
    counts = [
        f"{run['mapping']['classes'] - len(run['mapping']['refused'])} of {run['mapping']['classes']} of transformers "
        f"{run['transformers']}"
        for run in runs
    ]
    reasons = {name: why for run in runs for name, why in run["mapping"]["refused"].items()}
    head = "Of the classes that transformers lists as image-text-to-text, "
    return [
        f"{head}{', '.join(counts)} are covered. The others:",
        "",
        *(f"- `{name}`: {why}" for name, why in sorted(reasons.items())),
    ]


def _families(runs: list[dict[str, Any]]) -> list[str]:
    """All families, in the order of the run that has most."""
    names: dict[str, None] = {}
    for run in sorted(runs, key=lambda run: -len(run["families"])):
        names |= dict.fromkeys([*run["families"], *run["absent"]])
    return list(names)


def _row(family: str, runs: list[dict[str, Any]], reasons: dict[str, str]) -> str:
    return f"| {family} | {' | '.join(_cell(family, run, reasons) for run in runs)} |"


def _cell(family: str, run: dict[str, Any], reasons: dict[str, str]) -> str:
    if family in run["absent"]:
        return f"none ({_mark(run['absent'][family], reasons)})"
    if family not in run["families"]:
        return "not run"
    kinds = run["families"][family]
    if kinds.get("failed"):
        return f"**{len(kinds['failed'])} failed**"
    exempt = dict(kinds.get("expected", {}))
    known = {exemption.reason for exemption in EXEMPTIONS}
    exempt |= {test: why for test, why in kinds.get("skipped", {}).items() if why in known}
    marks = "".join(f" +{count} ({_mark(why, reasons)})" for why, count in Counter(exempt.values()).items())
    return f"{len(kinds.get('passed', ()))}{' *model only*' * (family in run['brief'])}{marks}"


def _mark(reason: str, reasons: dict[str, str]) -> str:
    """Its letter, or two where there are many."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    more, place = divmod(len(reasons), len(letters))
    return reasons.setdefault(reason, letters[place] * (more + 1))


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
