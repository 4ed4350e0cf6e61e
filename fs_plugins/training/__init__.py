"""Self-supervised PSM training: two stages, the paper's losses, any image folder. The public names, listed in
``__init__.pyi``, are loaded when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
