"""Before anything imports timm, and torchvision with it."""

from __future__ import annotations

from fs_plugins.photos import torchvision_schemas  # noqa: F401
