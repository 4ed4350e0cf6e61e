"""The released lmms-eval on the demo's model: a task of drawn scenes, its command, its response cache.

Runs in an environment that has lmms-eval; elsewhere it is skipped.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lmms_eval")

from datasets import Dataset, Features, Image, Value
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from transformers import AutoModelForImageTextToText, AutoProcessor

import fs_plugins
from fs_plugins import SettingError
from fs_plugins.demo import assets, world
from fs_plugins.hf.chat import ask
from fs_plugins.hf.lmms_model import SmoothedModel

SCENES = [world.scene("heldout", i) for i in range(8)]
PICTURES = [scene.draw() for scene in SCENES]
ASKED = [scene.question("shape") for scene in SCENES]
# Its answers follow the noise closely: without a PSM the demo's model sees little else.
NOISY = "pretrained=demo,device=cpu,psm=none,sigma=0.1"

TASK = """
task: fs_scenes
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {folder}/scenes.parquet}}
  cache_dir: {folder}/datasets
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.pictures
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"image": picture, "question": question.prompt, "answer": question.answer}
        for picture, question in zip(PICTURES, ASKED, strict=True)
    ]
    kinds = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=kinds).to_parquet(folder / "scenes.parquet")
    (folder / "scenes.py").write_text("def pictures(doc):\n    return [doc['image']]\n", "utf-8")
    (folder / "scenes.yaml").write_text(TASK.format(folder=folder), "utf-8")
    return folder


@pytest.fixture
def evaluate(tasks, tmp_path):
    """``evaluate(model_args)`` -> the answers in order; ``evaluate.kept()``: how many answers its cache has."""

    def run(arguments: str = "", model: object = "fs_plugins", **settings: object) -> list[str]:
        manager = TaskManager("ERROR", include_path=str(tasks), include_defaults=False, model_name="fs_plugins")
        settings = {"use_cache": str(tmp_path / "cache"), "bootstrap_iters": 0, **settings}
        found = simple_evaluate(
            model=model, model_args=arguments, tasks=["fs_scenes"], task_manager=manager, **settings
        )
        samples = sorted(found["samples"]["fs_scenes"], key=lambda sample: sample["doc_id"])
        return [sample["filtered_resps"][0] for sample in samples]

    def kept() -> int:
        with closing(sqlite3.connect(tmp_path / "cache" / "cache.db")) as database:
            return database.execute("SELECT COUNT(*) FROM responses").fetchone()[0]

    run.kept = kept
    return run


@pytest.fixture(scope="module")
def plain():
    return AutoModelForImageTextToText.from_pretrained(assets.LLAVA).eval(), AutoProcessor.from_pretrained(assets.LLAVA)


def answers(plain, **smoothing) -> list[str]:
    """What the model says without lmms-eval, one question at a time."""
    model, processor = plain
    smoothed = fs_plugins.enable(model, noise_scope="image", seed=0, **smoothing) if smoothing else None
    said = [ask(model, processor, [PICTURES[i]], [ASKED[i].prompt])[0] for i in range(len(SCENES))]
    if smoothed:
        smoothed.disable()
    return said


def test_lmms_eval_finds_the_model_by_its_entry_point():
    assert get_model("fs_plugins") is SmoothedModel


def test_it_says_what_the_model_says(evaluate, plain):
    undefended = answers(plain)
    smoothed = answers(plain, psm="auto")
    noisy = answers(plain, psm=None, sigma=0.1)
    assert noisy != smoothed
    assert evaluate("pretrained=demo,device=cpu,smooth=false") == undefended
    assert evaluate("pretrained=demo,device=cpu") == smoothed
    assert evaluate(NOISY) == noisy


def test_answers_do_not_depend_on_the_batch_nor_on_where_a_run_was_resumed(evaluate):
    whole = evaluate(NOISY, use_cache=None)
    assert evaluate(NOISY, use_cache=None, batch_size=3) == whole
    assert evaluate(f"{NOISY},seed=1", use_cache=None) != whole, "the noise decides nothing here"
    evaluate(NOISY, limit=3)
    assert evaluate.kept() == 3
    assert evaluate(NOISY) == whole
    assert evaluate.kept() == len(SCENES)


