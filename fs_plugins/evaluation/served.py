"""A model as somebody serves it, asked about pictures through its endpoint; what stands behind that is not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from fs_plugins.errors import EndpointError, SettingError
from fs_plugins.evaluation.datasets import Dataset, Sample
from fs_plugins.evaluation.judges.remote import Messages, RemoteModel
from fs_plugins.evaluation.subjects import Subject
from fs_plugins.evaluation.tasks import TOKENS, Task
from fs_plugins.pictures import address, png, to_pil


class Question(NamedTuple):
    """What is asked about a picture, and the tokens that an answer may have."""

    picture: Image.Image
    text: str
    max_new_tokens: int


class ServedModel(RemoteModel[Question, str]):
    """A model that looks at pictures behind any OpenAI-compatible chat-completions endpoint: ``fs-plugins serve``,
    vLLM, others. ``each`` has its answers, greedy ones.

    Pictures travel as PNG, in the size that they have.

    Args:
        url, model, api_key, timeout, retries, parallel, sleep: as for ``RemoteModel``; most servers say nothing until
            an answer is whole, which a large model may take minutes for.

    Raises:
        SettingError: httpx is not installed, or an argument is out of range.
    """

    who = "Asking a served model"
    failed = EndpointError

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 600,
        retries: int = 4,
        parallel: int = 4,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        super().__init__(url, model, api_key=api_key, timeout=timeout, retries=retries, parallel=parallel, sleep=sleep)

    def messages(self, asked: Question) -> Messages:
        shown = {"type": "image_url", "image_url": {"url": address(png(asked.picture))}}
        return [{"role": "user", "content": [shown, {"type": "text", "text": asked.text}]}]

    def settings(self, asked: Question) -> Mapping[str, Any]:
        return {"max_tokens": asked.max_new_tokens}

    def read(self, said: str) -> str:
        return said.strip()

    def failure(self, place: int, number: int, times: str, why: str) -> str:
        return (
            f"The model {self.model!r} at {self.where} gave no answer about picture {place} of {number} (asked "
            f"{times}): {why}"
        )


def refuse_smoothing(*given: object) -> None:
    """Refuse settings of smoothing beside an endpoint, where they are not those that nobody gave.

    Args:
        given: psm, sigma, n0 and, where there is one, seed.

    Raises:
        SettingError: one of them was given.
    """
    if given != ("auto", None, 4, None)[: len(given)]:
        options = ", ".join(("--psm", "--sigma", "--n0", "--seed")[: len(given)])
        raise SettingError(
            f"{options} smooth a model in this process. What an --endpoint serves is smoothed by its server or not at "
            "all; give them to fs-plugins serve."
        )


class Elsewhere:
    """A subject whose replies are a served model's: pictures are attacked on the subject and shown to the other.

    They are rounded to eight bits, and resized by the server if its model sees another size.
    """

    def __init__(self, subject: Subject, served: ServedModel) -> None:
        self.model, self.call, self.tasks = subject.model, subject.call, subject.tasks
        self.served = served

    def reply(self, task: Task, images: Tensor, samples: Sequence[Sample], dataset: Dataset) -> list[str]:
        prompts = [task.prompt(sample, dataset) for sample in samples]
        shown = zip(map(to_pil, images), prompts, strict=True)
        return list(self.served.each([Question(*pair, TOKENS[task.name]) for pair in shown]))
