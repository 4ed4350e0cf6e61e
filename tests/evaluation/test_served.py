"""A served model that is asked about pictures, by a server of our own."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image, ImageChops
from serving import SECRET
from typer.testing import CliRunner

from fs_plugins import EndpointError
from fs_plugins.cli import app
from fs_plugins.evaluation.judges import KEY
from fs_plugins.evaluation.served import Question, ServedModel
from fs_plugins.pictures import rgb

QUESTION = "What is it?"


class Server:
    """Answers each request with what ``answer`` makes of its picture; a text is what the model says, else it is the
    status and the body."""

    def __init__(self):
        self.answer = lambda picture: "\na red square "
        self.requests: list[tuple[str, dict, dict]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                said = outer.answer(seen(body))
                status, told = (200, {"choices": [{"message": {"content": said}}]}) if isinstance(said, str) else said
                sent = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


def seen(body: dict) -> Image.Image:
    """The picture that a request holds."""
    (message,) = body["messages"]
    shown, told = message["content"]
    assert (message["role"], shown["type"], told["type"]) == ("user", "image_url", "text")
    kind, _, data = shown["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(KEY, raising=False)
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def picture(tmp_path):
    """With a turn that only its metadata say, and every colour apart from its neighbours."""
    path = tmp_path / "picture.png"
    image = Image.linear_gradient("L").resize((37, 21))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.merge("RGB", (image, image.rotate(180), ImageChops.invert(image))).save(path, exif=exif)
    return path


def ask(*typed: str):
    return CliRunner().invoke(app, ["ask", *typed], env={"COLUMNS": "200"})


def test_the_picture_arrives_as_people_see_it_to_the_pixel(server, picture):
    answered = ask("llava", str(picture), QUESTION, "--endpoint", server.url, "--max-new-tokens", "9")
    assert answered.exit_code == 0, answered.output
    assert "as served" in answered.output
    assert "a red square" in answered.output
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("llava", 0, 9)
    assert body["messages"][0]["content"][1]["text"] == QUESTION
    assert seen(body).size == (21, 37)
    assert seen(body).tobytes() == rgb(picture).tobytes()


def test_answers_keep_the_order_of_the_pictures(server):
    server.answer = lambda picture: str(picture.getpixel((0, 0)))
    asked = [Question(Image.new("L", (4, 4), i), QUESTION, 8) for i in range(9)]
    assert list(ServedModel(server.url, "llava").each(asked)) == [str(i) for i in range(9)]


def test_an_answer_of_nothing_is_an_answer(server, picture):
    server.answer = lambda picture: ""
    assert "(nothing)" in ask("llava", str(picture), QUESTION, "--endpoint", server.url).output


def test_a_refusal_is_a_sentence_in_the_servers_words_without_the_key(server, picture, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    server.answer = lambda picture: (400, {"detail": f"Server is pinned to 'demo', {SECRET}"})
    answered = ask("llava", str(picture), QUESTION, "--endpoint", server.url)
    assert answered.exit_code == 2
    told = " ".join(answered.output.split())
    assert "EndpointError: The model 'llava' at http://127.0.0.1:" in told
    assert (
        "gave no answer about picture 1 of 1 (asked once): it answered 400: \"Server is pinned to 'demo', [key]\""
        in told
    )
    assert server.requests[0][1]["Authorization"] == f"Bearer {SECRET}"


def test_what_nobody_serves_is_an_error(picture):
    with pytest.raises(EndpointError, match="the connection failed"):
        list(ServedModel("http://127.0.0.1:9/v1", "m", retries=0).each([Question(rgb(picture), QUESTION, 8)]))


@pytest.mark.parametrize("smoothing", [["--psm", "none"], ["--sigma", "0.1"], ["--n0", "2"], ["--seed", "0"]])
def test_smoothing_is_the_servers_affair(server, picture, smoothing):
    answered = ask("llava", str(picture), QUESTION, "--endpoint", server.url, *smoothing)
    assert answered.exit_code == 2
    assert "give them to fs-plugins serve" in " ".join(answered.output.split())
    assert server.requests == []
