"""What a model's answer counts as: one of some classes, or none of them.

Certificates of answers speak of what a reading makes of them, so a reading is part of what is certified. It sees the
text alone: never the picture, never how sure the model was (but for ``Compared``, which is how sure it was).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from fs_plugins.checks import number, settle, words
from fs_plugins.errors import SettingError

_AROUND = string.whitespace + "\u00a0\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb()[]{}"


class Similarity(Protocol):
    """How alike texts are: ``fs_plugins.evaluation.judges`` has three."""

    @property
    def name(self) -> str: ...

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Iterator[float]: ...


@runtime_checkable
class Reading(Protocol):
    """``str()`` of it says all that the reading depends on.

    Args:
        error: the probability that the model's answer to the clean picture is read as the certified class and is of
            another; 0 where what is read is what is meant.
    """

    @property
    def error(self) -> float: ...

    def read(self, answer: str) -> str | None:
        """The class that an answer is, or None: it is of no class."""

    def settled(self, begun: str) -> bool:
        """Whether every answer that begins like this is read alike, so that no more of it is needed."""

    def fitted(self, answers: Sequence[str]) -> Reading:
        """The same once some answers are known, of which none is certified by."""


class Plain:
    """What most readings are: sure, in want of the whole answer, and the same whatever was said before."""

    error: float = 0.0

    def settled(self, begun: str) -> bool:
        return False

    def fitted(self, answers: Sequence[str]) -> Any:
        return self


@dataclass(frozen=True)
class Words(Plain):
    """The answer is one of some texts, and nothing else; case, quotes and a full stop do not matter.

    Raises:
        SettingError: fewer than two, an empty one, or two that read alike.
    """

    classes: tuple[str, ...]

    def __init__(self, classes: Iterable[str]) -> None:
        settle(self, classes=_classes(classes))

    def __str__(self) -> str:
        return f"one of: {', '.join(self.classes)}"

    def read(self, answer: str) -> str | None:
        return by_words(answer, self.classes)

    def settled(self, begun: str) -> bool:
        """No class begins like this."""
        said = begun.lstrip(_AROUND).casefold()
        known = (bare(one).casefold() for one in self.classes)
        return not any(one.startswith(said) or said.startswith(one) for one in known)


@dataclass(frozen=True)
class Letters(Plain):
    """The answer is an option's letter, alone or with the option's own words: B, "B. blue", "B (blue)".

    Raises:
        SettingError: as for ``Words``, or more options than letters.
    """

    classes: tuple[str, ...]

    def __init__(self, classes: Iterable[str]) -> None:
        settle(self, classes=_classes(classes))
        if len(self.classes) > len(string.ascii_uppercase):
            raise SettingError(f"There are 26 letters for options, got {len(self.classes)} options.")

    def __str__(self) -> str:
        lettered = zip(string.ascii_uppercase, self.classes, strict=False)
        return f"the letter of one of: {', '.join(f'{letter}. {one}' for letter, one in lettered)}"

    def read(self, answer: str) -> str | None:
        return by_letter(answer, self.classes)

    def settled(self, begun: str) -> bool:
        """It begins with no letter of an option, or goes on with a word."""
        said = begun.lstrip(_AROUND)
        letters = string.ascii_uppercase[: len(self.classes)]
        return bool(said) and (said[0].upper() not in letters or bool(re.match(r".\s*\w", said)))


@dataclass(frozen=True)
class YesNo(Plain):
    """The answer's first word is yes or no."""

    def __str__(self) -> str:
        return "yes or no first"

    def read(self, answer: str) -> str | None:
        found = re.match(r"(yes|no)\b", answer.lstrip(_AROUND), re.IGNORECASE)
        return found[1].lower() if found else None

    def settled(self, begun: str) -> bool:
        """The first word is over."""
        return bool(re.match(r"\w+\W", begun.lstrip(_AROUND)))


