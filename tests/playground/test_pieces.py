"""No text becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from PIL import Image

from fs_plugins.playground import html

HOSTILE = "\"'><img src=x onerror=alert(1)><script>alert(1)</script>&amp;"
PICTURE = Image.new("RGB", (4, 3), "red")


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    "made",
    [
        html.image(PICTURE, HOSTILE, HOSTILE),
        html.row([html.image(PICTURE, HOSTILE, HOSTILE)]),
        html.plot(b"png", HOSTILE),
        html.table(HOSTILE, ["", HOSTILE], [(HOSTILE, HOSTILE)]),
        html.sentences([HOSTILE]),
        html.link(HOSTILE, HOSTILE),
        html.status(HOSTILE),
        html.progress(HOSTILE, 1, 2),
        html.links([html.download("a.png", b"", "image/png", HOSTILE)]),
    ],
)
def test_nobodys_text_becomes_markup(made):
    seen = Seen()
    seen.feed(str(made))
    assert "script" not in seen.tags
    assert not {"onerror"} & set(seen.attributes)
    assert seen.tags.count("img") <= 1
    assert "'" in seen.text or "alt" in seen.attributes or "aria-label" in seen.attributes


def test_a_picture_is_in_the_page_with_its_words():
    made = html.image(PICTURE, "a red picture", "Drawn.")
    assert 'src="data:image/png;base64,' in made
    assert 'alt="a red picture"' in made
    assert 'width="4" height="3"' in made
