"""What runs of the page have found, as visitors see it."""

from __future__ import annotations

from markupsafe import Markup
from torch import Tensor

from fs_plugins.certificates import Certificate
from fs_plugins.evaluation.picture import difference
from fs_plugins.hf.chat import Comparison
from fs_plugins.pictures import to_pil
from fs_plugins.playground import html, proving
from fs_plugins.playground.engine import Heard
from fs_plugins.playground.pictures import Picture


def moved(clean: Picture, image: Tensor) -> Markup:
    """An attacked picture, and what was done to it."""
    changed = to_pil(difference(clean.image, image))
    far = 255 * float((image - clean.image).abs().max())
    figures = [
        html.image(to_pil(image), f"The attacked picture. {clean.about}", f"Attacked, by {far:.0f}/255 at most"),
        html.image(changed, "What the attack changed, as coloured noise around grey", "The difference, x 8"),
    ]
    return html.row(figures)


def said(heard: Heard) -> Markup:
    """Answers side by side, and the draws that the smoothed ones were made of."""
    rows = []
    for what, one in (("Clean picture", heard.clean), ("Attacked picture", heard.attacked)):
        if one is not None:
            rows.append((f"{what}: answer", *_pair(one.answer)))
            if one.caption is not None:
                rows.append((f"{what}: caption", *_pair(one.caption)))
    if heard.cosines is not None:
        values = f"{heard.cosines.without:.3f}", f"{heard.cosines.smoothed:.3f}"
        rows.append(("FCS, the cosine of the two pictures' features", *values))
    made = html.table("What the model says", ["", "without the plugin", "with the plugin"], rows)
    if heard.views is None:
        return made
    pairs = zip(heard.views.noisy, heard.views.purified, strict=True)
    figures = []
    for i, (noisy, purified) in enumerate(pairs, 1):
        figures.append(html.image(to_pil(noisy), f"Noisy draw {i}", f"Draw {i}"))
        figures.append(html.image(to_pil(purified), f"Draw {i}, purified", "purified"))
    return made + html.row(figures)


def curve(certificate: Certificate, limit: float) -> Markup:
    """What is certified, up to a distance."""
    reached = certificate.radius()
    told = "nowhere at least .5" if reached is None else f"at least .5 up to an l2 distance of {reached:.3f}"
    alt = f"The certified cosine against the l2 distance: {told}. The paper's estimate is beside it."
    return html.plot(proving.curve(certificate, limit), alt)


def reach(certificate: Certificate) -> float:
    """As far as a curve of it has anything to show, and no further than eyes can use."""
    found = [certificate.radius(0.0) or 0.0, certificate.by("plugin").radius(0.0) or 0.0]
    return 1.05 * min(max(found), 4 * certificate.sigma) or certificate.sigma


def _pair(comparison: Comparison) -> tuple[str, str]:
    both = comparison.without, comparison.smoothed
    one, other = (f"{answer.text or '(nothing)'} · {answer.seconds:.2f} s" for answer in both)
    return one, other
