"""What every process of vLLM calls when it begins (entry-point group ``vllm.general_plugins``).

vLLM only logs it when a plugin cannot be imported, and serves on. So nothing is imported here that could fail; what can
fail is imported in ``register``, whose errors vLLM does not catch.
"""

from __future__ import annotations

import os

from fs_plugins.vllm import VARIABLE


def register() -> None:
    """Put the guard in place, if ``FS_PLUGINS`` asks for it.

    Raises:
        FSPluginsError: the settings cannot be used.
    """
    if os.environ.get(VARIABLE, "").strip():
        from fs_plugins.vllm.guard import install

        install(os.environ[VARIABLE])
