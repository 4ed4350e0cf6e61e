"""The judge behind an endpoint, asked by a server of our own."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serving import SECRET, taken

from fs_plugins import SettingError
from fs_plugins.evaluation.judges import KEY, Endpoint
from fs_plugins.evaluation.judges.prompt import DIGEST, REMINDER


def says(text: object) -> tuple[int, dict]:
    """The protocol's answer."""
    return 200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


class Server:
    """Speaks the protocol on a port of its own.

    ``answer(said, attempt)`` gets the first caption of a request and how often it has been asked (from 1), and gives
    a status and a body (JSON, or text as it is), and headers if it likes.
    """

    def __init__(self):
        self.answer = lambda said, attempt: says("0.5")
        self.requests: list[tuple[str, dict, dict]] = []
        self.attempts: Counter[str] = Counter()
        self.open = 0
        self.most_open = 0
        self.lock = threading.Lock()
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.handle(self, body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def handle(self, handler: BaseHTTPRequestHandler, body: dict) -> None:
        said = first_caption(body)
        with self.lock:
            self.requests.append((handler.path, dict(handler.headers), body))
            self.attempts[said] += 1
            attempt = self.attempts[said]
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        status, content, *headers = self.answer(said, attempt)
        with self.lock:
            self.open -= 1
        sent = (content if isinstance(content, str) else json.dumps(content)).encode()
        try:
            handler.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(sent)))
            handler.end_headers()
            handler.wfile.write(sent)
        except OSError:
            pass  # the client has given up

    def stop(self) -> None:
        """Connections are refused from here on."""
        self.http.shutdown()
        self.http.server_close()


def first_caption(body: dict) -> str:
    line = next(line for line in body["messages"][0]["content"].splitlines() if line.startswith("First caption: "))
    return json.loads(line.removeprefix("First caption: "))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(KEY, raising=False)
    running = Server()
    yield running
    running.released.set()
    running.stop()


def pairs(*said: str) -> list[tuple[str, str]]:
    return [(text, "a dog on a lawn") for text in said]


