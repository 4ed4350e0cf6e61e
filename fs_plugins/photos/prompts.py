"""What is asked about photographs, and how ``photo-vlm`` was taught to answer: training and evaluation both read it.

A choice is answered by the option's own words, and nothing else is said, as the tasks judge it.
"""

from __future__ import annotations

from fs_plugins.evaluation.datasets import Prompts

QUESTION = "What is in this photograph?"
"""With options, one of them is the answer; without, ``named``, with a capital and a full stop."""

PROMPTS = Prompts(
    captioning="Describe this photograph in one sentence.",
    classification=f"{QUESTION} Choose one: {{classes}}.",
    classification_answers="name",
    vqa="{question} Choose one: {options}.",
    vqa_answers="option",
)

_PLURAL = ("binoculars", "parallel bars", "sunglasses", "swimming trunks")
_UNCOUNTED = (
    "brass", "broccoli", "carbonara", "cauliflower", "chain mail", "chocolate sauce", "consomme", "corn", "dough",
    "eggnog", "espresso", "face powder", "guacamole", "hair spray", "hay", "ice cream", "lotion", "mashed potato",
    "perfume", "rapeseed", "red wine", "sunscreen", "thatch", "toilet tissue", "velvet", "wool",
)  # fmt: skip


def named(name: str) -> str:
    """A class as a sentence names it: ``an ox``, ``a unicycle``, ``espresso``."""
    if name in _PLURAL or name in _UNCOUNTED:
        return name
    start = name.lower()
    vowel = start[0] in "aeiou" and not start.startswith(("eu", "uni"))
    return f"{'an' if vowel or start == 'hourglass' else 'a'} {name}"


def answer(name: str) -> str:
    """What is said of a class to ``QUESTION`` without options: ``A unicycle.``"""
    said = named(name)
    return f"{said[0].upper()}{said[1:]}."


def caption(name: str) -> str:
    """What is said of it to the prompt for captions: ``A photo of a unicycle.``"""
    return f"A photo of {named(name)}."
