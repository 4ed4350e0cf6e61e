from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from guided_diffusion import GuidedDiffusion, shaken
from support import command_line
from typer.testing import CliRunner

import fs_plugins
from fs_plugins import PSM, PSMError, sources
from fs_plugins.cli import app
from fs_plugins.demo import assets, world
from fs_plugins.files import LOCK
from fs_plugins.hf.load import load_model
from fs_plugins.psm import Part
from fs_plugins.psm.diffusion import load_guided_diffusion

pytest.importorskip("accelerate")
runner = CliRunner()
TINY = {"channels": [32, 64], "layers": 1, "attention": [1], "head_dim": 16}
SHORT = [
    *("--steps", "3", "--mapper-steps", "2", "--batch-size", "4", "--draws", "1", "--warmup", "1", "--log-every", "1"),
    *("--certify", "1", "--n", "20"),
]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(12):
        world.scene("train", i).draw().resize((90, 70)).save(folder / f"{i}.png")
    return folder


def invoke(*arguments, code: int = 0) -> str:
    result = runner.invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("trained") / "my-psm"
    return out, invoke(photos, "--model", "demo-clip", "--out", out, "--sigma-range", "0.2", "0.3", *SHORT)


def test_a_folder_of_photos_becomes_a_psm_that_serves(trained):
    out, told = trained
    assert "11 pictures to train on, 1 held out" in told
    assert "average certified radius, this PSM" in told
    psm = PSM.from_pretrained(out)
    assert psm.config.name == "my-psm"
    assert psm.config.encoder == "demo-clip"
    assert psm.config.sigma_range == (0.2, 0.3)
    with fs_plugins.enable(load_model("demo-clip"), psm=out) as handle:
        assert handle.status().vision[0].psm == "my-psm"
    names = {path.name for path in out.iterdir()}
    published = {"README.md", "SHA256SUMS", "config.json", "held-out.txt", "psm.safetensors"}
    assert names == {*published, "log.csv", "training.json", LOCK}
    held = (out / "held-out.txt").read_text("utf-8").split()
    assert len(held) == 1
    assert held[0] in {f"{i}.png" for i in range(12)}


def test_the_log_has_losses_and_scores(trained):
    with (trained[0] / "log.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["step"]) for row in rows] == [
        *(("purifier", n) for n in "123"),
        *(("mapper", n) for n in "12"),
    ]
    assert all(0.2 <= float(row["sigma"]) <= 0.3 and -1 <= float(row["score"]) <= 1 for row in rows)
    assert float(rows[0]["lr"]) == 1e-3
    assert all((row["l_mse"] != "") == (row["stage"] == "purifier") for row in rows)
    assert all((row["l_stats"] != "") == (row["stage"] == "mapper") for row in rows)


