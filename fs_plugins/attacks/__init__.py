"""Attacks on the features that a model consumes, oblivious and adaptive.

The eps of every l-inf attack is a distance in [0, 1] pixel units (16/255 is usual), of every l2 attack the length of
the whole change in the same units.
"""

from fs_plugins.attacks.ball import Ball, Norm
from fs_plugins.attacks.feature import METHODS, Method, attack
from fs_plugins.attacks.loop import ascend
from fs_plugins.attacks.square import square

__all__ = ["METHODS", "Ball", "Method", "Norm", "ascend", "attack", "square"]
