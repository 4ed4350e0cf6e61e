"""The attacks by name. Another one is another line of ``METHODS``; another package has the hook ``fs_attacks``."""

from __future__ import annotations

from fs_plugins.attacks.crop import Crop
from fs_plugins.attacks.feature import Method, pooled, pooled_and_parts, whole
from fs_plugins.attacks.protocols import Attack
from fs_plugins.attacks.squares import Squares
from fs_plugins.errors import SettingError
from fs_plugins.plugins import provided

METHODS: dict[str, Attack] = {
    "attackvlm": Method("AttackVLM", whole),
    "m-attack": Method("M-Attack", pooled, Crop()),
    "foa": Method("FOA-Attack", pooled_and_parts, Crop(), dynamic=True, top=1.2),
    "square": Method("Square Attack", whole, optimiser=Squares()),
}
"""The attacks that ship."""

_PARTS = "an attack (name, optimiser, and objective(victims, aims, stream, sign))"


def known_attacks() -> dict[str, Attack]:
    """All attacks by name: those that ship, and those of plugins.

    Raises:
        PluginError: a plugin's attacks cannot be used.
    """
    return provided("fs_attacks", "attack", _PARTS, METHODS, _is_attack)


def _is_attack(value: object) -> bool:
    return isinstance(value, Attack) and not isinstance(value, type)


def attack_of(method: str | Attack) -> Attack:
    """An attack by its name; one that is given stays as it is.

    Raises:
        SettingError: there is no such attack.
        PluginError: a plugin's attacks cannot be used.
    """
    if not isinstance(method, str):
        return method
    known = known_attacks()
    if method not in known:
        raise SettingError(f"There is no attack {method!r}. The attacks are: {', '.join(known)}.")
    return known[method]
