"""Real frameworks in environments of their own; the default suite does not look in here."""

import os

import torchvision_schemas  # noqa: F401  (before anything that imports torchvision)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