def test_the_model_card_says_what_was_done_and_leaves_the_licence_open(trained):
    card = (trained[0] / "README.md").read_text("utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert "license" not in header
    assert "Licence: not chosen yet." in card
    assert "fs-plugins" in header["tags"]
    for said in (
        "| sigma | plain noise | purifier | mapper | both |",
        "| 0.2 |",
        "| 0.25 |",
        "| 0.3 |",
        "1 held-out pictures, 20 draws each; every certificate is wrong with probability at most 0.001",
        "11 pictures to train on",
        "seed: 0",
        '"steps": 3',
        "## Limits",
    ):
        assert said in card
    rows = [row.split(" | ")[1:] for row in card.splitlines() if re.match(r"\| 0\.\d", row) and row.count("|") == 6]
    assert len(rows) == 3
    assert all(-1 <= float(value.strip(" |")) <= 1 for row in rows for value in row)


def test_a_finished_training_is_found_and_another_refused(trained, photos):
    before = (trained[0] / "README.md").read_bytes()
    same = (photos, "--model", "demo-clip", "--out", trained[0], "--sigma-range", "0.2", "0.3", *SHORT)
    assert "Finished already" in invoke(*same)
    assert "config.lambda2 was 0.25 and is 0.5 now" in invoke(*same, "--lambda2", "0.5", code=2)
    assert "images was" in invoke(*same, "--held-out", "3", code=2)
    assert (trained[0] / "README.md").read_bytes() == before


def test_settings_come_from_a_file_and_flags_win_over_it(trained, photos, tmp_path):
    asked = dict(zip(SHORT[::2], SHORT[1::2], strict=True))
    filed = {flag.removeprefix("--").replace("-", "_"): int(value) for flag, value in asked.items()}
    filed |= {"photos": str(photos), "model": "demo-clip", "out": str(trained[0]), "sigma_range": [0.2, 0.3]}
    (tmp_path / "psm.yaml").write_text(yaml.safe_dump(filed), "utf-8")
    assert "Finished already" in invoke("--config", tmp_path / "psm.yaml")
    told = invoke("--config", tmp_path / "psm.yaml", "--lambda2", "0.5", code=2)
    assert "config.lambda2 was 0.25 and is 0.5 now" in told
    (tmp_path / "psm.yaml").write_text("stepps: 3", "utf-8")
    assert "there is no setting 'stepps'" in invoke("--config", tmp_path / "psm.yaml", code=2)


def test_a_dry_run_says_what_it_takes_and_writes_nothing(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = invoke(photos, "--model", "demo-clip", "--out", "psm", "--dry-run", "--batch-size", "4", "--draws", "1")
    assert not list(tmp_path.iterdir())
    assert "12,000" in told
    assert "2,582,256" in told
    assert f"{4 * 5 * 2_582_256 / 2**20:.0f} MB" in told
    assert "of memory at the peak" in told


def test_an_ablation_tells_idle_terms(photos, tmp_path):
    told = invoke(
        photos, "--model", "demo-clip", "--out", tmp_path / "psm", "--ablate", *SHORT, "--steps", 1, "--mapper-steps", 1
    )
    assert "without l_mse" in told
    assert "l_id does nothing: the mapper is the same without it." in told
    assert "l_stats does nothing" not in told
    assert not (tmp_path / "psm").exists()


def test_half_precision_and_a_purifier_to_go_on_from(photos, trained, tmp_path):
    taken = (
        "--start",
        trained[0],
        "--steps",
        "0",
        "--sigma-range",
        "0.2",
        "0.3",
        "--certify",
        "0",
        "--precision",
        "bf16",
    )
    invoke(photos, "--model", "demo-clip", "--out", tmp_path / "psm", *SHORT, *taken)
    first, second = PSM.from_pretrained(trained[0]), PSM.from_pretrained(tmp_path / "psm")
    for name, value in first.purifier.state_dict().items():
        assert torch.equal(second.purifier.state_dict()[name], value)
    assert "Average certified" not in (tmp_path / "psm" / "README.md").read_text("utf-8")
    assert '"precision": "bf16"' in (tmp_path / "psm" / "training.json").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a folder of pictures, or --scenes"),
        (["{photos}", "--scenes", "9"], "Give a folder of pictures, or --scenes"),
        (["{empty}"], "No .png, .jpg, .jpeg below"),
        (["nowhere"], "There is no folder nowhere"),
        (["{photos}", "--batch-size", "12"], "Fewer training images (11) than one batch of 12"),
        (["{broken}", "--batch-size", "4"], "cut.png is not a readable image"),
        (["{photos}", "--out", "{photos}"], "holds no training"),
        (["{photos}", "--held-out", "12"], "Cannot hold out 12 of 12"),
        (["{photos}", "--size", "96"], "this encoder sees 64x64 pixels"),
        (["{photos}", "--precision", "fp8"], "--precision is one of fp32, bf16, fp16"),
        pytest.param(
            ["{photos}", "--precision", "fp16"],
            "fp16 needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["{photos}", "--alpha", "2"], "alpha"),
        (["{photos}", "--sigma", "0"], "sigma must be positive"),
        (["{photos}", "--lambda1", "-1"], "lambda1 weighs a loss"),
        (["{photos}", "--ema", "1.5"], "ema is a decay"),
        (["{photos}", "--purifier", "magic", "--batch-size", "4"], "No purifier of kind 'magic'"),
        (["{photos}", "--purifier-args", "{channels}"], "--purifier-args is JSON"),
        (["{photos}", "--purifier-args", '{"depth": 3}', "--batch-size", "4"], "does not take the arguments"),
        (["{photos}", "--purifier", "diffusion"], "give the public checkpoint"),
        (["{photos}", "--purifier", "diffusion", "--purifier-weights", "gone.pt"], "there is no file gone.pt"),
        (["{photos}", "--lora", "4"], "go with --purifier diffusion"),
        (["{photos}", "--start", "{empty}", "--lora", "4"], "not with --start"),
        (["{photos}", "--purifier", "none", "--mapper", "none"], "Nothing to train"),
        (["{photos}", "--start", "{empty}"], "is no PSM folder"),
        (["{photos}", "--start", "photo-lite"], "the registry has no purifier of that name. It has: "),
        (["{photos}", "--model", "{empty}"], "Cannot load"),
    ],
)
def test_mistakes_are_told_in_a_sentence_before_anything_is_trained(photos, tmp_path, monkeypatch, arguments, message):
    for name in ("empty", "out"):
        (tmp_path / name).mkdir()
    shutil.copytree(photos, tmp_path / "broken")
    (tmp_path / "broken" / "cut.png").write_bytes((photos / "3.png").read_bytes()[:300])
    places = {"photos": photos, "empty": tmp_path / "empty", "broken": tmp_path / "broken"}
    filled = [a.format(**places) if a.strip("{}") in places else a for a in arguments]
    out = [] if "--out" in filled else ["--out", tmp_path / "out"]
    assert message in invoke(*filled, *out, code=2)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("package", ["accelerate", "tensorboard"])
def test_missing_packages_are_named(photos, tmp_path, monkeypatch, package):
    for name in (package, "torch.utils.tensorboard") if package == "tensorboard" else (package,):
        monkeypatch.setitem(sys.modules, name, None)
    told = invoke(photos, "--out", tmp_path / "psm", "--tensorboard", code=2)
    assert (
        f"pip install {'tensorboard' if package == 'tensorboard' else chr(34) + 'fs-plugins[train]' + chr(34)}" in told
    )


def tiny_diffusion(path: Path) -> tuple[Path, str]:
    """A checkpoint in the layout of the public model, and its sizes."""
    torch.save(shaken(GuidedDiffusion(**TINY)).state_dict(), path / "tiny.pt")
    return path / "tiny.pt", json.dumps(TINY)


def test_lora_trains_keeps_its_updates_alone_and_serves(photos, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    weights, sizes = tiny_diffusion(tmp_path)
    made = ("--purifier", "diffusion", "--purifier-weights", weights, "--purifier-args", sizes, "--lora", "2")
    few = (
        "--mapper",
        "none",
        "--certify",
        "0",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--draws",
        "1",
        "--warmup",
        "1",
        "--lr",
        "1e-3",
    )
    invoke(photos, "--model", "demo-clip", "--out", tmp_path / "psm", *made, *few)
    psm = PSM.from_pretrained(tmp_path / "psm")
    kept = psm.purifier.state_dict()
    assert all("lora_" in name for name in kept)
    assert any(value.abs().max() > 0 for name, value in kept.items() if "lora_B" in name), "something was learned"
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tuned = psm.purify(images, 0.25)
    with torch.no_grad():
        for name, value in psm.purifier.named_parameters():
            if "lora_B" in name:
                value.zero_()
    base = load_guided_diffusion(weights, **TINY)(images, 0.25)
    assert torch.allclose(psm.purify(images, 0.25), base, atol=1e-6), "without the updates it is the public model"
    assert not torch.allclose(tuned, base, atol=1e-6)
    size = (tmp_path / "psm" / "psm.safetensors").stat().st_size
    assert size < weights.stat().st_size / 4
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(assets.CLIP).eval()
    blank = torch.zeros(1, 3, 64, 64)
    with fs_plugins.enable(clip, psm=tmp_path / "psm", seed=0) as handle, torch.no_grad():
        served = clip(pixel_values=blank, input_ids=torch.tensor([[1, 3]])).image_embeds
        assert handle.status().vision[0].purifier == "lora"
    monkeypatch.setenv(sources.CACHE, str(tmp_path / "cache"))
    sha256 = psm.config.purifier.args["sha256"]
    (tmp_path / "cache" / sha256).mkdir(parents=True)
    elsewhere = weights.rename(tmp_path / "cache" / sha256 / "of-another-name.pt")
    with fs_plugins.enable(clip, psm=tmp_path / "psm", seed=0), torch.no_grad():
        again = clip(pixel_values=blank, input_ids=torch.tensor([[1, 3]])).image_embeds
    assert torch.equal(again, served), "the base is found in the cache"
    elsewhere.rename(weights)
    other = psm.config.model_copy(
        update={
            "purifier": Part(kind="lora", args=psm.config.purifier.args | {"sha256": "0" * 64, "base": "/nowhere.pt"})
        }
    )
    assert other.structure != psm.config.structure, "another base is another purifier, though the updates are the same"
    moved = psm.config.purifier.args | {"base": "/elsewhere.pt"}
    assert psm.config.model_copy(update={"purifier": Part(kind="lora", args=moved)}).structure == psm.config.structure
    with pytest.raises(PSMError, match=r"trained on is not at /nowhere\.pt"):
        PSM(other)
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(PSMError, match="is damaged"):
        PSM.from_pretrained(tmp_path / "psm")


def test_a_diffusion_purifier_is_fine_tuned_whole(photos, tmp_path):
    weights, sizes = tiny_diffusion(tmp_path)
    made = ("--purifier", "diffusion", "--purifier-weights", weights, "--purifier-args", sizes, "--lr", "1e-30")
    few = ("--mapper", "none", "--certify", "0", "--steps", "1", "--batch-size", "2", "--draws", "1")
    invoke(photos, "--model", "demo-clip", "--out", tmp_path / "psm", *made, *few)
    psm = PSM.from_pretrained(tmp_path / "psm")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        public = load_guided_diffusion(weights, **TINY)(images, 0.25)
    assert torch.allclose(psm.purify(images, 0.25), public, atol=1e-6), "it starts from the public weights"


@pytest.mark.slow
def test_two_processes_train_what_one_trains_with_the_double_batch(photos, tmp_path):
    settings = [
        "--scenes",
        "40",
        "--steps",
        "5",
        "--mapper-steps",
        "5",
        "--draws",
        "2",
        "--certify",
        "0",
        "--lambda3",
        "1",
    ]
    settings += ["--warmup", "1", "--log-every", "1", "--accumulate", "2", "--sigma-range", "0.2", "0.3"]

    def run(processes, *options):
        done = command_line(processes, "train", *settings, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(1, "--batch-size", "4", "--out", tmp_path / "one")
    told = run(2, "--batch-size", "2", "--out", tmp_path / "two")
    assert told.count("pictures to train on") == 1
    logs = [list(csv.reader((tmp_path / name / "log.csv").open(encoding="utf-8"))) for name in ("one", "two")]
    assert len(logs[0]) == 11
    for one, other in zip(*(rows[1:] for rows in logs), strict=True):
        assert one[:2] == other[:2]
        assert [float(value or 0) for value in one[2:]] == pytest.approx(
            [float(value or 0) for value in other[2:]], rel=1e-4
        )
    one, two = (PSM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    apart = {name: (value - two[name]).abs().max().item() for name, value in one.items()}
    assert max(apart.values()) < 1e-5, apart
    card = (tmp_path / "two" / "README.md").read_text("utf-8")
    assert "accelerate launch --num_processes 2 -m fs_plugins.cli train --scenes 40" in card
    assert "Finished already" in run(2, "--batch-size", "2", "--out", tmp_path / "two")
