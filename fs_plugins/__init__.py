"""Certified robustness for multimodal models as a plugin: feature-space smoothing of the vision encoder.

The public names, listed in ``__init__.pyi``, are loaded when they are first used: ``import fs_plugins`` costs nothing.
"""

import os as _os

import lazy_loader

__version__ = "0.1.0"

try:
    _began_in = _os.getcwd()  # what relative paths mean, until somebody changes it
except OSError:  # it was removed
    _began_in = ""

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