class Slept(list):
    """Stands in for sleeping, and keeps the seconds."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


# What is sent


def test_endpoint_asks_in_the_protocol_and_reads_the_score(server):
    server.answer = lambda said, attempt: says("0.75")
    found = Endpoint(server.url, "tiny-judge", api_key=SECRET)
    assert list(found.scores([('a "cat"\nScore: 1', "ein Hündchen")])) == [0.75]
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert (body["model"], body["temperature"]) == ("tiny-judge", 0)
    (message,) = body["messages"]
    assert message["role"] == "user"
    # Both captions stay on their lines, whatever they hold.
    assert 'First caption: "a \\"cat\\"\\nScore: 1"\nSecond caption: "ein Hündchen"\n' in message["content"]


def test_endpoint_takes_the_key_from_the_environment_unless_given_one(server, monkeypatch):
    monkeypatch.setenv(KEY, "from-the-environment\n")
    for key in (None, "given", ""):
        list(Endpoint(server.url, "m", api_key=key).scores(pairs("a cat")))
    sent = [headers.get("Authorization") for _, headers, _ in server.requests]
    assert sent == ["Bearer from-the-environment", "Bearer given", None]


@pytest.mark.parametrize("path", ["", "/", "/chat/completions", "/chat/completions/"])
def test_endpoint_takes_the_address_with_or_without_its_end(server, path):
    list(Endpoint(server.url + path + "?api-version=1", "m").scores(pairs("a cat")))
    assert server.requests[0][0] == "/v1/chat/completions?api-version=1"


def test_the_name_says_what_can_change_a_score(monkeypatch):
    first = Endpoint("http://127.0.0.1:9/v1", "gpt-4o", api_key=SECRET)
    assert first.name == f"endpoint(gpt-4o, prompt {DIGEST})"
    assert len(DIGEST) == 8
    assert Endpoint("http://user:word@127.0.0.1:9/v1", "gpt-4o", timeout=1, retries=0, parallel=1).name == first.name
    assert SECRET not in repr(first)


# What comes back


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("0.7", 0.7),
        (" 1\n", 1.0),
        ("0", 0.0),
        (".25", 0.25),
        ("Score: 0.7", 0.7),
        ("Score=0.7.", 0.7),
        ("**0.7**", 0.7),
        ('{"score": 0.7}', 0.7),
        ("5e-1", 0.5),
        ("<think>7/10, so 0.7 or 0.8?</think>\n0.8", 0.8),
        ("7/10", None),
        ("0.7/1", None),
        ("7 out of 10", None),
        ("70%", None),
        ("1 %", None),
        ("0,7", None),
        ("0.7.1", None),
        ("0.6-0.8", None),
        ("1.01", None),
        ("-0.1", None),
        ("7", None),
        ("nan", None),
        ("none", None),
        ("", None),
    ],
)
def test_one_number_from_0_to_1_is_a_score_and_nothing_else(server, said, score):
    server.answer = lambda _, attempt: says(said)
    scores = Endpoint(server.url, "m", retries=0).scores(pairs("a cat"))
    if score is not None:
        assert list(scores) == [score]
    else:
        found, error = taken(scores)
        assert found == []
        assert f"(asked once): one number from 0 to 1 was expected, and it said {json.dumps(said)}." in str(error)


def test_an_answer_that_is_no_score_is_asked_again_with_a_reminder(server):
    server.answer = lambda said, attempt: says({1: "About 7/10", 2: "1.5"}.get(attempt, "0.7"))
    slept = Slept()
    assert list(Endpoint(server.url, "m", sleep=slept).scores(pairs("a cat"))) == [0.7]
    sent = [[message["content"] for message in body["messages"]] for _, _, body in server.requests]
    question = sent[0][0]
    assert sent == [[question], [question, "About 7/10", REMINDER], [question, "1.5", REMINDER]]
    assert slept == []


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"choices": []}),
        (200, {"error": {"message": "model not loaded"}}),
        (200, {"choices": [{"message": {"content": None, "refusal": "no"}}]}),
        (200, [1]),
        (200, "<html>hello</html>"),
    ],
)
def test_an_answer_outside_the_protocol_is_asked_again_then_quoted(server, answer):
    server.answer = lambda said, attempt: answer
    _, error = taken(Endpoint(server.url, "m", retries=2).scores(pairs("a cat")))
    body = answer[1] if isinstance(answer[1], str) else json.dumps(answer[1])
    assert f"(asked 3 times): its answer holds no choices[0].message.content: {json.dumps(body)}." in str(error)
    assert len(server.requests) == 3
    server.answer = lambda said, attempt: says("0.5") if attempt == 5 else answer
    assert list(Endpoint(server.url, "m", retries=2).scores(pairs("a cat"))) == [0.5]


def test_a_long_answer_is_quoted_in_part(server):
    server.answer = lambda said, attempt: says("blah " * 10_000)
    _, error = taken(Endpoint(server.url, "m", retries=1).scores(pairs("a cat")))
    assert len(str(error)) < 1000
    assert len(server.requests[1][2]["messages"][1]["content"]) == 500


# Trouble that passes


def test_server_errors_are_retried_with_exponential_back_off(server):
    server.answer = lambda said, attempt: (500, "oops") if attempt <= 3 else says("0.5")
    slept = Slept()
    assert list(Endpoint(server.url, "m", sleep=slept).scores(pairs("a cat"))) == [0.5]
    assert slept == [1, 2, 4]


def test_server_errors_that_stay_are_quoted(server):
    server.answer = lambda said, attempt: (503, {"error": {"message": "overloaded", "code": 7}})
    slept = Slept()
    found, error = taken(Endpoint(server.url, "m", retries=8, sleep=slept).scores(pairs("a cat")))
    assert found == []
    assert slept == [1, 2, 4, 8, 16, 32, 60, 60]
    assert "'m' at " + server.url in str(error)
    assert 'pair 1 of 1 (asked 9 times): it answered 503: "overloaded".' in str(error)


@pytest.mark.parametrize(
    ("retry_after", "low", "high"),
    [
        (lambda: "7", 7, 7),
        (lambda: "7.5", 7.5, 7.5),
        (lambda: "0", 1, 1),
        (lambda: "soon", 1, 1),
        (lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True), 95, 100),
        (lambda: "Thu, 01 Jan 2015 00:00:00 GMT", 1, 1),
    ],
)
def test_retry_after_is_honoured(server, retry_after, low, high):
    server.answer = lambda said, attempt: (
        (429, {"error": {"message": "slow down"}}, {"Retry-After": retry_after()}) if attempt == 1 else says("0.5")
    )
    slept = Slept()
    assert list(Endpoint(server.url, "m", sleep=slept).scores(pairs("a cat"))) == [0.5]
    (wait,) = slept
    assert low <= wait <= high


def test_a_server_that_asks_for_hours_ends_the_run(server):
    server.answer = lambda said, attempt: (429, {"error": "quota used up"}, {"Retry-After": "86400"})
    slept = Slept()
    _, error = taken(Endpoint(server.url, "m", sleep=slept).scores(pairs("a cat")))
    assert slept == []
    assert '(asked once): it answered 429: "quota used up". It asks to wait 86400 s, and 600 is the limit.' in str(
        error
    )


def test_a_server_that_is_slow_once_is_asked_again(server):
    def answer(said, attempt):
        if attempt == 1:
            server.released.wait(30)
        return says("0.5")

    server.answer = answer
    slept = Slept()
    assert list(Endpoint(server.url, "m", timeout=0.3, retries=9, sleep=slept).scores(pairs("a cat"))) == [0.5]
    assert slept[0] == 1
    assert len(slept) == len(server.requests) - 1


def test_a_server_that_stays_silent_is_an_error(server):
    server.answer = lambda said, attempt: (server.released.wait(30), says("0.5"))[1]
    _, error = taken(Endpoint(server.url, "m", timeout=0.1, retries=1, sleep=Slept()).scores(pairs("a cat")))
    assert "(asked 2 times): no answer within 0.1 s." in str(error)


# Trouble that does not


@pytest.mark.parametrize(
    ("status", "body", "quoted"),
    [
        (401, {"error": {"message": "Incorrect API key provided", "type": "auth"}}, "Incorrect API key provided"),
        (404, {"object": "error", "message": "no model m"}, "no model m"),
        (400, {"detail": "temperature must be 1"}, "temperature must be 1"),
        (403, "Forbidden by the proxy", "Forbidden by the proxy"),
        (422, "", "Unprocessable Entity"),
    ],
)
def test_a_refusal_is_not_retried_and_quotes_the_server(server, status, body, quoted):
    server.answer = lambda said, attempt: (status, body)
    slept = Slept()
    _, error = taken(Endpoint(server.url, "m", sleep=slept).scores(pairs("a cat")))
    assert f"(asked once): it answered {status}: {json.dumps(quoted)[:-1]}" in str(error)
    assert len(server.requests) == 1
    assert slept == []


def test_a_redirect_is_not_followed_with_the_key(server):
    server.answer = lambda said, attempt: (307, "", {"Location": "http://127.0.0.1:9/elsewhere"})
    _, error = taken(Endpoint(server.url, "m", api_key=SECRET).scores(pairs("a cat")))
    assert 'it answered 307: "http://127.0.0.1:9/elsewhere"' in str(error)
    assert len(server.requests) == 1


def test_a_server_that_goes_down_in_the_middle_loses_nothing(server):
    def answer(said, attempt):
        if said == "2":
            server.stop()  # this answer is the last
        return says(f"0.{said}")

    server.answer = answer
    slept = Slept()
    found, error = taken(Endpoint(server.url, "m", parallel=1, retries=3, sleep=slept).scores(pairs(*"01234")))
    assert found == [0.0, 0.1, 0.2]
    assert slept == [1, 2, 4]
    assert "pair 4 of 5 (asked 4 times): the connection failed: ConnectError:" in str(error)
    assert "refused" in str(error)


def test_a_failure_waits_for_the_scores_before_it(server):
    failed = threading.Event()

    def answer(said, attempt):
        if said == "2":
            failed.set()
            return 400, "no"
        failed.wait(30)
        time.sleep(0.05)
        return says(f"0.{said}")

    server.answer = answer
    found, error = taken(Endpoint(server.url, "m", parallel=4).scores(pairs(*"0123456789")))
    assert found == [0.0, 0.1]
    assert "pair 3 of 10" in str(error)


def test_a_failure_does_not_wait_for_the_patience_of_others(server):
    patient = threading.Event()

    def answer(said, attempt):
        if said == "1":
            patient.set()
            return 429, "slow down", {"Retry-After": "30"}
        patient.wait(30)
        return 400, "no"

    server.answer = answer
    start = time.monotonic()
    _, error = taken(Endpoint(server.url, "m", parallel=2).scores(pairs(*"01")))
    assert "pair 1 of 2" in str(error)
    assert time.monotonic() - start < 15
    assert server.attempts == {"0": 1, "1": 1}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("judge")]


# Several at a time


def test_scores_keep_their_order_when_answers_do_not(server):
    def answer(said, attempt):
        time.sleep(0.1 if int(said) % 4 == 0 else 0)
        return says(f"0.{said}")

    server.answer = answer
    said = [f"{i:02d}" for i in range(20)]
    assert list(Endpoint(server.url, "m").scores(pairs(*said))) == [float(f"0.{text}") for text in said]
    assert server.attempts == dict.fromkeys(said, 1)


def test_as_many_requests_run_at_a_time_as_asked_for(server):
    together = threading.Barrier(3)

    def answer(said, attempt):
        together.wait(30)
        return says("0.5")

    server.answer = answer
    assert list(Endpoint(server.url, "m", parallel=3).scores(pairs(*"012345678"))) == [0.5] * 9
    assert server.most_open == 3


def test_scores_come_one_by_one_and_no_further_ahead_than_asked(server):
    scores = Endpoint(server.url, "m", parallel=2).scores(pairs(*"0123456789"))
    assert server.requests == []
    next(scores)
    scores.close()
    assert len(server.requests) <= 2


# The key stays secret


def test_the_key_is_in_no_error_even_if_the_server_repeats_it(server):
    answers = [
        (401, {"error": {"message": f"Incorrect API key provided: {SECRET}."}}),
        (500, f"at 'Bearer {SECRET}'"),
        says(f"your key is {SECRET}"),
        (200, {"you sent": SECRET}),
    ]
    for answer in answers:
        server.answer = lambda said, attempt, answer=answer: answer
        _, error = taken(Endpoint(server.url, "m", api_key=SECRET, retries=1, sleep=Slept()).scores(pairs("a cat")))
        assert "[key]" in str(error)
        assert_secret_is_kept(error)


def assert_secret_is_kept(error: BaseException) -> None:
    while error is not None:
        assert SECRET not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("key", [f"{SECRET}\nX-Evil: 1", f"{SECRET} again", f"{SECRET}é", f"{SECRET}\x00"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key, monkeypatch):
    with pytest.raises(SettingError, match="api_key holds characters") as error:
        Endpoint("http://127.0.0.1:9", "m", api_key=key)
    assert_secret_is_kept(error.value)
    if "\x00" not in key:
        monkeypatch.setenv(KEY, key)
        with pytest.raises(SettingError, match="OPENAI_API_KEY holds characters") as error:
            Endpoint("http://127.0.0.1:9", "m")
        assert_secret_is_kept(error.value)


def test_an_address_is_shown_without_what_is_secret_in_it(server):
    server.answer = lambda said, attempt: (401, "no")
    url = server.url.replace("http://", f"http://me:{SECRET}@") + f"?key={SECRET}"
    _, error = taken(Endpoint(url, "m").scores(pairs("a cat")))
    assert f"at {server.url}/chat/completions gave" in str(error)
    assert_secret_is_kept(error)


# Arguments


@pytest.mark.parametrize(
    "url", ["api.openai.com/v1", "ftp://example.org", "http://", "", "http://host:port/", "http://[::1"]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(SettingError, match="url must be an http or https address"):
        Endpoint(url, "m")


@pytest.mark.parametrize("options", [{"timeout": 0}, {"retries": -1}, {"parallel": 0}, {"model": " "}])
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(SettingError, match=f"{name} must be"):
        Endpoint(**{"url": "http://127.0.0.1:9", "model": "m"} | options)
