"""Smoothing inside vLLM: what its processes load, asleep unless ``FS_PLUGINS`` is set. All that knows vLLM is here, but
for where its classes look at images, which is an adapter's to say (``adapters/vllm.py``)."""

VARIABLE = "FS_PLUGINS"
"""Environment variable: how to smooth, as JSON (see ``settings.Settings``). Unset or empty, nothing is smoothed."""
