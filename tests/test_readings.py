"""What answers are read as, and how little of them is needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs_plugins import SettingError
from fs_plugins.readings import (
    Alike,
    Compared,
    Exact,
    Judged,
    Letters,
    Number,
    Pattern,
    Reading,
    Words,
    YesNo,
    reading_named,
)

PETS = ("cat", "dog", "none of these")


@pytest.mark.parametrize(
    ("reading", "answer", "read"),
    [
        (Words(PETS), " Cat. ", "cat"),
        (Words(PETS), '"dog"', "dog"),
        (Words(PETS), "None of these", "none of these"),
        (Words(PETS), "a cat", None),
        (Words(PETS), "", None),
        (Letters(PETS), "B", "dog"),
        (Letters(PETS), "b. dog", "dog"),
        (Letters(PETS), "(A) cat", "cat"),
        (Letters(PETS), "B. cat", None),
        (Letters(PETS), "D", None),
        (Letters(PETS), "Because", None),
        (Letters(PETS), "A cat", None),
        (YesNo(), "Yes, there is.", "yes"),
        (YesNo(), "no", "no"),
        (YesNo(), "Yesterday", None),
        (YesNo(), "There is not.", None),
        (Exact(), " Two Dogs. ", "two dogs"),
        (Exact(), " . ", None),
        (Number(), "There are 3 dogs.", "3"),
        (Number(), "1,200.50", "1200.5"),
        (Number(), "-0", "0"),
        (Number(), "3 of 4", None),
        (Number(), "B3", None),
        (Number(), "none", None),
        (Pattern(r"colou?r: (\w+)"), "The color: red", "red"),
        (Pattern("red|blue"), "it is blue", "blue"),
        (Pattern("red|blue"), "it is green", None),
        (Judged(lambda answer: "pet" if "dog" in answer else None, "mine, version 1"), "a dog", "pet"),
        (Judged(lambda answer: None, "mine, version 1"), "a dog", None),
        (Compared(PETS), "dog", "dog"),
    ],
)
def test_an_answer_is_read(reading, answer, read):
    assert isinstance(reading, Reading)
    assert reading.read(answer) == read
    assert reading.fitted([answer]) is reading


ALPHABET = st.text(alphabet=" .,()\"'aAbBcCdDeEsSyYnNoOtThH-19", max_size=8)


@given(begun=ALPHABET, more=ALPHABET)
def test_what_is_settled_reads_alike_however_it_goes_on(begun, more):
    for reading in (Words(("cat", "dog", "no", "none")), Letters(("cat", "dog")), YesNo(), Exact(), Number()):
        if reading.settled(begun):
            assert reading.read(begun + more) == reading.read(begun + " and so on"), (reading, begun, more)


@pytest.mark.parametrize(
    ("reading", "begun", "settled"),
    [
        (Words(PETS), "I am", True),
        (Words(PETS), "no", False),
        (Words(PETS), "cat", False),  # a caterpillar
        (Letters(PETS), "The", True),
        (Letters(PETS), "B", False),
        (Letters(PETS), "A cat", True),
        (Letters(PETS), "A.", False),
        (YesNo(), "Yes,", True),
        (YesNo(), "Yes", False),
        (YesNo(), "There is", True),
        (Exact(), "a", False),
    ],
)
def test_an_answer_is_left_off_where_nothing_can_change_it(reading, begun, settled):
    assert reading.settled(begun) is settled


class Overlap:
    """Words in common, of all words."""

    name = "overlap"

    def scores(self, pairs):
        for one, other in pairs:
            first, second = set(one.split()), set(other.split())
            yield len(first & second) / len(first | second)


def test_free_answers_are_compared_with_the_pilots_most_usual_one():
    reading = Alike(Overlap(), threshold=0.5)
    fitted = reading.fitted(["a red star", "a red cross", "a red star", "two dogs", ""])
    assert fitted.centre == "a red star"
    assert fitted.read("a red star on top") == "a red star"
    assert fitted.read("two dogs") is None
    assert "a red star" in str(fitted)
    assert reading.fitted([" "]) is reading
    assert reading.read("two dogs") == "two dogs"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Words(["cat"]), "at least two classes, got 1"),
        (lambda: Words([]), "at least two classes, got 0"),
        (lambda: Words("cat, dog"), "several texts, got the one text"),
        (lambda: Words(["cat", " "]), "something that can be said"),
        (lambda: Words(["cat", "Cat."]), "'cat' and 'Cat.' read alike"),
        (lambda: Compared(["cat", 3]), "A class must be text"),
        (lambda: Letters([str(i) for i in range(27)]), "26 letters"),
        (lambda: Pattern("("), "no regular expression"),
        (lambda: Judged(lambda answer: answer, " "), "needs a name"),
        (lambda: Judged(lambda answer: answer, "j", error=1.0), r"rate in \[0, 1\)"),
        (lambda: Judged(lambda answer: 3, "j").read("x"), "it gave 3"),
        (lambda: Alike(Overlap(), threshold=0.0), "threshold of similarity"),
        (lambda: reading_named("words", None), 'needs choices: "cat, dog"'),
        (lambda: reading_named("number", ["a", "b"]), "takes none"),
        (lambda: reading_named("hope", None), "one of words, letters, likeliest, yes-no"),
    ],
)
def test_a_reading_that_cannot_decide_is_refused(make, said):
    with pytest.raises(SettingError, match=said):
        make()


def test_readings_have_names():
    assert reading_named("likeliest", ["a", "b"]) == Compared(["a", "b"])
    assert reading_named("yes-no", None) == YesNo()
    assert reading_named("/(yes|no)/", None) == Pattern("(yes|no)")
    assert isinstance(reading_named("alike", None, Overlap()), Alike)
