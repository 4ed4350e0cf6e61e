"""What models, servers and files say is read in a time that grows as its length does, not as its square."""

from __future__ import annotations

import signal
from contextlib import contextmanager, suppress

import pytest
import torch

from fs_plugins import FSPluginsError
from fs_plugins.evaluation.datasets.dataset import Dataset, Prompts, Sample
from fs_plugins.evaluation.judges import ExactMatch
from fs_plugins.evaluation.judges.exchange import Answer
from fs_plugins.evaluation.judges.prompt import number_in, question
from fs_plugins.evaluation.judges.remote import _message, _retry_after, _text
from fs_plugins.evaluation.suites import radius
from fs_plugins.evaluation.tasks import TASKS
from fs_plugins.files import parsed
from fs_plugins.hf.conversion import to_open_clip, to_transformers
from fs_plugins.hf.weights import find
from fs_plugins.sources import Source

LONG = 200_000
HEADS = ("", "A", "0.", "transformer.resblocks.1.", "encoder.layers.1.", "https://", '{"choices": ', "Mon, ")
PIECES = (
    "x",
    "1",
    " ",
    "\n",
    ".",
    ",",
    "-",
    "e",
    "(",
    "[",
    "{",
    "/",
    "</think>",
    "A ",
    "1e",
    "\u0663",
    "\ud800",
    "a/a.",
)

SAMPLE = Sample(image="a.png", question="which?", options=("blue", "red"), answer="red", label="cat")


def dataset(tmp_path, answers: str) -> Dataset:
    return Dataset("mine", tmp_path, (SAMPLE,), ("cat", "dog"), prompts=Prompts(vqa_answers=answers))


def answer(text: str) -> Answer:
    return Answer(200, "", {}, text, whole=True)


def weights(text: str) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(1) for name in ("conv1.weight", "class_embedding", "encoder.layers.0.mlp.fc1.weight", text)
    }


READERS = {
    "a judge's number": lambda text, folder: number_in(text),
    "a judge's answer": lambda text, folder: _text(answer(text)),
    "a server's error": lambda text, folder: _message(answer(text)),
    "a server's wish to wait": lambda text, folder: _retry_after(text),
    "a judge's question": lambda text, folder: question(text, text),
    "captions that are compared": lambda text, folder: list(ExactMatch().scores([(text, text)])),
    "the number of a class": lambda text, folder: TASKS["classification"].parse(
        text, SAMPLE, dataset(folder, "letter")
    ),
    "the letter of an option": lambda text, folder: TASKS["vqa"].parse(text, SAMPLE, dataset(folder, "letter")),
    "the words of an option": lambda text, folder: TASKS["vqa"].parse(text, SAMPLE, dataset(folder, "option")),
    "a template": lambda text, folder: Prompts(vqa=text),
    "a radius": lambda text, folder: radius(text),
    "JSON": lambda text, folder: parsed(text),
    "a source of the hub": lambda text, folder: Source(state="hub", path=text, sha256="0" * 64),
    "a source on the web": lambda text, folder: Source(state="url", path=text, sha256="0" * 64),
    "open_clip's weights": lambda text, folder: to_transformers(weights(text)),
    "transformers' weights": lambda text, folder: to_open_clip(weights(text)),
    "the name of an encoder": lambda text, folder: find(text, None),
}


@contextmanager
def guarded(seconds: int = 60):
    """Ends what a quadratic expression would take hours for. What is linear takes no second here."""

    def over(*args):
        pytest.fail(f"not read after {seconds} s")

    former = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


@pytest.mark.parametrize("reader", READERS)
def test_long_text_is_read_or_refused_in_linear_time(reader, tmp_path):
    for head in HEADS:
        for piece in PIECES:
            text = head + piece * (LONG // len(piece))
            with guarded(), suppress(FSPluginsError, ValueError):
                READERS[reader](text, tmp_path)


def test_the_number_in_a_long_answer_is_found():
    assert number_in("x" * 400_000 + " 0.7") == 0.7
    assert number_in("0.7 " + "x" * 400_000) == 0.7
    assert number_in("x" * 400_000 + "0.7") is None
    assert number_in("x" * 400_000) is None


@pytest.mark.parametrize(
    "template", ["{question:>9999999999} {options}", "{question!r} {options}", "{question} {options:{none}}"]
)
def test_templates_that_blow_words_up_are_refused(template):
    with pytest.raises(ValueError, match="no other braces"):
        Prompts(vqa=template)


@pytest.mark.parametrize(
    "text", ["1e999999999", "1/1e-999999999", "1e-999999999", "nan", "inf/inf", "1/0", "", "/", "1/2/3", "0x1"]
)
def test_a_radius_that_is_none_is_refused(text):
    with pytest.raises(FSPluginsError):
        radius(text)


@pytest.mark.parametrize(
    ("text", "value"), [("16/255", 16 / 255), ("8 / 255", 8 / 255), ("0.05", 0.05), ("5e-2", 0.05), ("1", 1)]
)
def test_a_radius_is_read_as_people_write_it(text, value):
    assert radius(text) == value
