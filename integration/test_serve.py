"""``fs-plugins serve`` on the demo's model: a real server in a process of its own, asked over HTTP.

Runs in an environment that has what transformers' server needs; elsewhere it is skipped.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

from PIL import Image

import fs_plugins
from fs_plugins.attacks import attack
from fs_plugins.demo import assets, world
from fs_plugins.evaluation import Results
from fs_plugins.evaluation.served import Question, ServedModel
from fs_plugins.hf import load_chat
from fs_plugins.hf.chat import ask
from fs_plugins.pictures import address, png, to_pil, to_unit

COUNT, SEED = 6, 3
PROMPT = world.scene("heldout", 0).question("shape").prompt
CLEAN = [world.scene("heldout", i).draw() for i in range(COUNT)]
COMMAND = [sys.executable, "-m", "fs_plugins.cli", "serve"]


@contextmanager
def serving(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server of the demo's model: its address, once it listens, and its process."""
    typed = [*COMMAND, "demo", "--port", "0", *options]
    process = subprocess.Popen(typed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        told = []
        for line in process.stdout:
            told.append(line)
            if found := re.match(r"Serving 'demo' at (http://\S+)/v1;", line):
                break
        else:
            pytest.fail(f"{told}\n{process.stderr.read()}")
        assert told[0].startswith("fs_plugins: enabled on CLIPVisionModel")
        for _ in range(100):
            try:
                assert get(f"{found[1]}/health")["status"] == "ok"
                break
            except urllib.error.URLError:  # it says where, and then listens
                time.sleep(0.1)
        yield found[1], process
    finally:
        process.kill()
        process.wait()


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)


