"""A language model behind an OpenAI-compatible endpoint, as a judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fs_plugins.errors import JudgeError
from fs_plugins.evaluation.judges.prompt import DIGEST, REMINDER, number_in, question
from fs_plugins.evaluation.judges.remote import Messages, RemoteModel


class Endpoint(RemoteModel[tuple[str, str], float]):
    """A language model behind any OpenAI-compatible chat-completions endpoint: an answer without one number from 0 to 1
    is asked again.

    ``name`` holds the model and a digest of the prompt, not the server: a model's name is taken to mean the same model
    everywhere.

    Args:
        url, model, api_key, timeout, retries, parallel, sleep: as for ``RemoteModel``; a pair is asked about at a time.

    Raises:
        SettingError: httpx is not installed, or an argument is out of range.
    """

    who = "The judge behind an endpoint"
    expected, reminder = "one number from 0 to 1", REMINDER
    failed = JudgeError

    @property
    def name(self) -> str:
        return f"endpoint({self.model}, prompt {DIGEST})"

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Iterator[float]:
        """See ``Judge.scores``. When it ends, however it ends, no request is under way any more.

        Raises:
            JudgeError: the server refuses, cannot be reached, or gives no score, with its own words.
        """
        return self.each(pairs)

    def messages(self, asked: tuple[str, str]) -> Messages:
        # No limit on tokens: its name differs between servers, and a model that reasons needs many.
        return [{"role": "user", "content": question(*asked)}]

    def read(self, said: str) -> float | None:
        return number_in(said)

    def failure(self, place: int, number: int, times: str, why: str) -> str:
        return (
            f"The judge {self.model!r} at {self.where} gave no score for pair {place} of {number} (asked {times}): "
            f"{why} The scores of the pairs before it stand."
        )
