"""The plugin inside real engines of vLLM on a CPU: offline, over two ranks, and behind its server under load.

Runs in an environment that has vLLM; elsewhere it is skipped.
"""

from __future__ import annotations

import base64
import io
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("vllm")

from PIL import Image

import fs_plugins
from fs_plugins.attacks import attack
from fs_plugins.demo import assets, world
from fs_plugins.hf import load_chat
from fs_plugins.hf.chat import ask
from fs_plugins.pictures import to_unit

COUNT, SEED = 16, 3
SCENES = [one for one in (world.scene("heldout", i) for i in range(40)) if one.shape is not None][:COUNT]
CLEAN = [scene.draw() for scene in SCENES]
QUESTIONS = [scene.question("shape") for scene in SCENES]
SESSION = Path(__file__).with_name("vllm_session.py")
MINUTES = 10 * 60


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FS_PLUGINS")}
    small = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return {**kept, **small, **more}


def session(folder: Path, options: dict[str, Any], **more: str) -> subprocess.CompletedProcess[str]:
    typed = [sys.executable, str(SESSION), str(folder), json.dumps(options)]
    return subprocess.run(typed, capture_output=True, text=True, env=environment(**more), timeout=MINUTES)


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found = re.search(r"^TOLD (.*)$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(found[1])


@pytest.fixture(scope="module")
def model() -> Any:
    return load_chat("demo", device="cpu")


@pytest.fixture(scope="module")
def pictures(model: Any) -> list[Image.Image]:
    """The clean ones, and those moved by 16/255 towards another of them, in eight bits."""
    call = fs_plugins.vision_call(model[0])
    images = torch.stack([to_unit(picture) for picture in CLEAN])
    found = attack(call, images, images.roll(5, 0), method="attackvlm", eps=16 / 255, steps=60, seed=0)
    eight = (found.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [*CLEAN, *(Image.fromarray(one.numpy()) for one in eight)]


@pytest.fixture(scope="module")
def folder(pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("asked")
    for i, picture in enumerate(pictures):
        picture.save(made / f"{i}.png")
    rows = [{"picture": f"{i}.png", "prompt": question.prompt} for i, question in enumerate(QUESTIONS * 2)]
    (made / "asked.json").write_text(json.dumps(rows))
    return made


def right(answers: list[str]) -> tuple[int, int]:
    """How many of the clean and of the attacked pictures."""
    hits = [question.answer == answer.strip() for question, answer in zip(QUESTIONS * 2, answers, strict=True)]
    return sum(hits[:COUNT]), sum(hits[COUNT:])


@pytest.mark.parametrize("impl", ["auto", "transformers"])
def test_offline_it_answers_as_smoothed_transformers_does(impl, folder, model, pictures):
    """Both kinds of classes that vLLM has; bare, the attack decides."""
    options = {"engine": {"model_impl": impl}, "bare": impl == "auto"}
    settings = json.dumps({"seed": SEED})
    got = told(session(folder, options, FS_PLUGINS=settings, VLLM_ENABLE_V1_MULTIPROCESSING="0"))
    with fs_plugins.enable(model[0], seed=SEED):
        here = [
            ask(*model, [picture], [question.prompt], max_new_tokens=8)[0]
            for picture, question in zip(pictures, QUESTIONS * 2, strict=True)
        ]
    assert [one.strip() for one in got["answers"]] == [one.strip() for one in here]
    clean, attacked = right(got["answers"])
    assert clean >= COUNT - 1
    assert attacked >= COUNT - 1
    (status,) = got["status"]
    assert "PSM       demo-psm-llava;" in status
    assert f"{2 * COUNT} images, {2 * COUNT * 4} draws, 0 not finite" in status
    if impl == "auto":
        clean, attacked = right(got["bare"])
        assert clean >= COUNT - 1
        assert attacked <= 1


@pytest.mark.parametrize("mode", ["weights", "data"])
def test_two_ranks_draw_the_same_noise_and_other_noise_at_every_call(mode, folder):
    options = {"engine": {"tensor_parallel_size": 2, "mm_encoder_tp_mode": mode}, "ranks": True}
    got = told(session(folder, options, FS_PLUGINS="{}", VLLM_ALLOW_INSECURE_SERIALIZATION="1"))
    first, second = (torch.tensor(call) for call in got["ranks"])
    assert len(first) == 2
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(second[0], second[1], rtol=0, atol=1e-5)
    assert not torch.allclose(first[0], second[0], atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "engine", "says"),
    [
        ('{"psm": "auto", "n": 4}', {}, "there is no setting 'n'. The settings are: psm, sigma"),
        (json.dumps({"psm": str(assets.PSM_CLIP)}), {}, "PSMError"),
        ("{}", {"enable_mm_embeds": True}, "--enable-mm-embeds lets a request bring embeddings of its own"),
        ("{}", {"limit_mm_per_prompt": {"image": 0}}, "looks at no images"),
    ],
)
def test_what_cannot_be_protected_is_not_served(settings, engine, says, folder):
    done = session(folder, {"engine": engine}, FS_PLUGINS=settings, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert done.returncode != 0
    assert says in done.stderr + done.stdout
    assert "TOLD" not in done.stdout


def shown(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class Server:
    """vLLM's own server of the demo's model."""

    def __init__(self, log: Path, **settings: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        typed = [
            "--model",
            str(assets.LLAVA),
            "--served-model-name",
            "demo",
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
        ]
        typed += ["--enforce-eager", "--max-model-len", "512", "--dtype", "float32", "--max-num-seqs", "8"]
        typed += ["--kv-cache-memory-bytes", str(64 << 20), "--limit-mm-per-prompt", '{"image": 1}']
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *typed],
            stdout=log.open("w", encoding="utf-8"),
            stderr=subprocess.STDOUT,
            env=environment(FS_PLUGINS=json.dumps(settings)),
        )

    def wait(self) -> None:
        until = time.monotonic() + MINUTES
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        pytest.fail(self.log.read_text()[-6000:])

    def ask(self, picture: Image.Image, prompt: str, **more: Any) -> tuple[int, str]:
        parts = [{"type": "image_url", "image_url": {"url": shown(picture)}}, {"type": "text", "text": prompt}]
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "max_tokens": 8,
            **more,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return 200, json.load(answer)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=60).read().decode()
        return {name: float(value) for name, value in re.findall(r"^fs_plugins_(\w+)_total (\S+)$", text, re.MULTILINE)}

    def memory(self) -> int:
        """Bytes that the server and all it has started hold."""
        root = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in [root, *root.children(recursive=True)])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server") / "log", share_draws=False)
    try:
        made.wait()
        yield made
    finally:
        made.stop()


def test_the_server_says_that_it_smooths(server):
    log = server.log.read_text()
    assert "fs_plugins: enabled on CLIPVisionModel through vllm" in log
    assert "PSM       demo-psm-llava; purifier unet" in log
    assert set(server.metrics()) == {"smoothed_images", "draws", "smoothing_seconds", "non_finite_draws"}


def test_attacked_pictures_are_answered_right_under_load(server, pictures):
    """200 requests of 8 clients; pictures come again, and each time they get draws of their own."""
    before = server.metrics()

    def asked(i: int) -> tuple[int, str]:
        at = i % len(pictures)
        return server.ask(pictures[at], QUESTIONS[at % COUNT].prompt)

    with ThreadPoolExecutor(8) as clients:
        begun = time.monotonic()
        first = list(clients.map(asked, range(100)))
        held = server.memory()
        rest = list(clients.map(asked, range(100, 200)))
    print(f"200 requests in {time.monotonic() - begun:.0f} s")
    assert {status for status, _ in first + rest} == {200}
    assert server.memory() < held * 1.05
    _, attacked = right([said for _, said in first[: 2 * COUNT]])
    assert attacked >= COUNT - 1
    after = server.metrics()
    assert after["smoothed_images"] - before["smoothed_images"] == 200
    assert after["draws"] - before["draws"] == 800
    assert after["non_finite_draws"] == 0


def test_a_request_that_changes_what_pixels_mean_is_refused_and_the_next_one_served(server, pictures):
    for words in ({"do_rescale": False}, {"images_kwargs": {"image_std": [1e-6] * 3}}):
        status, said = server.ask(pictures[0], QUESTIONS[0].prompt, mm_processor_kwargs=words)
        assert status == 400, said
        assert "normalised" in said
    assert server.ask(pictures[0], QUESTIONS[0].prompt)[0] == 200


def test_our_own_command_asks_it(server, tmp_path):
    CLEAN[0].save(tmp_path / "scene.png")
    typed = ["ask", "demo", str(tmp_path / "scene.png"), QUESTIONS[0].prompt, "--endpoint", f"{server.url}/v1"]
    done = subprocess.run(
        [sys.executable, "-m", "fs_plugins.cli", *typed], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"as served\s+\w+", done.stdout)
