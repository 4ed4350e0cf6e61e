"""Judges: how alike two texts are, from 0 to 1. Captions are scored by them.

A caption counts as right from 0.5 to the clean caption on, and as the attacker's from 0.3 to the target's caption on
(arXiv 2601.16200). The paper asks gpt-4o (``Endpoint``); ``SentenceSimilarity`` works without a network, and
``ExactMatch`` is for answers that leave no choice of words. The public names, listed in ``__init__.pyi``, are loaded
when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
