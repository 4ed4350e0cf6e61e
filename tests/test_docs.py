"""Every line of code in the README and the docs runs, or is a command that CI runs."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from fs_plugins.demo import assets, world

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CI = (ROOT / ".ci" / "run").read_text() + (ROOT / "Makefile").read_text()


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        code = re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
        found += [pytest.param(text, id=f"{page.relative_to(ROOT)}-{i}") for i, text in enumerate(code)]
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    """The demo's model stands in for the one a reader has; a file that is shown is the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "example-plugin" / "src"))
    if shown := re.match(r"# (docs/\S+)\n", code):
        assert code[shown.end() :] == (ROOT / shown[1]).read_text()
    for i in range(20):
        (tmp_path / "photos").mkdir(exist_ok=True)
        world.scene("train", i).draw().save(tmp_path / "photos" / f"{i}.png")
    world.scene("heldout", 0).draw().save(tmp_path / "photo.jpg")
    code = re.sub(r'"llava-hf/[^"]+"', repr(str(assets.LLAVA)), code)
    code = re.sub(r'"openai/[^"]+"', repr(str(assets.CLIP)), code)
    code = code.replace('"fare4"', '"demo-clip"')
    code = re.sub(r"steps=\d[\d_]*", "steps=2", code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "documentation", "exec"), {})


@pytest.mark.parametrize("code", blocks("toml"))
def test_toml_blocks_are_part_of_the_file_they_name(code):
    shown = re.match(r"# (docs/\S+)\n", code)
    assert shown
    lines = (ROOT / shown[1]).read_text().splitlines()
    assert all(line in lines for line in code[shown.end() :].splitlines())


@pytest.mark.parametrize("code", blocks("bash"))
def test_shell_lines_are_run_by_ci(code):
    for line in code.splitlines():
        command = line.split("  #")[0].strip()
        if command:
            assert command in CI, f"CI does not run: {command}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
