"""One request to a server that nobody vouches for: however it answers, bytes and seconds are bounded."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

MOST = 4 * 2**20
"""Bytes of an answer that are read."""

_PACKED = ("", "identity", "gzip", "deflate")
"""What is unpacked, one layer: 64 KiB of these are at most 66 MB. Other packings know no such bound."""


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Args:
        reason: its phrase for the status.
        body: as text; bytes that are no UTF-8 are replaced.
        whole: whether that is all of it, or the first ``MOST`` bytes.
    """

    status: int
    reason: str
    headers: Mapping[str, str]
    body: str
    whole: bool


def post(client: httpx.Client, url: str, content: Any, seconds: float) -> Answer:
    """Post JSON, and read what comes back.

    Args:
        client: with its own timeout, of silence; one that keeps no connection for later requests.
        content: what is sent; lone surrogates travel as escapes.
        seconds: for the whole exchange.

    Raises:
        TimeoutError: the answer was not whole in time.
        httpx.RequestError: of a connection that failed.
    """
    import httpx

    headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip, deflate"}
    deadline = _Deadline(seconds)
    try:
        with client.stream(
            "POST", url, content=json.dumps(content).encode(), headers=headers, extensions={"trace": deadline.trace}
        ) as response:
            if response.headers.get("Content-Encoding", "").strip().lower() not in _PACKED:
                raise httpx.DecodingError("the answer is packed in a way that was not asked for")
            body = bytearray()
            for part in response.iter_bytes():
                body += part[: MOST - len(body)]
                if len(body) == MOST:
                    break
            answer = Answer(
                response.status_code,
                response.reason_phrase,
                response.headers,
                body.decode("utf-8-sig", "replace"),
                whole=len(body) < MOST,
            )
    except httpx.RequestError as error:
        if not deadline.over:
            raise
        raise TimeoutError from error
    finally:
        deadline.lift()
    if deadline.over:  # a body of no announced length ends where its connection does
        raise TimeoutError
    return answer


class _Deadline:
    """Ends a request's connection when its time is over, wherever it hangs: httpx bounds silence only.

    Of use where the request opens a connection of its own.
    """

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._lines: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """httpx tells of its connections here. A copy of the socket stays valid when TLS takes the socket over."""
        if event == "connection.connect_tcp.complete":
            with self._lock:
                self._lines.append(info["return_value"].get_extra_info("socket").dup())
            if self.over:
                self._end()

    def lift(self) -> None:
        self._timer.cancel()
        with self._lock:
            for line in self._lines:
                line.close()
            self._lines.clear()

    def _end(self) -> None:
        self.over = True
        with self._lock, suppress(OSError):
            for line in self._lines:
                line.shutdown(socket.SHUT_RDWR)
