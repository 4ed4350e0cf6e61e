"""A PSM goes to the hub and comes back: what is there then, and what is said where it cannot be."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from support import make_psm

from fs_plugins import PSM, OutputError, PSMError, SettingError, kept
from fs_plugins.publishing import push
from fs_plugins.registry import checksum
from fs_plugins.sources import source_of

NAME = "ada/my-psm"


@pytest.fixture
def login(live_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    return live_hub


@pytest.fixture
def folder(call, tmp_path) -> Path:
    """A finished training, with what it leaves beside the PSM."""
    place = tmp_path / "trained"
    make_psm(call).save_pretrained(place)
    for name in ("README.md", "held-out.txt", "log.csv", "training.json", "checkpoint.pt", ".lock", "photo.png"):
        (place / name).write_text(f"this is {name}", "utf-8")
    (place / "tensorboard").mkdir()
    (place / "tensorboard" / "events").write_text("much", "utf-8")
    kept.write_sums(place, ("config.json", "psm.safetensors", "log.csv", "held-out.txt"))
    return place


def same(one: PSM, other: PSM) -> bool:
    weights = other.state_dict()
    return one.config == other.config and all(torch.equal(v, weights[k]) for k, v in one.state_dict().items())


def test_what_is_pushed_is_what_is_loaded(login, call):
    psm = make_psm(call)
    commit = psm.push_to_hub(NAME, commit_message="first")
    assert set(login.files(NAME)) == {"config.json", "psm.safetensors", "README.md"}
    assert login.repositories[NAME].messages == ["first"]
    assert login.files(NAME) | psm.files() == login.files(NAME), "byte for byte what a folder would hold"
    assert same(PSM.from_pretrained(NAME).only(), PSM.from_pretrained(NAME, revision=commit.partition("@")[2]))
    for name, value in PSM.from_pretrained(NAME).state_dict().items():
        assert torch.equal(value, psm.state_dict()[name])
    source = source_of(commit)
    expected = hashlib.sha256(login.files(NAME)["config.json"] + login.files(NAME)["psm.safetensors"]).hexdigest()
    assert (source.state, source.path, source.sha256) == ("hub", NAME, expected)


def test_a_newer_one_is_another_commit_and_the_older_stays(login, call):
    first = make_psm(call).push_to_hub(NAME)
    second = make_psm(call, sigma=0.5).push_to_hub(NAME)
    assert PSM.from_pretrained(NAME).config.sigma == 0.5
    assert PSM.from_pretrained(NAME, revision=first.partition("@")[2]).config.sigma == 0.25
    assert make_psm(call, sigma=0.5).push_to_hub(NAME, dtype=torch.float16) != second
    weights = login.files(NAME)["psm.safetensors"]
    assert len(weights) < len(login.repositories[NAME].branches["main"][0][1]["psm.safetensors"]) * 0.6


def test_a_short_card_is_made_where_there_is_none_and_yours_stays(login, call):
    make_psm(call).push_to_hub(NAME)
    card = ModelCard(login.files(NAME)["README.md"].decode())
    assert card.data.library_name == "fs-plugins"
    assert f'enable(model, psm="{NAME}")' in card.text
    login.repositories[NAME].branches["main"][-1][1]["README.md"] = b"my own words"
    make_psm(call, sigma=0.5).push_to_hub(NAME)
    assert login.files(NAME)["README.md"] == b"my own words"


def test_branches_and_private_repositories(login, call):
    make_psm(call).push_to_hub(NAME, private=True)
    assert login.repositories[NAME].private
    make_psm(call, sigma=0.5).push_to_hub(NAME, revision="half")
    make_psm(call, sigma=0.5).push_to_hub(NAME, revision="half")
    assert PSM.from_pretrained(NAME, revision="half").config.sigma == 0.5
    assert PSM.from_pretrained(NAME).config.sigma == 0.25
    make_psm(call).push_to_hub("lovelace-lab/psm", token="hf_write")
    assert not login.repositories["lovelace-lab/psm"].private


def test_of_a_folder_goes_what_others_need_and_nothing_else(login, folder):
    commit = push(folder, NAME)
    names = {"config.json", "psm.safetensors", "README.md", "SHA256SUMS", "held-out.txt", "log.csv"}
    assert login.files(NAME) == {name: (folder / name).read_bytes() for name in names}
    assert source_of(commit).sha256 == checksum(folder)
    assert len(login.repositories[NAME].branches["main"]) == 1, "in one commit"
    assert push(folder, NAME) == commit, "nothing changed, so there is no other commit"


def test_sums_of_an_earlier_psm_do_not_stay_beside_a_newer_one(login, folder, call):
    push(folder, NAME)
    make_psm(call, sigma=0.5).push_to_hub(NAME)
    assert "SHA256SUMS" not in login.files(NAME)
    assert login.files(NAME)["README.md"] == b"this is README.md"


def test_what_is_damaged_or_no_psm_is_not_pushed(login, folder, tmp_path):
    with pytest.raises(PSMError, match="There is no folder"):
        push(tmp_path / "nowhere", NAME)
    with pytest.raises(PSMError, match="is no PSM folder"):
        push(tmp_path, NAME)
    shutil.copytree(folder, tmp_path / "log")
    (tmp_path / "log" / "log.csv").write_text("better", "utf-8")
    with pytest.raises(PSMError, match=r"not as it was finished: log\.csv is damaged"):
        push(tmp_path / "log", NAME)
    weights = folder / "psm.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(PSMError, match="is damaged"):
        push(folder, NAME)
    assert not login.repositories


def test_a_folder_whose_save_was_killed_is_pushed_as_it_is_loaded(login, call, tmp_path):
    make_psm(call).save_pretrained(tmp_path / "psm")
    weights, config = tmp_path / "psm" / "psm.safetensors", tmp_path / "psm" / "config.json"
    right = weights.read_bytes()
    (tmp_path / "psm" / f".psm.safetensors-{json.loads(config.read_text('utf-8'))['weights_sha256']}").write_bytes(
        right
    )
    weights.write_bytes(b"the next PSM's, whose configuration never came")
    push(tmp_path / "psm", NAME)
    assert login.files(NAME)["psm.safetensors"] == right
    assert same(PSM.from_pretrained(NAME), PSM.from_pretrained(tmp_path / "psm"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my-psm", "owner/name, where name does not end in .pt; got 'my-psm'"),
        ("ada/a/b", "is no name of a repository"),
        ("ada/my psm", "is no name of a repository"),
        ("ada/--", "is no name of a repository"),
        ("ada/model.pt", "does not end in .pt"),
        ("babbage/my-psm", "the login is that of ada, who may write what is of ada, lovelace-lab, not of babbage"),
    ],
)
def test_names_that_cannot_be_pushed_to_are_told(login, call, name, message):
    with pytest.raises(SettingError, match=message):
        make_psm(call).push_to_hub(name)
    assert not login.repositories


def test_logins_that_may_not_write_are_told(live_hub, call, monkeypatch):
    psm = make_psm(call)
    with pytest.raises(SettingError, match=r"ada/my-psm cannot be written: nobody is logged in.*hf auth login.*HF_"):
        psm.push_to_hub(NAME)
    with pytest.raises(SettingError, match="does not know this token"):
        psm.push_to_hub(NAME, token="hf_wrong")
    with pytest.raises(SettingError, match="the token of ada may only read"):
        psm.push_to_hub(NAME, token="hf_read")
    live_hub.broken["/api/repos/create"] = 403
    with pytest.raises(SettingError, match=r"this login may not write there .*hf auth login"):
        psm.push_to_hub(NAME, token="hf_write")
    for variable in ("HF_HUB_OFFLINE", "FS_PLUGINS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
        with pytest.raises(SettingError, match=f"While {variable} is set nothing is pushed"):
            psm.push_to_hub(NAME, token="hf_write")
        monkeypatch.delenv(variable)
    assert not live_hub.repositories
    assert not {one for one in live_hub.asked if one.startswith("POST")} - {"POST /api/repos/create"}


@pytest.mark.parametrize("step", ["commit", "preupload"])
def test_a_push_that_breaks_off_leaves_what_was_there(login, call, step):
    make_psm(call).push_to_hub(NAME)
    login.broken[f"/api/models/{NAME}/{step}"] = 400
    with pytest.raises(OutputError, match=f"{NAME} could not be written, and is as it was: .*Try again"):
        make_psm(call, sigma=0.5).push_to_hub(NAME)
    assert PSM.from_pretrained(NAME).config.sigma == 0.25
    login.broken.clear()
    make_psm(call, sigma=0.5).push_to_hub(NAME)
    assert PSM.from_pretrained(NAME).config.sigma == 0.5


def test_without_a_network_it_is_told_in_words(login, call, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OutputError, match=f"{NAME} could not be written.*Try again"):
        make_psm(call).push_to_hub(NAME)


def test_a_card_that_the_hub_refuses_is_told(login, folder):
    (folder / "README.md").write_text("---\nlicense: mine\n---\n", "utf-8")
    with pytest.raises(OutputError, match=r"Invalid metadata in README\.md.*license"):
        push(folder, NAME)
    assert login.files(NAME) == {}
