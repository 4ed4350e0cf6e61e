"""A model behind an OpenAI-compatible endpoint, asked one question after the other, with patience."""

from __future__ import annotations

import base64
import html
import os
import re
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar
from urllib.parse import unquote, unquote_plus, urlsplit, urlunsplit

from fs_plugins.checks import number, whole
from fs_plugins.errors import FSPluginsError, SettingError
from fs_plugins.evaluation.judges.exchange import MOST, Answer, post
from fs_plugins.evaluation.judges.packages import package
from fs_plugins.evaluation.judges.prompt import quoted
from fs_plugins.files import parsed

if TYPE_CHECKING:
    import httpx

KEY = "OPENAI_API_KEY"
"""Environment variable: the key that is sent if none is given."""

A = TypeVar("A")
T = TypeVar("T")
Messages = list[dict[str, Any]]
"""OpenAI's: ``{"role": ..., "content": ...}``."""


class RemoteModel(ABC, Generic[A, T]):
    """A model behind any OpenAI-compatible chat-completions endpoint, at temperature 0: whatever is asked (A), an
    answer (T).

    Trouble that may pass is met with patience: timeouts, connection errors, 429 and 5xx are tried again after 1, 2,
    4, ... seconds, or as long as the server's Retry-After says; an answer that cannot be read is asked again with a
    reminder.

    Args:
        url: the API's address, such as ``https://api.openai.com/v1``, with or without ``/chat/completions``. A user and
            a password in it are sent in place of a key. They, and what stands in its query, are as secret as a key.
        model: the name that the server knows the model by.
        api_key: what is sent as a bearer token; by default the environment's OPENAI_API_KEY, if that is set; "" sends
            none. It appears in no name, answer or error.
        timeout: seconds without a byte from the server; a whole answer may take ten times as long.
        retries: how often one thing is asked again, whatever the reasons.
        parallel: requests at a time. Once one has failed for good, up to ``parallel`` - 1 later ones may have been
            made for nothing.
        sleep: called with the seconds to wait before something is asked again; by default a wait that ends early when
            the answers are no longer wanted.

    Raises:
        SettingError: httpx is not installed, or an argument is out of range.
    """

    who: ClassVar[str]
    """What needs httpx."""
    expected: ClassVar[str] = "an answer"
    """What one was to be that cannot be read."""
    reminder: ClassVar[str] = "Answer the question again."
    """Sent after such an answer."""
    failed: ClassVar[type[FSPluginsError]]
    """Raised where there is no answer."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 60,
        retries: int = 4,
        parallel: int = 4,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        if not (isinstance(model, str) and model.strip()):
            raise SettingError(f"model must be the name of a model, got {model!r}.")
        package("httpx", self.who)
        self._url, self.where, hidden = _address(url)
        self._key = _checked_key(api_key)
        if self._key and "@" in urlsplit(self._url).netloc:
            raise SettingError(
                "url holds a user or a password, and there is a key: a server takes one of them. Leave them out of the "
                f'url, or send no key by api_key="" (without one it is {KEY} of the environment).'
            )
        self._secrets = _hidden([self._key, *hidden])
        self._sleep = sleep
        self.model = model
        self.timeout = number("timeout must be a positive number of seconds", timeout, lambda seconds: seconds > 0)
        self.retries = whole("retries", retries, least=0)
        self.parallel = whole("parallel", parallel)

    @abstractmethod
    def messages(self, asked: A) -> Messages:
        """What is sent."""

    def settings(self, asked: A) -> Mapping[str, Any]:
        """Of a request, beside the model, the messages and the temperature."""
        return {}

    @abstractmethod
    def read(self, said: str) -> T | None:
        """What the model said, or None if it is not what was asked for."""

    @abstractmethod
    def failure(self, place: int, number: int, times: str, why: str) -> str:
        """The sentence for the ``place``-th of ``number``, asked so many ``times``."""

    def each(self, asked: Sequence[A]) -> Iterator[T]:
        """The answers in order, as they come. When it ends, however it ends, no request is under way any more.

        Raises:
            FSPluginsError: ``failed``: the server refuses, cannot be reached, or gives no answer, with its own words.
        """
        import httpx

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        unwanted = threading.Event()
        under_way: deque[Future[T]] = deque()
        pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="judge")
        limits = httpx.Limits(max_connections=self.parallel, max_keepalive_connections=0)
        try:
            made = httpx.Client(headers=headers, timeout=self.timeout, limits=limits)
        except (ImportError, ValueError, httpx.InvalidURL) as error:  # of a proxy that the environment names
            raise self.failed(f"No client for {self.where} can be made: {self._quote(str(error))}") from None
        with made as client:
            try:
                for i, one in enumerate(asked):
                    under_way.append(pool.submit(self._answer, client, one, (i + 1, len(asked)), unwanted))
                    if len(under_way) == self.parallel:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            finally:
                unwanted.set()
                pool.shutdown(cancel_futures=True)

    def _answer(self, client: httpx.Client, one: A, place: tuple[int, int], unwanted: threading.Event) -> T:
        """One answer, asked for as often as it takes and ``retries`` allows."""
        asking = self.messages(one)
        body = {"model": self.model, "messages": asking, "temperature": 0, **self.settings(one)}
        for asked in count(1):
            answer = self._ask(client, body)
            if not isinstance(answer, _NoAnswer):
                return answer
            last = answer.final or asked > self.retries
            if answer.busy and not last:
                pause = min(2.0 ** min(asked - 1, 10), _LONGEST_PAUSE)
                sleep = unwanted.wait if self._sleep is None else self._sleep
                sleep(max(answer.wait, pause))
            if last or unwanted.is_set():
                times = "once" if asked == 1 else f"{asked} times"
                raise self.failed(self.failure(*place, times, answer.what))
            if answer.said is not None:
                again = {"role": "assistant", "content": answer.said[:_LONGEST_QUOTE]}
                body["messages"] = [*asking, again, {"role": "user", "content": self.reminder}]
        raise AssertionError("the loop ends with an answer or an error")

    def _ask(self, client: httpx.Client, body: Mapping[str, Any]) -> T | _NoAnswer:
        """One request."""
        import httpx

        try:
            answer = post(client, self._url, body, _WHOLE * self.timeout)
        except TimeoutError:
            return _NoAnswer(f"no whole answer within {_WHOLE * self.timeout:g} s.", busy=True)
        except httpx.TimeoutException:
            return _NoAnswer(f"no answer within {self.timeout:g} s.", busy=True)
        except httpx.RequestError as error:
            return _NoAnswer(f"the connection failed: {type(error).__name__}: {self._quote(str(error))}", busy=True)
        if answer.status == 429 or answer.status >= 500:
            wait = _retry_after(answer.headers.get("Retry-After", ""))
            what = f"it answered {answer.status}: {self._quote(_message(answer))}"
            if wait > _LONGEST_WAIT:
                return _NoAnswer(
                    f"{what} It asks to wait {wait:.0f} s, and {_LONGEST_WAIT:.0f} is the limit.", final=True
                )
            return _NoAnswer(what, busy=True, wait=wait)
        if answer.status != 200:
            return _NoAnswer(f"it answered {answer.status}: {self._quote(_message(answer))}", final=True)
        if not answer.whole:
            return _NoAnswer(f"its answer is longer than {MOST >> 20} MiB and begins {self._quote(answer.body)}")
        said = _text(answer)
        if said is None:
            return _NoAnswer(f"its answer holds no choices[0].message.content: {self._quote(answer.body)}")
        read = self.read(said)
        if read is None:
            return _NoAnswer(f"{self.expected} was expected, and it said {self._quote(said)}", said=said)
        return read

    def _quote(self, text: str) -> str:
        """Somebody else's words, without the key and the address's secrets should they repeat one."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return quoted(text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}...") + "."


