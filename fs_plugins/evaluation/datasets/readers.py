"""The readers by name. Another one is another line of ``READERS``; another package has the hook ``fs_datasets``."""

from __future__ import annotations

from fs_plugins.evaluation.datasets.documented import DOCUMENTED
from fs_plugins.evaluation.datasets.imagenet import IMAGENET_FOLDERS
from fs_plugins.evaluation.datasets.nips17 import NIPS17
from fs_plugins.evaluation.datasets.reader import Reader
from fs_plugins.evaluation.datasets.scienceqa import SCIENCEQA
from fs_plugins.plugins import provided

READERS = {
    "documented": DOCUMENTED,
    "nips17": NIPS17,
    "scienceqa": SCIENCEQA,
    "imagenet": IMAGENET_FOLDERS,
}
"""The readers that ship; the first that recognises a folder reads it. What nobody recognises is just pictures."""


def known_readers() -> dict[str, Reader]:
    """All readers by name: those that ship, then those of plugins.

    Raises:
        PluginError: a plugin's readers cannot be used.
    """
    return provided("fs_datasets", "reader", "Reader", READERS, lambda value: isinstance(value, Reader))
