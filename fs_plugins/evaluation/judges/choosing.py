"""The judges by name. Another one is another line of ``JUDGES``; another package has the hook ``fs_judges``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fs_plugins.errors import PluginError, SettingError
from fs_plugins.evaluation.judges.endpoint import Endpoint
from fs_plugins.evaluation.judges.exact import ExactMatch
from fs_plugins.evaluation.judges.protocol import Judge
from fs_plugins.evaluation.judges.similarity import SentenceSimilarity
from fs_plugins.plugins import provided

JUDGES: dict[str, Callable[..., Judge]] = {
    "exact": ExactMatch,
    "similarity": SentenceSimilarity,
    "endpoint": Endpoint,
}
"""The judges that ship."""


def judge(name: str, **options: Any) -> Judge:
    """A judge by name: "exact", "similarity", "endpoint", or one of a plugin's (the hook ``fs_judges``).

    ``options`` are those of the class, such as ``judge("endpoint", url=..., model="gpt-4o")``.

    Raises:
        SettingError: there is no such judge, it does not take these options, or its package is not installed.
        PluginError: a plugin's judges cannot be used.
        JudgeError: the judge cannot be set up (a sentence model that does not load).
    """
    known = known_judges()
    if name not in known:
        raise SettingError(f"There is no judge {name!r}. The judges are: {', '.join(sorted(known))}.")
    _check_options(name, known[name], options)
    made = known[name](**options)
    if not isinstance(made, Judge):
        raise PluginError(f"Judge {name!r} is a {type(made).__name__}; it must have a name and scores(pairs).")
    return made


def known_judges() -> dict[str, Callable[..., Judge]]:
    """All judges by name, as what makes them: those that ship, and those of plugins.

    Raises:
        PluginError: a plugin's judges cannot be used.
    """
    return provided("fs_judges", "judge", "factory", JUDGES, callable)


def _check_options(name: str, factory: Callable[..., Judge], options: dict[str, Any]) -> None:
    """Refuse options by their names alone: a value may be a key."""
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some callables written in C do not tell theirs
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        takes, got = (", ".join(names) or "nothing" for names in (signature.parameters, options))
        raise SettingError(f"Judge {name!r}: {error}. It takes {takes}; got {got}.") from None
