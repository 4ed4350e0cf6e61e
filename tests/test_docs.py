"""All code in the README and the docs runs, or is a command that CI runs; links lead somewhere; lists are whole."""

from __future__ import annotations

import importlib
import re
import shutil
import warnings
from pathlib import Path

import pytest
import yaml
from support import make_classifier

import fs_plugins
from fs_plugins import hooks
from fs_plugins.demo import assets, world
from fs_plugins.evaluation.datasets import open_dataset
from fs_plugins.settings import build, read

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def blocks(language: str) -> list[pytest.param]:
    """The code of all pages; that of a tutorial is one walk."""
    found = []
    for page in PAGES:
        code = re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        if page.parent.name == "tutorial" and language == "python":
            code = ["\n".join(code)]
        found += [pytest.param(text, id=f"{page.relative_to(ROOT)}-{i}") for i, text in enumerate(code)]
    return found


def shown_file(code: str) -> re.Match[str] | None:
    """The first line, where it names the file that the block is."""
    return re.match(r"# (docs/\S+)\n", code)


def run(code: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "documentation", "exec"), {})


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where a reader of the docs is: a folder with photographs, and the demo's scene."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DOCS / "example-plugin" / "src"))
    (tmp_path / "photos").mkdir()
    for i in range(20):
        world.scene("train", i).draw().save(tmp_path / "photos" / f"{i}.png")
    world.scene("heldout", 0).draw().save(tmp_path / "photo.jpg")
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "scene.png", tmp_path / "docs")
    make_classifier().save_pretrained(tmp_path / "classifier")
    return tmp_path


@pytest.mark.parametrize("code", [block for block in blocks("python") if not block.id.startswith("docs/tutorial")])
def test_python_blocks_run(code, place):
    """The demo's model stands in for the one a reader has; a file that is shown is the file."""
    if shown := shown_file(code):
        assert code[shown.end() :] == (ROOT / shown[1]).read_text("utf-8")
    code = re.sub(r'"llava-hf/[^"]+"', repr(str(assets.LLAVA)), code)
    code = re.sub(r'"openai/[^"]+"', repr(str(assets.CLIP)), code)
    code = re.sub(r'"google/[^"]+"', repr(str(place / "classifier")), code)
    code = code.replace('"fare4"', '"demo-clip"')
    run(re.sub(r"steps=\d[\d_]*", "steps=2", code))


@pytest.mark.parametrize("code", [block for block in blocks("python") if block.id.startswith("docs/tutorial")])
def test_a_tutorial_prints_what_it_says(code, place, capsys):
    run(code)
    printed = iter(capsys.readouterr().out.splitlines())
    for said in re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE):
        assert said in printed, f"{said} is not printed, or not at its place"


@pytest.mark.parametrize("code", blocks("yaml"))
def test_settings_in_a_file_are_settings(code, tmp_path):
    """A block that is called after a command is one for its --config; others are registries."""
    command = re.match(r"# (\w+)\.yaml\n", code)
    if command is None:
        assert yaml.safe_load(code)["version"] == 1
        return
    (tmp_path / "settings.yaml").write_text(code, "utf-8")
    package = {"evaluate": "evaluation", "train": "training"}[command[1]]
    kind = importlib.import_module(f"fs_plugins.{package}.settings").Settings
    assert build(kind, read(kind, tmp_path / "settings.yaml"))


@pytest.mark.parametrize("code", blocks("toml"))
def test_toml_blocks_are_part_of_the_file_they_name(code):
    shown = shown_file(code)
    assert shown
    lines = (ROOT / shown[1]).read_text("utf-8").splitlines()
    assert all(line in lines for line in code[shown.end() :].splitlines())


def test_json_blocks_are_a_dataset(tmp_path):
    """The format's own examples: lines of samples, and what is said of them all."""
    page = (DOCS / "reference" / "dataset-format.md").read_text("utf-8")
    samples, about = re.findall(r"^```json\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    named = re.findall(r'"(?:image|target)": "([^"]+)"', samples)
    for i, path in enumerate([*named, "sharks/0.png"]):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        world.scene("train", i).draw().save(tmp_path / path)
    (tmp_path / "samples.jsonl").write_text(samples, "utf-8")
    (tmp_path / "dataset.json").write_text(about, "utf-8")
    dataset = open_dataset(tmp_path, targets=tmp_path / "sharks")
    assert (dataset.name, dataset.target_class, len(dataset.samples)) == ("farm", "shark", len(samples.splitlines()))


def ci() -> str:
    """What .ci/run runs, and the Makefile with its variables written out."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    values = dict(re.findall(r"^(\w+) \??= (.*)$", makefile, re.MULTILINE))
    for _ in range(3):
        makefile = re.sub(r"\$\((\w+)\)", lambda name: values.get(name[1], name[0]), makefile)
    return (ROOT / ".ci" / "run").read_text("utf-8") + makefile


@pytest.mark.parametrize("code", blocks("bash"))
def test_shell_lines_are_run_by_ci(code):
    run_by_ci = ci()
    for line in code.splitlines():
        for command in line.split("  #")[0].split(" && "):
            assert command.strip() in run_by_ci, f"CI does not run: {command}"


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target, anchor in LINK.findall(prose(page)):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_pages_that_messages_name_are_there():
    for path in (ROOT / "fs_plugins").rglob("*.py"):
        for page in re.findall(r"docs/[\w/-]+\.md", path.read_text("utf-8")):
            assert (ROOT / page).exists(), f"{path}: {page}"


def test_every_page_is_on_the_site():
    listed = set(re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE))
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} <= listed


def test_the_page_of_public_names_is_the_list_of_them():
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "reference" / "public-names.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == set(fs_plugins.__all__)


@pytest.mark.parametrize("package", ["attacks", "certificates", "evaluation", "hf", "training"])
def test_the_reference_of_a_package_has_all_its_names(package):
    """Of packages whose names are loaded lazily, mkdocstrings cannot tell which are public."""
    page = (DOCS / "reference" / f"{package}.md").read_text("utf-8")
    shown = re.findall(rf"^::: fs_plugins\.{package}\.(\w+)$", page, re.MULTILINE)
    assert set(importlib.import_module(f"fs_plugins.{package}").__all__) <= set(shown)


def test_the_page_of_the_command_line_is_what_its_options_say():
    from tools.command_line import page

    assert (DOCS / "reference" / "command-line.md").read_text("utf-8") == page()


def test_the_page_of_hooks_lists_those_there_are():
    listed = re.findall(r"^\| `(fs_\w+)\(", (DOCS / "reference" / "hooks.md").read_text("utf-8"), re.MULTILINE)
    assert set(listed) == {name for name in vars(hooks) if name.startswith("fs_")}


def test_every_environment_variable_is_on_their_page():
    page = (DOCS / "reference" / "environment.md").read_text("utf-8")
    source = "".join(path.read_text("utf-8") for path in (ROOT / "fs_plugins").rglob("*.py"))
    for name in set(re.findall(r'"(FS_PLUGINS_[A-Z_]+)"', source)):
        assert f"| `{name}` |" in page, name
