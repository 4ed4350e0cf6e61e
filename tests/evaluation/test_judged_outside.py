"""A served model that is asked about pictures, by a server of our own."""

from __future__ import annotations

import base64
import io
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from painting import SUITE
from PIL import Image, ImageChops, ImageStat
from serving import SECRET
from typer.testing import CliRunner

from fs_plugins import EndpointError, SettingError
from fs_plugins.cli import app
from fs_plugins.evaluation import Results, Settings, evaluate
from fs_plugins.evaluation.judges import KEY
from fs_plugins.evaluation.served import Question, ServedModel
from fs_plugins.evaluation.suites import DEFENCES, SUITES, as_served, chosen
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


# A whole evaluation, from outside


SHAPES = replace(SUITE, defences=DEFENCES)


def strongest_colour(picture: Image.Image) -> str:
    """The number of the class, of red, green and blue."""
    return str(max(range(3), key=ImageStat.Stat(picture).sum.__getitem__))


def test_a_served_model_is_shown_what_was_attacked_on_the_open_weights(server, start):
    server.answer = strongest_colour
    evaluation = replace(start(*as_served([SHAPES])), served=ServedModel(server.url, "painter"))
    evaluation.run()
    (painter,) = evaluation.load.painters
    assert len(painter.asked) == 2 * 5, "the open weights, clean and attacked"
    assert len(server.requests) == 2 * 5
    assert {body["max_tokens"] for _, _, body in server.requests} == {8}
    store = evaluation.store
    attacked = [store.attacked("none/attackvlm-16", f"{i}.png") for i in range(5)]
    eight = [(one * 255).round().to(torch.uint8).permute(1, 2, 0).numpy().tobytes() for one in attacked]
    shown = [seen(body).tobytes() for _, _, body in server.requests]
    assert sorted(shown[5:]) == sorted(eight)
    said = store.rows("served/attackvlm-16")
    assert {key: row["reply"] for key, row in said.items()} == {
        (f"{i}.png", "classification"): strongest_colour(Image.frombytes("RGB", (16, 16), pixels))
        for i, pixels in enumerate(eight)
    }
    assert store.made_of("served") == {"model": "painter", "endpoint": f"{server.url}/chat/completions"}
    (table,) = Results(store.folder).tables()
    assert [row[:3] for row in table.rows] == [
        (pictures, defence, 5) for pictures in ("clean", "AttackVLM 16/255") for defence in ("none", "as served")
    ]
    assert [row[5:9] for row in table.rows if row[1] == "as served"] == [("", "", "", "")] * 2
    assert "attacked on the open weights" in table.note


def test_an_endpoint_that_goes_away_is_an_error_and_the_same_run_goes_on(server, start):
    def answer(picture):
        return strongest_colour(picture) if len(server.requests) <= 4 else (401, {"detail": "no more"})

    server.answer = answer
    client = ServedModel(server.url, "painter", parallel=1)
    with pytest.raises(EndpointError, match="picture 1 of 1"):
        replace(start(*as_served([SHAPES])), served=client).run()
    server.answer = strongest_colour
    before = len(server.requests)
    resumed = replace(start(*as_served([SHAPES])), served=client)
    resumed.run()
    assert len(server.requests) == before + 6, "four of ten were kept"
    assert resumed.load.painters[0].asked == []


def test_a_folder_is_of_one_endpoint(server, start):
    server.answer = strongest_colour
    replace(start(*as_served([SHAPES])), served=ServedModel(server.url, "painter")).run()
    with pytest.raises(SettingError, match="another-model"):
        replace(start(*as_served([SHAPES])), served=ServedModel(server.url, "another-model")).run()


def test_suites_that_look_behind_an_endpoint_are_refused():
    assert [suite.name for suite in as_served(chosen(["table1", "table3", "table4", "s7"]))]
    for name in SUITES.keys() - {"table1", "table3", "table4", "s7"}:
        with pytest.raises(SettingError, match="can be asked for table1, table3, table4, s7"):
            as_served(chosen([name]))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"endpoint_model": "llava"}, "none is given"),
        ({"endpoint": "http://127.0.0.1:9/v1", "n0": 2}, "smoothed by its server"),
        ({"endpoint": "127.0.0.1:9"}, "url must be an http or https address"),
        ({"endpoint": "http://127.0.0.1:9/v1", "suite": ("adaptive",)}, "looks behind an endpoint"),
    ],
)
def test_settings_that_do_not_go_with_an_endpoint_are_refused_before_anything_is_loaded(settings, says):
    with pytest.raises(SettingError, match=says):
        evaluate(Settings(**settings), lambda tower, dataset: pytest.fail("it loads"))