def test_the_cache_keeps_every_smoothing_apart(evaluate):
    changes = ["sigma=0.25", "n0=2", "seed=1", "noise=iid", "noise_scope=call", "psm=photo", "smooth=false"]
    typed = [NOISY]
    for change in changes:
        name = change.split("=")[0]
        others = [part for part in NOISY.split(",") if not part.startswith(f"{name}=")]
        typed.append(",".join([*others, change]))
    said = []
    for count, arguments in enumerate(typed, start=1):
        said.append(evaluate(arguments))
        assert evaluate.kept() == count * len(SCENES), f"{arguments} shares a key"
    assert [evaluate(arguments) for arguments in typed] == said
    assert evaluate.kept() == len(typed) * len(SCENES)
    assert len({tuple(one) for one in said}) > 2


def test_a_model_that_is_passed_is_known_to_the_cache_by_its_arguments_in_full(evaluate):
    def model(**changes):
        return SmoothedModel("demo", device="cpu", **changes)

    first = evaluate(model=model())
    assert evaluate(model=model(sigma=0.25, psm="auto", n0=4, seed=0)) == first
    assert evaluate.kept() == len(SCENES)
    evaluate(model=model(n0=2))
    assert evaluate.kept() == 2 * len(SCENES)


def test_the_arguments_in_full_make_the_same_model():
    first = SmoothedModel.create_from_arg_string(f"{NOISY},seed=-1", {"batch_size": "2", "device": None})
    told = str(first).removeprefix("fs_plugins(").removesuffix(")")
    assert str(SmoothedModel.create_from_arg_string(told, {"device": "cpu"})) == str(first)
    with pytest.raises(SettingError, match="today, not for fs-"):
        SmoothedModel.create_from_arg_string(f"{told.replace('n0=4', 'n0=2')},device=cpu")


def requests(*contents: list) -> list[SimpleNamespace]:
    """lmms-eval's requests, each with one turn of these parts."""
    return [
        SimpleNamespace(args=("", lambda document: [{"role": "user", "content": document}], {}, i, "task", "test"))
        for i in range(len(contents))
    ]


def answered(model: SmoothedModel, *contents: list) -> list[str]:
    model.task_dict = {"task": {"test": contents}}
    return model.generate_until(requests(*contents))


def text(said: str) -> dict:
    return {"type": "text", "text": said}


def test_requests_with_and_without_images_share_a_run(tmp_path):
    PICTURES[0].save(tmp_path / "scene.png")
    shown = [{"type": "image", "url": PICTURES[0]}, text(ASKED[0].prompt)]
    on_disk = [{"type": "image", "url": str(tmp_path / "scene.png")}, text(ASKED[0].prompt)]
    contents = [shown, [text("Which shape?")], on_disk]
    one = SmoothedModel("demo", device="cpu", psm="none", sigma=0.1)
    some = SmoothedModel("demo", device="cpu", psm="none", sigma=0.1, batch_size=3)
    said = answered(one, *contents)
    assert said[0] == said[2]
    assert answered(some, *contents) == said
    assert fs_plugins.status(some._model).vision[0].images == 2


def test_what_it_cannot_do_is_said():
    model = SmoothedModel("demo", device="cpu")
    with pytest.raises(SettingError, match="shows video; fs_plugins takes images and text only"):
        answered(model, [{"type": "video", "url": "film.mp4"}, text("What happens?")])
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"pretrained": "demo-clip"}, "Cannot load 'demo-clip'"),
        ({"smooth": "perhaps"}, "smooth must be true or false"),
        ({"smooth": False, "pin": "fs-0"}, "smooth=false has none"),
        ({"batch_size": "auto"}, "batch_size must be a whole number"),
    ],
)
def test_wrong_arguments_are_told(wrong, says):
    with pytest.raises(fs_plugins.FSPluginsError, match=says):
        SmoothedModel(**{"pretrained": "demo", "device": "cpu", **wrong})


def test_its_own_command_scores_the_demo(tasks, tmp_path):
    # By the module rather than the script, so that torchvision is importable beside a CPU-only torch.
    start = "import fs_plugins.torchvision_schemas; from lmms_eval.__main__ import cli_evaluate; cli_evaluate()"
    options = {"model": "fs_plugins", "model_args": "pretrained=demo,sigma=0.25,n0=4,seed=0", "tasks": "fs_scenes"}
    options |= {"include_path": tasks, "use_cache": tmp_path / "cache", "output_path": tmp_path / "out"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    told = subprocess.run(
        [sys.executable, "-c", start, *words, "--batch_size", "4"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    (report,) = (tmp_path / "out").rglob("*results.json")
    found = json.loads(report.read_text("utf-8"))
    assert found["results"]["fs_scenes"]["exact_match,none"] > 0.8
    assert found["config"]["model_args"] == options["model_args"]
    assert "noise_scope=image,seed=0,pin=fs-" in told.stdout
    assert "8 images, 32 draws, 0 not finite" in told.stdout
