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
    "cards/demo.md": "fs_plugins/demo/assets/README.md",
    "cards/photo.md": "fs_plugins/psm/photo/README.md",
    "cards/changelog.md": "CHANGELOG.md",
}
"""Page of the site -> file of the repository."""
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/."""
    for uri, path in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links, which are relative to the file on disk, at pages of the site. Links to code lose the link."""
    here = Path(str(page.file.abs_src_path)).parent
    pages = {os.path.realpath(str(file.abs_src_path)): file.src_uri for file in files}
    markdown = re.sub(r"\[([^\]\n]*)\]\(([^)#\s]+\.(?:py|yaml))\)", r"\1", markdown)

    def moved(link: re.Match[str]) -> str:
        target = pages.get(os.path.realpath(here / link[1]))
        return link[0] if target is None else f"]({os.path.relpath(target, os.path.dirname(page.file.src_uri) or '.')}"

    return LINK.sub(moved, markdown)
