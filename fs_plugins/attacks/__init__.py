"""Attacks on the features that a model consumes. Every eps is a distance in [0, 1] pixel units."""

from fs_plugins.attacks.attackvlm import attack_vlm
from fs_plugins.attacks.loop import ascend

__all__ = ["ascend", "attack_vlm"]
