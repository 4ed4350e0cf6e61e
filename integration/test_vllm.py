"""The plugin inside real engines of vLLM on a CPU: offline, over two ranks, and behind its server under load.

Runs in an environment that has vLLM; elsewhere it is skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from PIL import Image

import fs_plugins
from benchmarks.vllm_load import MINUTES, Server, environment, load
from fs_plugins.attacks import attack
from fs_plugins.demo import assets, world
from fs_plugins.hf import load_chat
from fs_plugins.hf.chat import ask
from fs_plugins.pictures import to_pil, to_unit

COUNT, SEED = 16, 3
HELD_OUT = [world.scene("heldout", i) for i in range(60)]
SCENES = [one for one in HELD_OUT if one.shape and one.shape in one.question("shape").prompt.split(": ")[1]][:COUNT]
CLEAN = [scene.draw() for scene in SCENES]
QUESTIONS = [scene.question("shape") for scene in SCENES]
SESSION = Path(__file__).with_name("vllm_session.py")


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
    return [*CLEAN, *map(to_pil, found)]


@pytest.fixture(scope="module")
def folder(pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("asked")
    for i, picture in enumerate(pictures):
        picture.save(made / f"{i}.png")
    rows = [{"picture": f"{i}.png", "prompt": question.prompt} for i, question in enumerate(QUESTIONS * 2)]
    (made / "asked.json").write_text(json.dumps(rows), "utf-8")
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


def test_in_half_precision_attacked_pictures_are_answered_right_too(folder):
    options = {"engine": {"dtype": "bfloat16"}}
    got = told(session(folder, options, FS_PLUGINS='{"n0": 8}', VLLM_ENABLE_V1_MULTIPROCESSING="0"))
    clean, attacked = right(got["answers"])
    assert clean >= COUNT - 1
    assert attacked >= COUNT - 1
    assert f"{2 * COUNT * 8} draws, 0 not finite" in got["status"][0]


def test_an_engine_that_only_encodes_keeps_smoothed_features_apart_from_others(folder, tmp_path):
    """It measures first what memory encoding takes, with pictures of its own."""
    place = {"shared_storage_path": str(tmp_path)}
    keeps = {"ec_connector": "ECExampleConnector", "ec_role": "ec_producer", "ec_connector_extra_config": place}
    options = {"engine": {"ec_transfer_config": keeps, "kv_cache_memory_bytes": None}}
    got = told(
        session(folder, options, FS_PLUGINS="{}", VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    )
    assert "PSM       demo-psm-llava;" in got["status"][0]
    kept = {path.parent.name for path in tmp_path.rglob("*.safetensors")}
    assert len(kept) == 2 * COUNT
    assert all(re.fullmatch(r"fs-[0-9a-f]+:[0-9a-f]+", name) for name in kept)


@pytest.mark.parametrize("mode", ["weights", "data"])
def test_two_ranks_draw_the_same_noise_and_other_noise_at_every_call(mode, folder):
    options = {"engine": {"tensor_parallel_size": 2, "mm_encoder_tp_mode": mode}, "ranks": True}
    got = told(
        session(
            folder, options, FS_PLUGINS="{}", VLLM_ALLOW_INSECURE_SERIALIZATION="1", VLLM_CPU_OMP_THREADS_BIND="0|1"
        )
    )
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
        ("{}", {"limit_mm_per_prompt": {"image": 0}}, "There is nothing to smooth: allow images"),
    ],
)
def test_what_cannot_be_protected_is_not_served(settings, engine, says, folder):
    done = session(folder, {"engine": engine}, FS_PLUGINS=settings, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert done.returncode != 0
    assert says in done.stderr + done.stdout
    assert "TOLD" not in done.stdout


def test_workers_that_nobody_told_to_smooth_are_found_out_before_the_first_request(folder):
    done = session(folder, {"forget": True}, FS_PLUGINS="{}")
    assert done.returncode != 0
    assert "The workers of vLLM do not say whether they smooth" in done.stderr
    assert "TOLD" not in done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server") / "log", {"share_draws": False})
    try:
        made.wait()
        yield made
    finally:
        made.stop()


def test_the_server_says_that_it_smooths(server):
    log = server.log.read_text("utf-8")
    assert "fs_plugins: enabled on CLIPVisionModel through vllm" in log
    assert "PSM       demo-psm-llava; purifier unet" in log
    assert set(server.metrics()) == {"smoothed_images", "draws", "smoothing_seconds", "non_finite_draws"}


def test_attacked_pictures_are_answered_right_under_load(server, pictures):
    """200 requests of 8 clients; pictures come again, and each time they get draws of their own."""
    before = server.metrics()

    asked = [(pictures[i % len(pictures)], QUESTIONS[i % COUNT].prompt) for i in range(200)]
    first = load(server, asked[:100])
    held = server.memory()
    rest = load(server, asked[100:])
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
