"""YAML that people write, and what others send in its name."""

from __future__ import annotations

import pytest

from fs_plugins import RegistryError, SettingError, plain_yaml, registry
from fs_plugins.settings import read
from fs_plugins.training.settings import Settings


def layers(first: str, wrap: str) -> str:
    """Nine lines that are a thousand million values."""
    lines = [f"a0: &a0 {first}"]
    return "\n".join(lines + [f"a{i}: &a{i} {wrap % ','.join([f'*a{i - 1}'] * 10)}" for i in range(1, 10)])


WRONG = {
    "twice": ("version: 1\nencoders: {}\nversion: 1", "'version' is given twice, in line 1 and in line 3"),
    "twice on one line": ("{seed: 1, seed: 2}", "'seed' is given twice, in line 1 and in line 1"),
    "twice inside": ("a:\n- b: 1\n  c: 2\n  b: 1", "'b' is given twice, in line 2 and in line 4"),
    "twice in a set": ("!!set {a, a}", "twice"),
    "equal names": ("1: a\ntrue: b", "twice"),
    "impossible date": ("a: 1\nb: 2026-02-31", "line 2: '2026-02-31' is no timestamp: day is out of range"),
    "5,000 digits": ("a: " + "9" * 5000, "line 1: '9+...' is no int"),
    "500 hexadecimal digits": ("a: 0x" + "f" * 500, "line 1: an integer of more than 64 bits"),
    "no truth value": ("a: !!bool maybe", "line 1: 'maybe' is no bool"),
    "no integer": ("a: !!int ''", "line 1: '' is no int"),
    "no time": ("a: !!timestamp now", "line 1: 'now' is no timestamp"),
    "no float": ("a: !!float x", "line 1: 'x' is no float"),
    "code": ("a: !!python/object/apply:os.getcwd []", "line 1: could not determine a constructor"),
    "deep lists": ("[" * 5000, "nested too deeply"),
    "deep objects": ("{a: " * 5000, "nested too deeply"),
    "deep blocks": ("- " * 5000, "nested too deeply"),
    "itself": ("a: &a [*a]", "an alias of what it stands in"),
    "list bomb": (layers("[" + "1," * 10 + "]", "[%s]"), "more than 100,000 values"),
    "merge bomb": (layers("{b: 1}", "{<<: [%s]}"), "more than 100,000 values"),
    "two megabytes": ("# " + "a" * 2_000_000, "longer than the 1,048,576 bytes"),
    "cut off": ("a: [", "line 1: .*expected the node content"),
    "NUL": ("a: \0", "unacceptable character"),
    "list as a name": ("? [a]\n: 1", "unhashable"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_place_by_every_reader(tmp_path, name):
    text, message = WRONG[name]
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        plain_yaml.value(path)
    with pytest.raises(RegistryError, match=rf"(?s)x\.yaml is not YAML: .*{message}"):
        registry.load(path)
    with pytest.raises(SettingError, match=rf"(?s)x\.yaml is not YAML: .*{message}"):
        read(Settings, path)


def test_what_is_no_text_in_utf_8_is_said_by_every_reader(tmp_path):
    path = tmp_path / "x.yaml"
    for data in ("a: é".encode("latin-1"), "a: 1".encode("utf-16"), bytes(range(128, 256))):
        path.write_bytes(data)
        with pytest.raises(RegistryError, match=r"x\.yaml is not text in UTF-8"):
            registry.load(path)
        with pytest.raises(SettingError, match=r"x\.yaml is not YAML"):
            read(Settings, path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\ufeffa: é", {"a": "é"}),
        ("", None),
        ("x: &x {a: 1, b: 1}\ny: {<<: *x, a: 2}", {"x": {"a": 1, "b": 1}, "y": {"a": 2, "b": 1}}),
        (
            "p: {q: &y {<<: &x {a: 1}, a: 2}}\nz: {<<: *y}",  # y is merged before it is made
            {"p": {"q": {"a": 2}}, "z": {"a": 2}},
        ),
        ("a: {<<: [{b: 1}, {b: 2}], c: 3}", {"a": {"b": 1, "c": 3}}),
        ("a: 18446744073709551615\nb: 2026-02-28", None),
    ],
)
def test_what_is_right_is_read(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    found = plain_yaml.value(tmp_path / "x.yaml")
    assert found == said or (said is None and (not text or found["a"] == 2**64 - 1))
