"""Attacks on the features that a model consumes, oblivious and adaptive.

The eps of every l-inf attack is a distance in [0, 1] pixel units (16/255 is usual), of every l2 attack the length of
the whole change in the same units. The public names, listed in ``__init__.pyi``, are loaded when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
