"""The judge behind an endpoint, asked by a server that answers as no server should. Every fault is a sentence."""

from __future__ import annotations

import base64
import gzip
import json
import socketserver
import threading
from contextlib import suppress

import pytest
from serving import SECRET, taken

from fs_plugins import FSPluginsError, JudgeError, SettingError
from fs_plugins.evaluation.judges import KEY, Endpoint, remote
from fs_plugins.evaluation.judges.exchange import MOST
from fs_plugins.evaluation.judges.remote import _retry_after

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
JSON = {"choices": [{"message": {"content": "0.5"}}]}


class Raw(socketserver.ThreadingTCPServer):
    """Reads a request, and then says on the socket whatever ``say(send, gone)`` says.

    ``send`` gives the bytes sent so far; ``gone`` is set when the client has hung up, or the test is over.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Raw.Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.gone = threading.Event()
        self.sent = 0
        self.requests: list[bytes] = []
        self.say = lambda send, gone: send(whole(json.dumps(JSON).encode()))
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            head, length = b"", 0
            while not head.endswith(b"\r\n\r\n"):
                head += self.rfile.readline()
            for line in head.lower().splitlines():
                if line.startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            self.server.requests.append(head + self.rfile.read(length))
            with suppress(OSError):
                self.server.say(self.send, self.server.gone)

        def send(self, data: bytes) -> int:
            self.wfile.write(data)
            self.server.sent += len(data)
            return self.server.sent


def whole(body: bytes, *headers: bytes) -> bytes:
    extra = b"".join(header + b"\r\n" for header in headers)
    return OK + extra + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.fixture
def raw(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(KEY, raising=False)
    with Raw() as running:
        yield running
        running.gone.set()
        running.shutdown()


def refused(raw: Raw, **options) -> str:
    judge = Endpoint(raw.url, "m", **{"retries": 0, "sleep": lambda seconds: None} | options)
    return str(taken(judge.scores([("a cat", "a dog")]))[1])


# Bytes


def test_an_endless_answer_is_read_up_to_a_bound(raw):
    def endless(send, gone):
        send(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        while not gone.is_set():
            send(b"10000\r\n" + b" " * 0x10000 + b"\r\n")

    raw.say = endless
    assert f"its answer is longer than {MOST >> 20} MiB" in refused(raw)
    assert raw.sent < 16 * MOST  # what fits into the buffers between


def test_an_answer_that_announces_gigabytes_is_read_up_to_a_bound(raw):
    def huge(send, gone):
        send(OK + b"Content-Length: 1500000000\r\n\r\n")
        while send(b"x" * 0x10000) < 1_500_000_000:
            pass

    raw.say = huge
    assert f"its answer is longer than {MOST >> 20} MiB" in refused(raw)
    assert raw.sent < 16 * MOST


def test_an_answer_as_long_as_the_bound_allows_counts(raw):
    body = json.dumps(JSON).encode()
    raw.say = lambda send, gone: send(whole(body + b" " * (MOST - 1 - len(body))))
    assert list(Endpoint(raw.url, "m").scores([("a cat", "a dog")])) == [0.5]


@pytest.mark.parametrize("packed", [True, False])
def test_packed_answers_are_unpacked_up_to_the_bound(raw, packed):
    body = json.dumps(JSON).encode() if packed else b" " * 100 * MOST
    raw.say = lambda send, gone: send(whole(gzip.compress(body, 1), b"Content-Encoding: gzip"))
    if packed:
        assert list(Endpoint(raw.url, "m").scores([("a cat", "a dog")])) == [0.5]
    else:
        assert "longer than" in refused(raw)


@pytest.mark.parametrize("packing", [b"br", b"zstd", b"gzip, gzip", b"gzip, gzip, gzip"])
def test_packings_that_were_not_asked_for_are_refused(raw, packing):
    raw.say = lambda send, gone: send(whole(b"x", b"Content-Encoding: " + packing))
    assert "packed in a way that was not asked for" in refused(raw)


def test_an_error_that_goes_on_for_ever_is_quoted_from_its_beginning(raw):
    raw.say = lambda send, gone: send(
        b"HTTP/1.1 401 No\r\nContent-Length: 99999999\r\n\r\nno such key" + b"!" * 2 * MOST
    )
    assert 'it answered 401: "no such key!!' in refused(raw)


# Seconds


def dripping(start: bytes, drop: bytes = b" "):
    def say(send, gone):
        send(start)
        while not gone.wait(0.01):
            send(drop)

    return say


@pytest.mark.parametrize(
    "start",
    [
        OK + b"Content-Length: 1000000\r\n\r\n",
        OK + b"\r\n" + json.dumps(JSON).encode(),  # ends where the connection does
        OK + b"X-Slow: ",
        b"HTTP/1.1 2",
    ],
    ids=["in the body", "after an answer that has no announced end", "in a header", "in the first line"],
)
def test_an_answer_that_drips_is_ended(raw, start, monkeypatch):
    monkeypatch.setattr(remote, "_WHOLE", 0.05)
    raw.say = dripping(start)
    assert "no whole answer within 0.5 s" in refused(raw, timeout=10)


def test_a_server_that_drips_once_is_asked_again(raw, monkeypatch):
    monkeypatch.setattr(remote, "_WHOLE", 0.1)

    def say(send, gone):
        if len(raw.requests) == 1:
            dripping(OK + b"Content-Length: 1000000\r\n\r\n")(send, gone)
        send(whole(json.dumps(JSON).encode()))

    raw.say = say
    slept: list[float] = []
    judge = Endpoint(raw.url, "m", timeout=10, retries=5, sleep=slept.append)
    assert list(judge.scores([("a cat", "a dog")])) == [0.5]
    assert slept[0] == 1


# What cannot be read


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    "body",
    [
        NESTED.encode(),
        b'{"choices": ' + NESTED.encode() + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000,
        b"NaN",
        b'{"choices": NaN}',
        b'{"choices": [{"message": {"content": NaN}}]}',
        b'{"choices": [{"message": {"content": ' + b"9" * 10_000 + b"}}]}",
        b'{"choices": {"0": 1}}',
        b'{"choices": "0.5"}',
        b"\xff\xfe\x00",
        b"\x00" * 100,
        b"",
        b'{"choices": [{"message": {"content": "\\ud800"}}]}',
        b'{"choices": [{"message": {"content": "\\udcff 0.5 0.6"}}]}',
        b'{"choices": [{"message": {"content": "' + b"x" * 400_000 + b'"}}]}',
        b'{"choices": [{"message": {"content": "' + b"1" * 400_000 + b'"}}]}',
    ],
    ids=lambda body: repr(body[:30]),
)
@pytest.mark.parametrize("status", [200, 400, 429, 500])
def test_what_is_no_answer_is_a_judge_error_that_can_be_printed(raw, body, status):
    raw.say = lambda send, gone: send(whole(body).replace(b"200 OK", b"%d Said" % status))
    said = refused(raw, retries=1)
    assert said.encode()
    assert len(said) < 3000
    assert "it answered" in said if status != 200 else "its answer" in said or "it said" in said


def test_a_byte_order_mark_is_no_fault(raw):
    raw.say = lambda send, gone: send(whole(b"\xef\xbb\xbf" + json.dumps(JSON).encode()))
    assert list(Endpoint(raw.url, "m").scores([("a cat", "a dog")])) == [0.5]


@pytest.mark.parametrize("text", ["a cat \ud800", "\udcff"])
def test_captions_that_no_encoding_can_write_are_sent_with_question_marks(raw, text):
    assert list(Endpoint(raw.url, "m").scores([(text, text)])) == [0.5]
    asked = json.loads(raw.requests[0].partition(b"\r\n\r\n")[2])["messages"][0]["content"]
    assert text.replace("\ud800", "?").replace("\udcff", "?") in asked


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("9" * 5000, 1e9),
        ("1e400", 0),
        ("-5", 0),
        ("nan", 0),
        ("inf", 0),
        ("\u00b2", 0),
        ("", 0),
        (", " * 40_000, 0),
        ("x" * 90_000, 0),
        ("Mon, 01 Jan 99999 00:00:00 GMT", 0),
        ("Mon, 01 Jan 2000 00:00:00 +99999999999999999999", 0),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0),
        ("Mon, 01 Jan " + "9" * 5000 + " 00:00:00 GMT", 0),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_retry_after_that_makes_no_sense_is_bounded(header, seconds):
    assert _retry_after(header) == seconds


@pytest.mark.parametrize("header", [b"9" * 5000, b"Fri, 31 Dec 9999 23:59:59 GMT", b"Fri, 31 Dec 9999 23:59:59 -2359"])
def test_a_retry_after_of_ages_ends_the_run(raw, header):
    answer = b"HTTP/1.1 429 No\r\nRetry-After: " + header + b"\r\nContent-Length: 0\r\n\r\n"
    raw.say = lambda send, gone: send(answer)
    assert "and 600 is the limit." in refused(raw, retries=5)


# What is secret


def test_a_password_in_the_address_does_not_take_the_place_of_the_key(raw, monkeypatch):
    url = raw.url.replace("http://", f"http://me:{SECRET}@")
    with pytest.raises(SettingError, match="a server takes one of them") as error:
        Endpoint(url, "m", api_key="sk-mine")
    assert SECRET not in str(error.value)
    monkeypatch.setenv(KEY, "sk-mine")
    with pytest.raises(SettingError, match="OPENAI_API_KEY of the environment"):
        Endpoint(url, "m")
    assert list(Endpoint(url, "m", api_key="").scores([("a cat", "a dog")])) == [0.5]
    basic = base64.b64encode(f"me:{SECRET}".encode())
    assert b"Authorization: Basic " + basic in raw.requests[0]


@pytest.mark.parametrize("password", [SECRET, "p@ss/word%1", 'quo"ted<&>'])
@pytest.mark.parametrize("status", [b"200 OK", b"401 No", b"302 Found", b"500 Oops"])
def test_what_is_secret_in_the_address_comes_back_in_no_error(raw, password, status):
    from urllib.parse import quote

    typed = quote(password, safe="")
    url = raw.url.replace("http://", f"http://me:{typed}@") + f"?api-key={typed}"

    def parrot(send, gone):
        said = raw.requests[-1].partition(b"\r\n\r\n")[0].decode() + f" {password} {typed} {json.dumps(password)}"
        body = json.dumps({"error": {"message": said}}) if b"5" in status else said
        send(whole(body.encode(), b"Location: /?api-key=" + typed.encode()).replace(b"200 OK", status))

    raw.say = parrot
    judge = Endpoint(url, "m", retries=0, sleep=lambda seconds: None)
    told = str(taken(judge.scores([("a cat", "a dog")]))[1])
    secrets = (password, typed, json.dumps(password)[1:-1], base64.b64encode(f"me:{password}".encode()).decode())
    assert "[key]" in told
    assert not [secret for secret in secrets if secret in told + judge.name]


@pytest.mark.parametrize(
    "url",
    [
        f"http://me:{SECRET}@a..b/v1",
        f"http://me:{SECRET}@{'a' * 70}.org/v1",
        f"http://me:{SECRET}@host:99999/v1",
        f"http://me:{SECRET}@[::1/v1",
        f"http://host/v1?key={SECRET}\x01",
        f"http://\udcff.org/?key={SECRET}",
        f"http://host/\ud800?key={SECRET}",
        f"http://host/?key={SECRET}{'a' * 70_000}",
        f"{SECRET}",
        5,
        None,
    ],
)
def test_an_address_that_cannot_be_asked_is_refused_without_showing_its_secrets(url):
    with pytest.raises(SettingError, match="url must be an http or https address") as error:
        Endpoint(url, "m")
    assert SECRET not in str(error.value)


def test_a_proxy_that_cannot_be_used_is_a_judge_error(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "gopher://me:word@127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(JudgeError, match="No client for") as error:
        list(Endpoint("http://example.invalid", "m").scores([("a", "b")]))
    assert isinstance(error.value, FSPluginsError)
    assert "word" not in str(error.value)