@dataclass(frozen=True)
class _NoAnswer:
    """Why a request gave no answer. ``final``: asking again is no use; ``busy``: not before a pause of ``wait`` s."""

    what: str
    said: str | None = None
    final: bool = False
    busy: bool = False
    wait: float = 0.0


_LONGEST_QUOTE = 500
_LONGEST_PAUSE, _LONGEST_WAIT = 60.0, 600.0
"""Seconds: the longest pause of our own accord, and the longest that a server may ask for."""
_WHOLE = 10
"""How many timeouts a whole answer may take."""


def _text(answer: Answer) -> str | None:
    """What the model said, or None if there is nothing of the kind."""
    try:
        said = parsed(answer.body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return said if isinstance(said, str) else None


def _message(answer: Answer) -> str:
    """What the server says about an error: the message in its JSON, wherever it keeps it, else the body."""
    try:
        found = parsed(answer.body)
    except ValueError:
        found = None
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    said = found if isinstance(found, str) else answer.body
    return said or answer.headers.get("Location") or answer.reason


def _retry_after(value: str) -> float:
    """Seconds, from a Retry-After in seconds or as a date; 0 if it is neither, or a date that no clock knows."""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        return min(float(value), 1e9)
    try:
        date = parsedate_to_datetime(value)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 0.0


def _address(url: str) -> tuple[str, str, list[str]]:
    """Where to post, the same as errors may show it, and what they may not: user, password and the query's values."""
    import httpx

    expected = "url must be an http or https address such as https://api.openai.com/v1"
    if not isinstance(url, str):
        raise SettingError(f"{expected}; got a {type(url).__name__}.")
    try:
        parts = urlsplit(url.strip())
        port = f":{parts.port}" if parts.port else ""
        (parts.hostname or "").encode("idna")
        httpx.URL(url.strip())
    except (ValueError, httpx.InvalidURL):  # their words may repeat what is secret
        raise SettingError(f"{expected}; got one that cannot be read: its host, its port or a character.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingError(f"{expected}; got one with scheme {parts.scheme!r} and host {parts.hostname or ''!r}.")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    hidden = [form for piece in re.split("[&=]", parts.query) for form in (piece, unquote_plus(piece))]
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    if user or password:
        pair = f"{unquote(user)}:{unquote(password)}"
        hidden += [user, unquote(user), password, unquote(password), base64.b64encode(pair.encode()).decode()]
    return urlunsplit(parts._replace(path=path, fragment="")), f"{parts.scheme}://{host}{port}{path}", hidden


def _hidden(secrets: Sequence[str]) -> list[str]:
    """In every form that a server may repeat them in, the longest first. Shorter ones are nobody's secret."""
    forms = {form for one in secrets for form in (one, quoted(one)[1:-1], html.escape(one)) if len(form) >= 4}
    return sorted(forms, key=len, reverse=True)


def _checked_key(given: str | None) -> str:
    """The key to send, or "". One that cannot stand in a header is refused here: httpx would quote it in its error."""
    source = "api_key" if given is not None else KEY
    key = (os.environ.get(KEY, "") if given is None else given).strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise SettingError(f"{source} holds characters that no key has: spaces, line breaks or letters beyond ASCII.")
    return key