@dataclass(frozen=True)
class Exact(Plain):
    """Every answer is a class of its own; case, quotes and a full stop do not matter."""

    def __str__(self) -> str:
        return "the answer's very words"

    def read(self, answer: str) -> str | None:
        return bare(answer).casefold() or None


@dataclass(frozen=True)
class Number(Plain):
    """The one number in the answer; an answer with none or several is of no class."""

    def __str__(self) -> str:
        return "the one number in the answer"

    def read(self, answer: str) -> str | None:
        found = re.findall(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,300})(?:\.\d{1,300})?(?![\w]|\.\d|,\d)", answer)
        if len(found) != 1 or len(re.findall(r"\d+(?:[.,]\d+)*", answer)) != 1:
            return None
        value = float(found[0].replace(",", ""))
        return f"{0.0 if value == 0 else value:.15g}"


@dataclass(frozen=True)
class Pattern(Plain):
    """What a regular expression finds first: its first group, or all of it.

    Raises:
        SettingError: it is no regular expression.
    """

    expression: str

    def __post_init__(self) -> None:
        try:
            re.compile(words("A reading's regular expression", self.expression))
        except re.error as error:
            raise SettingError(f"{self.expression!r} is no regular expression: {error}.") from None

    def __str__(self) -> str:
        return f"what matches {self.expression}"

    def read(self, answer: str) -> str | None:
        found = re.search(self.expression, answer)
        return (found[1] if found.re.groups else found[0]) or None if found else None


@dataclass(frozen=True)
class Judged(Plain):
    """What a judge of one's own makes of the answer.

    Args:
        judge: the answer -> its class, or None.
        name: of the judge and its version, for what is kept.
        error: how often at most, of the answers to the clean picture that it calls the certified class, it is wrong: a
            rate of all answers, which you have measured. The certificate then speaks of the answer's true class.

    Raises:
        SettingError: no name, or a rate outside [0, 1).
    """

    judge: Callable[[str], str | None]
    name: str
    error: float = 0.0

    def __post_init__(self) -> None:
        if not words("A judge's name", self.name).strip():
            raise SettingError("A judge needs a name, for what is kept of it.")
        rate = number("A judge's error is a rate in [0, 1)", self.error, lambda found: 0 <= found < 1)
        settle(self, error=rate)

    def __str__(self) -> str:
        return f"the judge {self.name}" + (f", wrong in {self.error:g}" if self.error else "")

    def read(self, answer: str) -> str | None:
        found = self.judge(answer)
        if found is not None and not isinstance(found, str):
            raise SettingError(f"The judge {self.name} gives a class as text, or None; it gave {found!r}.")
        return found


@dataclass(frozen=True)
class Alike(Plain):
    """Free answers: of the class are those that are like one of them, which is chosen on the pilot's draws.

    Args:
        judge: of how alike two texts are, from 0 to 1.
        threshold: the similarity from which on an answer is of the class.
        centre: the answer that others are compared with: the one most like all of the pilot's, once they are known.

    Raises:
        SettingError: a threshold outside (0, 1].
    """

    judge: Similarity
    threshold: float = 0.5
    centre: str | None = None
    _known: dict[str, str | None] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        expected = "A threshold of similarity is in (0, 1]"
        settle(self, threshold=number(expected, self.threshold, lambda found: 0 < found <= 1))

    def __str__(self) -> str:
        about = "the most usual of the pilot's" if self.centre is None else f'"{self.centre}"'
        return f"like {about}, at least {self.threshold:g} by {self.judge.name}"

    def read(self, answer: str) -> str | None:
        if self.centre is None:
            return bare(answer) or None
        if answer not in self._known:
            (score,) = self.judge.scores([(answer, self.centre)])
            self._known[answer] = self.centre if score >= self.threshold else None
        return self._known[answer]

    def fitted(self, answers: Sequence[str]) -> Alike:
        said = [one for one in answers if bare(one)]
        if not said:
            return self
        unlike = list(dict.fromkeys(said))
        pairs = [(other, one) for one in unlike for other in unlike]
        scores = list(self.judge.scores(pairs))
        counts = [said.count(other) for other in unlike]
        near = [
            sum(
                count
                for count, score in zip(counts, scores[i * len(unlike) :], strict=False)
                if score >= self.threshold
            )
            for i in range(len(unlike))
        ]
        return replace(self, centre=unlike[near.index(max(near))], _known={})


