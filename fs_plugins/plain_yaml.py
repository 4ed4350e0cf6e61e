"""The one reader of YAML that people write: plain values, nothing said twice, and no more data than text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import yaml

_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000
_MOST_BITS = 64
_MERGE = "tag:yaml.org,2002:merge"


def value(path: Path) -> Any:
    """What a YAML file says, in UTF-8, with or without a byte order mark; None if that is nothing.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML in UTF-8, longer than 1 MiB, or nested too deeply; it gives a name twice, holds a
            value that is none (the 31st of February, an integer beyond 64 bits), or aliases that multiply.
    """
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it is longer than the {_MOST_BYTES:,} bytes that are read")
    try:
        loader = _Loader(data.decode("utf-8-sig"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            loader.check(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise ValueError(_told(error)) from None
    except yaml.YAMLError as error:  # characters that no YAML has
        raise ValueError(str(error).partition("\n")[0]) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            made = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # What PyYAML raises depends on the scalar: a date that there is not, !!bool maybe, !!int of nothing.
            reason = f": {str(error).partition(';')[0]}" if isinstance(error, ValueError) else ""
            _refuse(node, f"{_short(node)} is no {node.tag.rpartition(':')[2]}{reason}")
        if isinstance(made, int) and made.bit_length() > _MOST_BITS:
            _refuse(node, f"an integer of more than {_MOST_BITS} bits")
        return made

    def check(self, root: yaml.Node) -> None:
        """Refuse names that are given twice, and aliases of what they are in or of far more than was written."""
        sizes: dict[int, int] = {}
        around: set[int] = set()

        def size(node: yaml.Node) -> int:
            if id(node) in around:
                _refuse(node, "an alias of what it stands in")
            if id(node) not in sizes:
                around.add(id(node))
                if isinstance(node, yaml.MappingNode):
                    self._check_names(node)
                inside = [] if isinstance(node, yaml.ScalarNode) else node.value
                parts = [part for one in inside for part in (one if isinstance(one, tuple) else (one,))]
                sizes[id(node)] = 1 + sum(map(size, parts))
                around.remove(id(node))
            return sizes[id(node)]

        if size(root) > _MOST_VALUES:
            raise ValueError(f"with its aliases written out it has more than {_MOST_VALUES:,} values")

    def _check_names(self, node: yaml.MappingNode) -> None:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                name, line = self.construct_object(key), key.start_mark.line + 1
                if name in lines:
                    _refuse(key, f"{name!r} is given twice, in line {lines[name]} and in line {line}")
                lines[name] = line


def _refuse(node: yaml.Node, problem: str) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _told(error: yaml.MarkedYAMLError) -> str:
    words = " ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}: {words}" if mark else words


def _short(node: yaml.Node) -> str:
    text = str(node.value) if isinstance(node, yaml.ScalarNode) else "this"
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
