"""Settings of a run as a frozen dataclass: every knob is said once, and read from flags, from a file and from Python
alike.

    @dataclass(frozen=True)
    class Walk:
        steps: int = knob(100, "How far.", panel="Run", least=1)

Light on purpose: the command line reads these before anything that takes long is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from fs_plugins import plain_yaml
from fs_plugins.checks import item, plain, shown
from fs_plugins.errors import SettingError

S = TypeVar("S")
_KEY = "fs_plugins.knob"


@dataclass(frozen=True)
class Knob:
    """What people read about a setting.

    Args:
        help: a sentence.
        panel: the group it is listed under.
        flag: on the command line, if not its name (``--dry-run``).
        least: the smallest value allowed.
    """

    help: str
    panel: str | None = None
    flag: str | None = None
    least: float | None = None


def knob(
    default: Any, help: str, *, panel: str | None = None, flag: str | None = None, least: float | None = None
) -> Any:
    """A field of a settings dataclass; see ``Knob``."""
    return field(default=default, metadata={_KEY: Knob(help, panel, flag, least)})


def knobs(kind: type) -> Iterator[tuple[Field[Any], Knob]]:
    """The knobs of a settings dataclass, in order."""
    for one in fields(kind):
        if _KEY in one.metadata:
            yield one, one.metadata[_KEY]


def read(kind: type, path: Path) -> dict[str, Any]:
    """What a YAML file says of a settings dataclass: a mapping of its knobs' names.

    Raises:
        SettingError: no such file, no YAML, no mapping, or a name that is no knob, with those that are.
    """
    try:
        data = plain_yaml.value(path)
    except OSError as error:
        raise SettingError(f"Cannot read the settings {path}: {error.strerror}.") from None
    except ValueError as error:
        raise SettingError(f"{path} is not YAML: {error}.") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SettingError(f"{path} must hold names and values, such as `seed: 1`; it holds a {type(data).__name__}.")
    only(kind, data, str(path))
    return data


def only(kind: type, names: Iterable[object], where: str) -> None:
    """Refuse names that are no knobs of a settings dataclass.

    Args:
        where: they were found.

    Raises:
        SettingError: one is none, with those that are.
    """
    known = [one.name for one, _ in knobs(kind)]
    for name in names:
        if name not in known:
            raise SettingError(f"{where}: there is no setting {name!r}. The settings are: {', '.join(known)}.")


def build(kind: type[S], given: Mapping[str, Any], origin: str = "the settings") -> S:
    """A settings dataclass from plain values, as a file or the command line has them.

    Raises:
        SettingError: a value of the wrong type or out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(kind)
    values = {name: _plain(value) for name, value in given.items()}
    for name, value in values.items():
        parts = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(part, bool) for part in parts) and hints.get(name, bool) is not bool:
            # pydantic takes it for a number
            raise SettingError(f"{origin} cannot be used: {name} is no yes or no, got {value}.")
    try:
        made: S = TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'they'}: {e['msg']}" for e in error.errors()[:5])
        raise SettingError(f"{origin} cannot be used: {wrong}.") from None
    for one, about in knobs(kind):
        value = getattr(made, one.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool) and plain(number) is None:
                raise SettingError(f"{one.name} must be a finite number, got {shown(value)}.")
        if about.least is not None and isinstance(value, int | float) and value < about.least:
            raise SettingError(f"{one.name} must be at least {about.least:g}, got {value}.")
    return made


def _plain(value: Any) -> Any:
    """Numbers and truth values of numpy and torch as plain ones; anything else as it is."""
    if isinstance(value, list | tuple) or len(getattr(value, "shape", ())):
        return tuple(map(_plain, value))
    number = plain(value)
    return item(value) if number is None else number


def default(one: Field[Any]) -> Any:
    """A field's default value."""
    return one.default_factory() if one.default_factory is not MISSING else one.default
