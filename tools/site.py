"""Hooks of mkdocs: pages that lie outside docs/ are part of the site, and links say where they are in it.

On disk every link is a relative path, so that pages read as well in an editor or on a forge.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "repository/readme.md": "README.md",
    "repository/changelog.md": "CHANGELOG.md",
    "repository/demo.md": "fs_plugins/demo/assets/README.md",
    "repository/photo-efficientnet-lite0.md": "fs_plugins/psm/efficientnet-lite0/README.md",
    "repository/photo-light.md": "fs_plugins/psm/photo-light/README.md",
    "repository/photo.md": "fs_plugins/psm/photo/README.md",
    "repository/photo-vlm.md": "fs_plugins/photos/vlm/README.md",
}
"""Page of the site -> file of the repository."""
LINK = re.compile(r"\[([^\]\n]*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/."""
    for uri, path in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site; of those to other files of the repository, the words stay."""
    here = Path(str(page.file.abs_src_path)).parent
    folder = Path(page.file.src_uri).parent
    pages = {Path(str(file.abs_src_path)).resolve(): file.src_uri for file in files}

    def moved(link: re.Match[str]) -> str:
        words, target, anchor = link.groups(default="")
        path = (here / target).resolve()
        if path in pages:
            return f"[{words}]({os.path.relpath(pages[path], folder)}{anchor})"
        return words if path.exists() else link[0]

    return LINK.sub(moved, markdown)
