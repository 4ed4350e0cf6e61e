"""All that knows transformers: loading, chat and zero-shot models, other encoders into them, lmms-eval."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
