"""A PSM's folder goes to the Hugging Face hub as it is: verified, and without what only a training needs."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from fs_plugins import kept
from fs_plugins.errors import PSMError
from fs_plugins.files import real, writing
from fs_plugins.plugins import plugin_parts
from fs_plugins.psm import PSM, card, hub
from fs_plugins.sources import PSM_FILES, WEIGHTS_NAME, psm_folder, weights

PUBLISHED = (*PSM_FILES, hub.CARD, kept.SUMS, "held-out.txt", "log.csv", "photographs.csv", "LICENSE")
"""What of a folder goes to the hub, where it is there."""


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Push a PSM's folder to the hub, in one commit, and return owner/name@commit.

    ``PUBLISHED`` goes there, and nothing else: no checkpoint, no settings of a training.

    Args:
        repo_id: owner/name; made if need be.
        private, token, revision, commit_message: as for ``PSM.push_to_hub``.

    Raises:
        PSMError: the folder holds no PSM, or something of it is damaged.
        SettingError: no such name, nobody is logged in, or who is may not write there.
        OutputError: the hub did not take it.
    """
    to = hub.Repository(repo_id, private, token, revision)
    folder = Path(folder)
    if not folder.is_dir():
        raise PSMError(f"There is no folder {folder} to push.")
    place = real(psm_folder(folder))
    with tempfile.TemporaryDirectory(prefix="fs-plugins-") as name:
        staged = Path(name)  # what is checked is what goes, whatever happens to the folder meanwhile
        names = [one for one in PUBLISHED if (place / one).is_file()]
        with writing(staged):
            for one in names:
                shutil.copyfile(weights(place) if one == WEIGHTS_NAME else place / one, staged / one)
        psm = PSM.from_pretrained(staged, **plugin_parts())
        if kept.SUMS in names and (wrong := kept.wrong_sums(staged, PSM_FILES)):
            raise PSMError(f"{folder} is not as it was finished: {'; '.join(wrong)}. Put back a copy that is whole.")
        return to.upload(staged, names, commit_message, card.short(psm.config, repo_id))
