"""What is said of a photograph's class."""

from __future__ import annotations

import pytest

from fs_plugins.photos.prompts import answer, caption, named


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("golden retriever", "a golden retriever"),
        ("ox", "an ox"),
        ("Afghan hound", "an Afghan hound"),
        ("unicycle", "a unicycle"),
        ("umbrella", "an umbrella"),
        ("European gallinule", "a European gallinule"),
        ("hourglass", "an hourglass"),
        ("espresso", "espresso"),
        ("espresso maker", "an espresso maker"),
        ("sunglasses", "sunglasses"),
        ("sunglass", "a sunglass"),
    ],
)
def test_a_class_has_its_article(name: str, said: str) -> None:
    assert named(name) == said
    assert caption(name) == f"A photo of {said}."


def test_an_answer_is_a_sentence_of_its_own() -> None:
    assert [answer(name) for name in ("iPod", "wool", "ox")] == ["An iPod.", "Wool.", "An ox."]
