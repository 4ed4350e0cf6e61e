"""Texts on their way to a file: their encoding, their names, and what a spreadsheet would make of them."""

from __future__ import annotations

import ast
import csv
import io
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fs_plugins import files
from fs_plugins.evaluation.datasets import open_dataset
from fs_plugins.evaluation.store import Store
from fs_plugins.training.data import ImageFolder
from fs_plugins.training.settings import Settings

ROOT = Path(__file__).parents[1]
ROOMS = ("fs_plugins", "adapters", "tools", "benchmarks", "integration", "tests")
CODE = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
ODD = ("\udcff.png", "\udc80\udcff.png", "é.png", "=cmd.png", "[bold].png", "\x1b[31mred.png", "-dash.png", "a b.png")
"""Names that file systems take: of bytes that are no UTF-8, and such as a table or a terminal would obey."""


def unnamed(call: ast.Call) -> bool:
    """Whether a call reads or writes text in whatever encoding the platform has."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    told = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("read_text", "write_text"):
        return "encoding" not in told and len(call.args) < {"read_text": 1, "write_text": 2}[name]
    of = ast.unparse(call.func).rpartition(".")[0]
    if name != "open" or of in ("os", "Image", "tarfile") or "opener" in of:
        return False
    mode = told.get("mode") or next(iter(call.args[1:] if isinstance(call.func, ast.Name) else call.args), None)
    return "encoding" not in told and "b" not in (mode.value if isinstance(mode, ast.Constant) else "")


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_names_its_encoding_and_json_has_one_reader(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    assert not [ast.unparse(call) for call in calls if unnamed(call)]
    if path.is_relative_to(ROOT / "fs_plugins") and path.name not in ("files.py", "kept.py"):
        read = [ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) in ("json.loads", "json.load")]
        assert all(one.startswith("json.dumps(") or one.endswith(".to_json()") for one in read), "use files.parsed"
        assert not {"csv.writer", "csv.DictWriter"} & {ast.unparse(call.func) for call in calls}, "use files.table"


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(x)", True),
        ("path.write_text(x, encoding='utf-8')", False),
        ("open(x)", True),
        ("open(x, 'rb')", False),
        ("path.open('w')", True),
        ("path.open('ab')", False),
        ("path.open(newline='', encoding='utf-8')", False),
    ],
)
def test_the_rule_sees_what_it_is_about(call, wrong):
    assert unnamed(ast.parse(call, mode="eval").body) is wrong


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"])
def test_no_text_in_a_table_is_a_formula(first):
    text = f'{first}HYPERLINK("https://x.example","y")'
    rows = list(csv.reader(io.StringIO(files.table([["name", "n"], [text, 3]]), newline="")))
    assert rows == [["name", "n"], [f"'{text}", "3"]]


@pytest.mark.parametrize("number", [-0.25, -3, "-0.125", "+1e-3", "-inf", float("nan"), "1,5", "none", "", "a=b"])
def test_numbers_and_plain_texts_in_a_table_are_as_they_were(number):
    assert list(csv.reader(io.StringIO(files.table([[number]])))) in ([[str(number)]], [[]])


@given(st.lists(st.lists(st.text(st.characters(exclude_characters="\x00")), min_size=2), min_size=1))
def test_a_table_holds_every_text(rows):
    back = list(csv.reader(io.StringIO(files.table(rows), newline="")))
    assert [[cell.removeprefix("'") for cell in row] for row in back] == [
        [cell.removeprefix("'") for cell in row] for row in rows
    ]


@given(st.text(st.characters(codec=None)), st.text(st.characters(codec=None)))
def test_any_text_has_a_mark_of_its_own_and_can_be_written(one, other):
    assert (files.mark(one) == files.mark(other)) is (one == other)
    files.spelled(one).encode("utf-8")
    assert files.spelled(files.spelled(one)) == files.spelled(one)


@pytest.fixture
def odd(tmp_path) -> Path:
    folder = tmp_path / "odd"
    folder.mkdir()
    for i, name in enumerate(ODD):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(folder / name, "PNG")
    return folder


def test_pictures_of_any_name_are_split_and_told_apart(odd):
    pictures = ImageFolder(odd, (16, 16))
    assert sorted(pictures.names) == sorted(ODD)
    train, held = pictures.split(3, seed=0)
    assert sorted(train.names + held.names) == sorted(ODD)
    assert pictures.digest.startswith(f"{len(ODD)} images, ")


def test_a_dataset_of_pictures_of_any_name_is_kept_and_read_back(odd, tmp_path):
    dataset = open_dataset(odd)
    assert sorted(sample.image for sample in dataset.samples) == sorted(ODD)
    assert len(dataset.some(3).samples) == 3
    assert dataset.digest.startswith(f"{len(ODD)} samples, ")
    store = Store(tmp_path / "store")
    for i, name in enumerate(ODD):
        store.keep("key", name, torch.full((3, 2, 2), float(i)))
        store.add("rows", [{"image": name, "task": "captioning", "reply": name}])
    for i, name in enumerate(ODD):
        assert store.attacked("key", name).unique().tolist() == [i]
    assert store.rows("rows")["\udcff.png", "captioning"]["reply"] == "\udcff.png"


def test_a_psm_is_named_in_words_that_a_file_can_hold(tmp_path):
    settings = Settings(out=tmp_path / "psm\udcff", model="a\udc80/b")
    assert settings.title == r"psm\udcff"
    assert settings.encoder == r"a\udc80/b"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_of_datasets_may_begin_with_a_byte_order_mark(odd, mark):
    (odd / "samples.jsonl").write_bytes(mark + b'{"image": "a b.png", "label": "x"}\n')
    (odd / "dataset.json").write_bytes(mark + b'{"name": "n", "classes": ["x", "y"]}')
    assert open_dataset(odd, targets=odd).name == "n"
