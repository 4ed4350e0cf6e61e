"""From a training to somebody else's ``psm="auto"``, over a hub."""

from __future__ import annotations

import re
import shlex

import pytest
from huggingface_hub import ModelCard
from support import make_psm
from typer.testing import CliRunner

import fs_plugins
from fs_plugins import PSM, registry
from fs_plugins.cli import app
from fs_plugins.hf.load import load_model

pytest.importorskip("accelerate")
NAME = "ada/my-psm"
SHORT = ["--scenes", "12", "--model", "demo-clip", "--steps", "1", "--mapper-steps", "1", "--batch-size", "4"]
SHORT += ["--draws", "1", "--certify", "1", "--n", "20"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def told(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture
def login(live_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    return live_hub


def test_whoever_trains_gives_it_to_everybody_by_one_command(login, tmp_path, monkeypatch):
    out = tmp_path / "my-psm"
    said = told("train", *SHORT, "--out", out, "--push", NAME, "--license", "mit")
    commit = login.repositories[NAME].at("main")[0]
    assert f"/{NAME}/tree/{commit}" in said
    assert not login.repositories[NAME].private
    pushed = {"config.json", "psm.safetensors", "README.md", "SHA256SUMS", "held-out.txt", "log.csv"}
    assert login.files(NAME) == {name: (out / name).read_bytes() for name in pushed}

    added = re.search(r"fs-plugins (registry add \S+)$", said)[1].split()
    assert added == ["registry", "add", f"{NAME}@{commit}"]
    monkeypatch.setenv("FS_PLUGINS_REGISTRY", str(tmp_path / "others.yaml"))
    assert "my-psm is at the top of" in told(*added)
    with fs_plugins.enable(load_model("demo-clip")) as handle:
        assert handle.status().vision[0].psm == "my-psm"
    entry = registry.load(tmp_path / "others.yaml").encoders["my-psm"].psms[0]
    assert (entry.state, entry.path, entry.revision) == ("hub", NAME, commit)


def test_the_card_says_its_figures_twice_and_the_same(login, tmp_path):
    told("train", *SHORT, "--out", tmp_path / "psm", "--push", NAME, "--license", "mit", "--sigma-range", ".2", ".3")
    card = ModelCard(login.files(NAME)["README.md"].decode())
    data = card.data
    assert (data.license, data.library_name, data.base_model) == ("mit", "fs-plugins", "demo-clip")
    assert {"fs-plugins", "feature-space-smoothing", "certified-robustness"} == set(data.tags)
    assert data.model_name == "psm"
    assert f'enable(model, psm="{NAME}")' in card.text
    rows = {row[0]: row[1:] for row in re.findall(r"\| (0\.\d+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|", card.text)}
    kinds = ["plain noise", "purifier", "mapper", "both"]
    found = {(r.metric_args["sigma"], r.metric_args["parts"]): r for r in data.eval_results if "score" in r.metric_type}
    assert len(found) == 12
    for sigma, values in rows.items():
        for kind, value in zip(kinds, values, strict=True):
            assert f"{found[float(sigma), kind].metric_value:.4f}" == value
    radii = [r.metric_value for r in data.eval_results if r.metric_type == "average_certified_radius"]
    assert f"| {radii[0]:.4f} | {radii[1]:.4f} |" in card.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push", "psm"], "owner/name, where name does not end in .pt; got 'psm'"),
        (["--push", "babbage/psm"], "the login is that of ada"),
        (["--push", "babbage/psm", "--dry-run"], "the login is that of ada"),
    ],
)
def test_what_could_not_be_pushed_is_told_before_anything_is_trained(login, tmp_path, arguments, message):
    assert message in told("train", *SHORT, "--out", tmp_path / "psm", *arguments, code=2)
    assert not (tmp_path / "psm").exists()
    assert not login.repositories


def test_nobody_logged_in_is_told_before_anything_is_trained(live_hub, tmp_path):
    said = told("train", *SHORT, "--out", tmp_path / "psm", "--push", NAME, code=2)
    assert "nobody is logged in to the hub. Log in with `hf auth login`, or set HF_TOKEN" in said
    assert not (tmp_path / "psm").exists()


def test_a_push_that_fails_leaves_a_finished_training_and_says_how_to_go_on(login, tmp_path):
    out = tmp_path / "a psm"
    login.broken[f"/api/models/{NAME}/commit"] = 500
    training = ("train", *SHORT, "--out", out, "--push", NAME, "--private")
    said = told(*training, code=2)
    assert "could not be written, and is as it was" in said
    later = re.search(r"The PSM is finished, in .*\. To push it later: fs-plugins (registry push .*)$", said)[1]
    assert PSM.from_pretrained(out).config.name == "a psm"
    assert login.files(NAME) == {}

    login.broken.clear()
    again = told(*training)
    assert "Finished already" in again
    assert "Pushed: " in again
    assert login.repositories[NAME].private
    first = login.repositories[NAME].at("main")
    assert f"fs-plugins registry add {NAME}@{first[0]}" in told(*shlex.split(later))
    assert first[1] == login.files(NAME)


def test_a_psm_of_unknown_weights_says_what_others_have_to_add(login, tmp_path, call):
    make_psm(call, encoder="owner/model").save_pretrained(tmp_path / "psm")
    assert told("registry", "push", tmp_path / "psm", NAME).endswith("--encoder owner/model")
    make_psm(call, encoder="llava-hf/llava-1.5-7b-hf").save_pretrained(tmp_path / "psm")
    said = told("registry", "push", tmp_path / "psm", NAME, "--revision", "new", "--message", "for LLaVA")
    assert said.endswith(f"registry add {NAME}@{login.repositories[NAME].at('new')[0]}"), "an entry says who uses it"
    assert login.repositories[NAME].messages[-1] == "for LLaVA"
    assert "There is no folder" in told("registry", "push", tmp_path / "nowhere", NAME, code=2)