@dataclass(frozen=True)
class Compared(Plain):
    """The model is not let speak: of some texts, the one that it finds likeliest. It always decides.

    Raises:
        SettingError: as for ``Words``.
    """

    classes: tuple[str, ...]

    def __init__(self, classes: Iterable[str]) -> None:
        settle(self, classes=_classes(classes))

    def __str__(self) -> str:
        return f"the likeliest of: {', '.join(self.classes)}"

    def read(self, answer: str) -> str | None:
        return answer


OF_CHOICES: dict[str, Callable[[Iterable[str]], Reading]] = {"words": Words, "letters": Letters, "likeliest": Compared}
FREE: dict[str, Callable[[], Reading]] = {"yes-no": YesNo, "number": Number, "exact": Exact}


def reading_named(name: str, choices: Sequence[str] | None, judge: Similarity | None = None) -> Reading:
    """A reading as people name it: words, letters or likeliest of some choices; yes-no, number, exact; alike, by a
    judge; or a regular expression between slashes.

    Raises:
        SettingError: there is none of this name, or choices where there are none, or none where there must be.
    """
    if name in OF_CHOICES:
        if choices is None:
            raise SettingError(f'What are the answers to be read as? The reading {name} needs choices: "cat, dog".')
        return OF_CHOICES[name](choices)
    if choices is not None:
        raise SettingError(f"Choices are for the readings {', '.join(OF_CHOICES)}; {name!r} takes none.")
    if name in FREE:
        return FREE[name]()
    if name == "alike" and judge is not None:
        return Alike(judge)
    if len(name) > 2 and name.startswith("/") and name.endswith("/"):
        return Pattern(name[1:-1])
    known = ", ".join([*OF_CHOICES, *FREE, "alike"])
    raise SettingError(f"A reading is one of {known}, or a regular expression such as '/(yes|no)/'; got {name!r}.")


def by_letter(answer: str, options: Sequence[str]) -> str | None:
    """A letter, alone or with its option's own words: B, "B. blue", "B) blue", "B (blue)"."""
    said = re.fullmatch(r"([A-Za-z])(?:\s*[.:)(]\s*(\S.*))?", bare(answer), re.DOTALL)
    if said is None:
        return None
    place = string.ascii_uppercase.index(said[1].upper())
    if place >= len(options) or (said[2] is not None and not same(said[2], options[place])):
        return None
    return options[place]


def by_words(answer: str, options: Sequence[str]) -> str | None:
    """An option's own words, and nothing else; as they are written, or as only one option reads."""
    said = [option for option in options if option == answer.strip()] or [o for o in options if same(o, answer)]
    return said[0] if bare(answer) and len(set(said)) == 1 else None


def same(one: str, other: str) -> bool:
    """Whether two texts read alike."""
    return bare(one).casefold() == bare(other).casefold()


def bare(text: str) -> str:
    """Without whitespace, quotes and brackets around it, and one full stop at its end."""
    return text.strip(_AROUND).removesuffix(".").rstrip(_AROUND)


def _classes(given: Iterable[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        raise SettingError(f"Classes are several texts, got the one text {given!r}; split it first.")
    classes = tuple(words("A class", one) for one in given)
    if len(classes) < 2:
        raise SettingError(f"Answers are sorted into at least two classes, got {len(classes)}.")
    seen: dict[str, str] = {}
    for one in classes:
        if not (key := bare(one).casefold()):
            raise SettingError(f"A class is something that can be said; got {one!r}.")
        if key in seen:
            raise SettingError(
                f"The classes {seen[key]!r} and {one!r} read alike: case, quotes and a full stop do not count."
            )
        seen[key] = one
    return classes
