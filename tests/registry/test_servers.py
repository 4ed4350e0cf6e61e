"""Servers that send too much, too slowly, or elsewhere, and addresses that are none."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import os
import socket
import threading
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from pydantic import ValidationError
from registering import SHA, files
from test_sources import published

from fs_plugins import PSMError, RegistryError, sources
from fs_plugins.files import filling
from fs_plugins.sources import Source, source_of

OK = b"HTTP/1.1 200 OK\r\n"


class Plain(http.client.HTTPConnection):
    response_class = sources._Answer


class AsHTTPS(urllib.request.HTTPSHandler):
    """Nobody signs certificates for a test's server: https:// goes to it as it is."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port

    def https_open(self, request):
        request.host = f"127.0.0.1:{self.port}"
        return self.do_open(Plain, request)


@pytest.fixture
def serve(monkeypatch):
    """Answer every request with these pieces, each sent by itself, for as long as somebody listens."""

    @contextmanager
    def serving(pieces: Iterable[bytes]) -> Iterator[None]:
        server = socket.create_server(("127.0.0.1", 0))

        def answer() -> None:
            with suppress(OSError):
                while True:
                    client, _ = server.accept()
                    with client, suppress(OSError):
                        client.recv(65536)
                        for piece in pieces:
                            client.sendall(piece)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), sources._OnlySecure, AsHTTPS(server.getsockname()[1])
        )
        monkeypatch.setattr(sources, "_open", lambda url: opener.open(url, timeout=5))
        try:
            yield
        finally:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()
            thread.join(5)

    return serving


def one(**facts) -> Source:
    return Source(**{"state": "url", "path": "https://example.org/model.pt", "sha256": SHA, **facts})


@pytest.mark.parametrize("head", [b"", b"Content-Length: 999999999999\r\n"])
def test_without_a_size_something_bounds_the_bytes_all_the_same(online, serve, monkeypatch, head):
    monkeypatch.setattr(sources, "_MOST", 10 << 20)

    def endless():
        return itertools.chain([OK + head + b"\r\n"], itertools.repeat(bytes(1 << 20)))

    with serve(endless()), pytest.raises(RegistryError, match=r"more than 10,485,760 bytes, .* no size. Nothing of it"):
        one().fetch(Path(), "It")
    with serve(endless()), pytest.raises(PSMError, match=r"gave 1,048,576 bytes .*, not 1,000 with"):
        one(size=1000).fetch(Path(), "It")
    assert files(online) == []


DRIPS = {
    "body": [OK, b"Content-Length: 1000000000\r\n\r\n"],
    "headers": [OK, b"X-Long: "],
    "status": [b"HTTP/1.1 200 "],
    "chunks": [OK, b"Transfer-Encoding: chunked\r\n\r\n1;"],
}


@pytest.mark.parametrize("place", DRIPS)
def test_a_server_that_drips_is_left(online, serve, monkeypatch, place):
    """The clock goes 1,000 seconds further whenever somebody looks at it."""
    clock = itertools.count(0, 1000)
    monkeypatch.setattr(sources, "monotonic", lambda: float(next(clock)))
    drip = itertools.chain(DRIPS[place], itertools.repeat(b"a"))
    with serve(drip), pytest.raises(RegistryError, match=r"could not be fetched.*bytes in \d+ seconds, too slow"):
        one().fetch(Path(), "It")
    assert files(online) == []


def test_a_server_that_is_slow_and_does_not_drip_is_waited_for(online, serve, monkeypatch, site):
    """Half a second for every look at the clock."""
    clock = itertools.count(0, 0.5)
    monkeypatch.setattr(sources, "monotonic", lambda: float(next(clock)))
    whole = os.urandom(2_000_000)
    pieces = [OK + f"Content-Length: {len(whole)}\r\n\r\n".encode()]
    pieces += [whole[i : i + 5000] for i in range(0, len(whole), 5000)]
    digest = hashlib.sha256(whole).hexdigest()
    with serve(pieces):
        folder = one(sha256=digest).fetch(Path(), "It")
    assert (folder / "model.pt").read_bytes() == whole


def test_trailers_end_too(online, serve, monkeypatch):
    monkeypatch.setattr(sources, "_ENDLESS", 1 << 20)
    start = OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
    trailers = itertools.chain([start], itertools.repeat(b"a: b\r\n" * 1000))
    with serve(trailers), pytest.raises(RegistryError, match="bytes and no end"):
        one().fetch(Path(), "It")


ODD = [
    "https://[/x/",
    "https://[::1/x/",
    "https://[zz]/x/",
    "https:///x/",
    "https://:443/x/",
    "https://h:99999/x/",
    "https://h:0/x/",
    "https://h:-1/x/",
    "https://h:port/x/",
    "https://a b/x/",
    "https://h/a b/",
    "https://h/\n/",
    "https://h/\x1b[31m/",
    "https://é.org/x/",
    "https://h/é/",
    "https://h/\udc80/",
    "https://user:password@h/x/",
    "https://user@h/x/",
    "https://a..b/x/",
    f"https://{'a' * 64}.org/x/",
    "https://h\\@i/x/",
]


@pytest.mark.parametrize("url", ODD, ids=ascii)
def test_addresses_that_are_none_are_refused_where_they_are_written(url):
    with pytest.raises(ValidationError, match=r"that is no address|special characters encoded|begins with https"):
        one(path=url)
    with pytest.raises(RegistryError, match=r"no address|encoded|begins with https"):
        source_of(url, SHA)


@pytest.mark.parametrize("url", ODD, ids=ascii)
def test_redirections_to_them_are_refused_in_words(online, serve, url):
    location = url.encode("utf-8", "surrogateescape").replace(b"\n", b"%0A")
    answer = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nConnection: close\r\nLocation: " + location + b"\r\n\r\n"
    with serve([answer]), pytest.raises(RegistryError, match=r"It could not be fetched from https://example.org"):
        one().fetch(Path(), "It")
    assert files(online) == []


def test_what_gets_past_the_schema_is_told_all_the_same(online, monkeypatch):
    """Opening an address may raise what no address of ours should."""
    for error in (OverflowError("port must be 0-65535."), UnicodeError("label too long"), ValueError("bad")):

        def fail(url, error=error):
            raise error

        monkeypatch.setattr(sources, "_open", fail)
        with pytest.raises(RegistryError, match="could not be fetched"):
            one().fetch(Path(), "It")


def test_the_real_opener_paces_every_answer():
    opener = urllib.request.build_opener(sources._OnlySecure, sources._OnePace)
    assert [type(handler) for handler in opener.handle_open["https"]] == [sources._OnePace]
    assert sources._Connection.response_class is sources._Answer


def test_what_another_is_at_stays_whatever_the_clock_says(tmp_path, site):
    with filling(tmp_path / "into") as fresh:
        (fresh / "half").write_bytes(b"abc")
        for path in (fresh / "half", fresh, Path(f"{fresh}.lock")):
            os.utime(path, (0, 0))
        with filling(tmp_path / "into") as other:
            (other / "whole").write_bytes(b"def")
        assert (fresh / "half").exists()
    assert files(tmp_path / "into") == ["half", "whole"]
    (tmp_path / "into" / ".fs-plugins-partial-dead").mkdir()
    (tmp_path / "into" / ".fs-plugins-partial-dead" / "half").write_bytes(b"x")
    with filling(tmp_path / "into"):
        pass
    assert files(tmp_path / "into") == ["half", "whole"]
    assert published(site).size
