"""The house: who may know whom, no circles, no framework in the core."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "fs_plugins"
FLOORS = (
    ("errors", "pickled", "terminal", "torchvision_schemas"),
    ("checks", "contents", "fields", "files", "kept", "noise", "outputs", "plain_yaml", "settings", "identity"),
    ("head", "layouts", "pictures", "readings"),
    ("vision",),
    ("answers", "sources", "psm"),
    ("smoothing",),
    ("patch",),
    ("hooks", "registry", "registry_entries", "registry_files", "state"),
    ("plugins",),
    ("choice", "probing", "publishing"),
    ("certificates", "attacks"),
    ("training",),
    ("api",),
    ("doctor", "evaluation"),
    ("testing", "hf", "demo", "photos", "vllm"),
    ("playground",),
    ("cli",),
)
"""From the ground up; a room may know those on its own floor and below."""
FRAMEWORKS = {"transformers", "open_clip", "open_flamingo", "llava", "timm", "lmms_eval", "vllm"}


@cache
def modules() -> dict[str, Path]:
    """fs_plugins' modules by their dotted names below the package, without adapters, which an entry point brings."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


@cache
def known(name: str) -> frozenset[str]:
    """What a module imports: modules of the package by their names below it, others by their first part."""
    tree = ast.parse(modules()[name].read_text("utf-8"))
    for node in ast.walk(tree):  # what only type checkers read
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(resolved for one in found if (resolved := _resolved(one)))


def _resolved(name: str) -> str | None:
    if not name.startswith("fs_plugins"):
        return name.split(".")[0]
    inside = name.removeprefix("fs_plugins").removeprefix(".")
    while inside and inside not in modules():
        inside = inside.rpartition(".")[0]
    return inside and f"fs_plugins.{inside}"


def floor(name: str) -> int:
    room = name.split(".")[0]
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def ours(name: str) -> list[str]:
    return [one.removeprefix("fs_plugins.") for one in known(name) if one.startswith("fs_plugins.")]


def test_every_room_is_on_a_floor():
    assert {name.split(".")[0] for name in modules()} == {room for rooms in FLOORS for room in rooms}


@pytest.mark.parametrize("name", modules())
def test_a_module_knows_none_above_it(name):
    above = {other for other in ours(name) if floor(other) > floor(name)}
    assert not above


@pytest.mark.parametrize("name", modules())
def test_a_module_is_in_no_import_circle(name):
    """A package's own module and those inside it count as one another's neighbours, not as a circle."""
    seen: set[str] = set()
    left = [other for other in ours(name) if other != name]
    while left:
        other = left.pop()
        assert other != name
        if other not in seen:
            seen.add(other)
            left += ours(other)


@pytest.mark.parametrize("name", modules())
def test_only_rooms_made_for_it_know_a_framework(name):
    named = {one for one in known(name) if one in FRAMEWORKS}
    assert not named or name.split(".")[0] in {"hf", "photos", "vllm"}


@pytest.mark.parametrize("name", modules())
def test_no_module_imports_an_adapter(name):
    assert "fs_plugins.adapters" not in " ".join(known(name))


MAKES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "randint", "randperm", "tensor", "zeros"}
DRAWS = {"bernoulli", "multinomial", "normal", "poisson", "rand", "rand_like", "randn", "randn_like"}
IN_PLACE = {"bernoulli_", "normal_", "random_", "uniform_"}
SOURCES = [*ROOT.rglob("*.py"), *(ROOT.parent / "adapters").rglob("*.py")]


@cache
def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """With the text of what is called; but for weights, which are made as their module is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    weights = {id(part) for name, node in found if name == "nn.Parameter" for part in node.args}
    return [(name, node) for name, node in found if id(node) not in weights]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_tensor_is_made_in_torchs_default_type_or_place(path):
    """They are the user's to set: a seed would give other numbers, and a sum lose its precision."""
    for called, call in calls(path):
        _, _, name = called.rpartition("torch.")
        if name in MAKES:
            whole = {"arange", "randint", "randperm"}  # made of whole numbers they are whole numbers
            needed = {"device"} if name in whole else {"device", "dtype"}
            assert needed <= {keyword.arg for keyword in call.keywords}, ast.unparse(call)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_all_noise_is_drawn_in_one_place(path):
    drawn = [ast.unparse(call) for called, call in calls(path) if called in {f"torch.{one}" for one in DRAWS}]
    drawn += [ast.unparse(call) for _, call in calls(path) if getattr(call.func, "attr", None) in IN_PLACE]
    assert not drawn or path == ROOT / "noise.py"


@pytest.mark.parametrize("name", sorted(modules().keys() - {"terminal"}))
def test_only_one_module_speaks_to_the_terminal(name):
    """Elsewhere nothing is printed, and nothing is made that rich would parse."""
    tree = ast.parse(modules()[name].read_text("utf-8"))
    taken = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rich"
        for alias in node.names
    }
    assert taken <= {"rich.box.HORIZONTALS", "rich.table.Table", "rich.progress.TaskID"}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"print", "typer.echo", "typer.secho", "click.echo", "sys.stdout.write", "sys.stderr.write"}
    assert "rich" not in {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_links_are_followed_in_one_way(path):
    """``Path.resolve`` is a RuntimeError for links that go in a circle, up to Python 3.12."""
    followed = [call for _, call in calls(path) if getattr(call.func, "attr", "") == "resolve" and not call.args]
    assert not followed, "use files.real"