def post(url: str, body: dict) -> tuple[int, str]:
    """The status, and what was answered."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def shown(picture: Image.Image) -> str:
    return address(png(picture))


def asked(picture: Image.Image, **more: Any) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": shown(picture)}}, {"type": "text", "text": PROMPT}]
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 8, **more}


@pytest.fixture(scope="module", autouse=True)
def _offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("OPENAI_API_KEY", raising=False)
        yield


@pytest.fixture(scope="module")
def model():
    return load_chat("demo", device="cpu")


@pytest.fixture(scope="module")
def attacked(model) -> list[Image.Image]:
    """The clean pictures, moved by 16/255 towards another of them, in eight bits."""
    call = fs_plugins.vision_call(model[0])
    images = torch.stack([to_unit(picture) for picture in CLEAN])
    found = attack(call, images, images.roll(1, 0), method="attackvlm", eps=16 / 255, steps=60, seed=0)
    return [*map(to_pil, found)]


@pytest.fixture(scope="module")
def here(model, attacked) -> dict[str, list[str]]:
    """What transformers answers in this process: bare, and smoothed as the server is, in the order of its calls."""

    def answers() -> list[str]:
        return [ask(*model, [picture], [PROMPT], max_new_tokens=8)[0] for picture in (*CLEAN, *attacked)]

    bare = answers()
    with fs_plugins.enable(model[0], seed=SEED):
        return {"bare": bare, "smoothed": answers()}


def over_http(url: str, pictures: list[Image.Image]) -> list[str]:
    served = ServedModel(f"{url}/v1", "demo", parallel=1, retries=0)
    return list(served.each([Question(picture, PROMPT, 8) for picture in pictures]))


def test_what_is_served_is_what_smoothed_transformers_says(here, attacked):
    with serving("--seed", str(SEED)) as (url, process):
        answers = over_http(url, [*CLEAN, *attacked])
        told = get(f"{url}/fs-plugins/status")
        process.send_signal(signal.SIGINT)
        rest, complaints = process.communicate(timeout=60)
    assert answers == here["smoothed"]
    assert here["smoothed"][COUNT:] != here["bare"][COUNT:], "the attack decides nothing here"
    assert (told["model"], told["enabled"], told["warnings"]) == ("demo", True, [])
    (vision,) = told["vision"]
    assert (vision["images"], vision["draws"], vision["non_finite"]) == (2 * COUNT, 2 * COUNT * 4, 0)
    assert vision["seconds"] > 0
    assert (process.returncode, rest, complaints) == (0, "", "")


@pytest.fixture(scope="module")
def server():
    with serving("--n0", "2") as (url, _):
        yield url


def images(url: str) -> int:
    return get(f"{url}/fs-plugins/status")["vision"][0]["images"]


def test_every_way_to_show_a_picture_is_smoothed(server):
    before = images(server)
    responses = [{"type": "input_image", "image_url": shown(CLEAN[0])}, {"type": "input_text", "text": PROMPT}]
    bodies = {
        "chat/completions": asked(CLEAN[0]),
        "chat/completions?stream": asked(CLEAN[0], stream=True),
        "responses": {"input": [{"role": "user", "content": responses}], "max_output_tokens": 8},
    }
    for i, (route, body) in enumerate(bodies.items(), start=1):
        status, _ = post(f"{server}/v1/{route}", body)
        assert status == 200
        assert images(server) == before + i


def test_it_stays_smoothed_whatever_is_loaded_or_reset(server):
    assert "This server has 'demo' alone" in post(f"{server}/load_model", {"model": "hf-internal-testing/tiny"})[1]
    assert '"ready"' in post(f"{server}/load_model", {"model": "demo"})[1]
    assert post(f"{server}/reset", {})[0] == 200
    before = images(server)
    assert post(f"{server}/v1/chat/completions", asked(CLEAN[0], model="demo"))[0] == 200
    assert images(server) == before + 1
    assert [one["id"] for one in get(f"{server}/v1/models")["data"]] == ["demo"]


def test_another_model_and_pixels_of_another_scale_are_refused(server):
    before = images(server)
    for name in ("demo-clip", str(assets.LLAVA), "demo@main"):
        status, said = post(f"{server}/v1/chat/completions", asked(CLEAN[0], model=name))
        assert status == 400
        assert "Server is pinned to 'demo'" in said
    loud = {"image_mean": [0.0] * 3, "image_std": [1e-6] * 3}
    status, said = post(f"{server}/v1/chat/completions", asked(CLEAN[0], chat_template_kwargs=loud))
    assert status == 400
    assert "instead of [0, 1]" in said
    assert images(server) == before


def test_its_own_command_asks_it(server, tmp_path):
    CLEAN[0].save(tmp_path / "scene.png")
    typed = ["ask", "demo", str(tmp_path / "scene.png"), PROMPT, "--endpoint", f"{server}/v1"]
    told = subprocess.run([sys.executable, "-m", "fs_plugins.cli", *typed], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
    assert re.search(r"as served\s+\w+", told.stdout)


def test_its_own_command_judges_it_from_outside(server, tmp_path):
    before = images(server)
    typed = ["evaluate", "--suite", "table3", "--quick", "--images", "4", "--steps", "5", "--out", str(tmp_path)]
    typed += ["--endpoint", f"{server}/v1"]
    told = subprocess.run([sys.executable, "-m", "fs_plugins.cli", *typed], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    (table,) = Results(tmp_path).tables()
    assert [row[1:3] for row in table.rows] == [("none", 4), ("as served", 4)] * 4
    assert images(server) == before + 4 * 4
    assert "as served" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["demo", "--psm", str(assets.PSM_CLIP)], "PSMError"),
        (["demo", "--psm", "none"], "SettingError"),
        (["demo", "--psm", "none", "--sigma", "0"], "without noise nothing is smoothed"),
        (["demo", "--host", "203.0.113.7"], "Cannot serve at host '203.0.113.7'"),
        (["demo-clip"], "ModelError: Cannot load 'demo-clip' as an image-text-to-text model"),
        (["nowhere/at-all"], "ModelError"),
    ],
)
def test_what_cannot_be_protected_is_not_served(typed, says):
    told = subprocess.run(
        [*COMMAND, *typed, "--port", "0"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "400"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == 2, told.stdout + told.stderr
    assert says in told.stdout
    assert "Serving" not in told.stdout


def test_a_port_that_is_taken_is_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = subprocess.run([*COMMAND, "demo", "--port", port], capture_output=True, text=True, timeout=120)
    assert told.returncode == 2
    assert "Address already in use" in " ".join(told.stdout.split())
