"""Pieces of the page that gradio has no component for. Texts are escaped; pictures are data: addresses, not files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup
from PIL import Image

from fs_plugins.pictures import address, png


def image(picture: Image.Image, alt: str, caption: str) -> Markup:
    """A figure of one picture, whose pixels are enlarged as they are."""
    shown = Markup('<img src="{}" alt="{}" width="{}" height="{}">').format(address(png(picture)), alt, *picture.size)
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(shown, caption)


def row(figures: Iterable[Markup]) -> Markup:
    """Figures side by side, as many as there is room for."""
    return Markup('<div class="fs-row">{}</div>').format(Markup("").join(figures))


def plot(data: bytes, alt: str) -> Markup:
    """A curve, from its PNG file."""
    return Markup('<img class="fs-plot" src="{}" alt="{}">').format(address(data), alt)


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A table whose rows begin with their heads."""
    top = Markup("").join(Markup('<th scope="col">{}</th>').format(head) for head in heads)
    lines = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            first, Markup("").join(Markup("<td>{}</td>").format(cell) for cell in cells)
        )
        for first, *cells in rows
    )
    frame = (
        '<div class="fs-table"><table><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    )
    return Markup(frame).format(caption, top, lines)


def sentences(several: Iterable[str]) -> Markup:
    """A list of sentences."""
    lines = Markup("").join(Markup("<li>{}</li>").format(one) for one in several)
    return Markup("<ul>{}</ul>").format(lines)


def status(text: str, kind: str = "calm") -> Markup:
    """What a screen reader says as it changes."""
    return Markup('<p role="status" aria-live="polite" class="fs-status fs-{}">{}</p>').format(kind, text)


def progress(text: str, done: int, of: int) -> Markup:
    """How far something is, for eyes; the status says it for ears."""
    return Markup('<p class="fs-progress"><progress value="{}" max="{}" aria-label="{}"></progress> {}</p>').format(
        done, of, text, text
    )


def download(name: str, data: bytes, kind: str, text: str) -> Markup:
    """A link that saves a file; it is in the page, not on the server."""
    return Markup('<a download="{}" href="{}">{}</a>').format(name, address(data, kind), text)


def links(several: Iterable[Markup]) -> Markup:
    """Links side by side."""
    return Markup('<p class="fs-links">{}</p>').format(Markup(" ").join(several))


def link(base: str, query: str) -> Markup:
    """The address of a state, in full to be copied."""
    there = f"?{query}" if query else ""
    anchor = Markup('<a href="{}">{}</a>').format(there or "./", base + there)
    return Markup('<p class="fs-table">Link to this state: {}</p>').format(anchor)


def heading() -> Markup:
    """The page's title, and what it is."""
    return Markup(
        "<h1>fs-plugins playground</h1><p>A model is shown a picture, an attacker moves it, and the same model answers "
        "without and with feature-space smoothing. The proof says how far anyone may move the picture.</p>"
    )
