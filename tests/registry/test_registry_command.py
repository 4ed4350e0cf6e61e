"""``fs-plugins registry``: list, show, verify, add."""

from __future__ import annotations

import copy
import shutil

import pytest
import yaml
from registering import COMMIT, SHA, SHIPPED, any_size, corrupted, in_one_file, purifiers, told, truncated, write
from support import make_llava, make_psm

import fs_plugins
from fs_plugins import FSPluginsWarning, registry
from fs_plugins.identity import fingerprint
from fs_plugins.plugins import known_encoders
from fs_plugins.sources import PSM_FILES


def test_add_puts_a_psm_into_the_users_file_where_enable_finds_it(trained, llava):
    model, psm = trained
    path = registry.user_path()
    with pytest.warns(FSPluginsWarning, match="'photo-light' stands in"):
        fs_plugins.enable(llava).disable()
    assert f"new is at the top of {path}" in told("add", str(psm), "--encoder", str(model))
    with fs_plugins.enable(llava) as handle:
        assert handle.status().vision[0].psm == "new"
    entry = registry.load(path).encoders["new"]
    assert entry.fingerprint == fingerprint(llava.model.vision_tower)
    assert entry.psms[0].model_dump(exclude_none=True, exclude_defaults=True) == {
        "state": "folder",
        "path": str(psm),
        "sha256": registry.checksum(psm),
        "readout": "hidden_states[-2][1:]",
        "sigma": 0.25,
        "sigma_range": (0.25, 0.25),
    }
    assert f"yours {path}"[6:] in told("list")
    assert "right new, hidden_states[-2][1:]" in told("verify", "new")
    assert "right new, weights" in told("verify", "new")


def test_add_refuses_a_name_that_exists_unless_it_is_to_be_replaced(trained, llava, tmp_path):
    model, psm = trained
    told("add", str(psm), "--encoder", str(model))
    before = registry.user_path().read_bytes()
    assert "'new' is in" in told("add", str(psm), code=2)
    assert "'demo-clip' is in" in told("add", str(psm), "--name", "demo-clip", code=2)
    assert registry.user_path().read_bytes() == before
    make_psm(fs_plugins.vision_call(llava), name="better").save_pretrained(tmp_path / "better")
    told("add", str(tmp_path / "better"), "--name", "new", "--replace")
    assert list(registry.load(registry.user_path()).encoders) == ["new"]
    with fs_plugins.enable(llava) as handle:
        assert handle.status().vision[0].psm == "better"
    answer = told("add", str(psm), "--name", "newest")
    assert "new: newest comes first for hidden_states[-2][1:] of the same weights" in answer
    assert known_encoders().find(fs_plugins.vision_call(llava)).passed_over == ("new",)
    assert "demo-clip hides" not in told("list")
    told("add", str(psm), "--name", "demo-clip", "--replace")
    assert f"demo-clip: {registry.user_path()} hides what {registry.shipped_path()} says of it" in told("list")


def test_add_refuses_what_is_damaged_unknown_or_of_another_encoder(trained, tmp_path):
    model, psm = trained
    assert "Say what it was trained for: --encoder" in told("add", str(psm), code=2)
    assert "other weights than those of demo-clip" in told("add", str(psm), "--encoder", "demo-clip", code=2)
    assert "other weights than those of the model demo" in told("add", str(psm), "--encoder", "demo", code=2)
    assert "is no PSM folder" in told("add", str(tmp_path), code=2)
    assert "No PSM folder at" in told("add", str(tmp_path / "nowhere"), code=2)
    assert "needs path and sha256" in told("add", "https://example.org/psm/", code=2)
    assert "begins with https" in told("add", "http://example.org/psm/", "--sha256", SHA, code=2)
    assert "does not have the registry's checksum" in told("add", str(psm), "--sha256", SHA, code=2)
    make_psm(fs_plugins.vision_call(make_llava(vision_feature_layer=-1))).save_pretrained(tmp_path / "last")
    assert "maps readout 'hidden_states[-1]" in told("add", str(tmp_path / "last"), "--encoder", str(model), code=2)
    weights = psm / "psm.safetensors"
    weights.write_bytes(corrupted(weights.read_bytes()))
    assert "is damaged" in told("add", str(psm), "--encoder", str(model), code=2)
    assert registry.load(registry.user_path()).encoders == {}


def test_add_takes_pinned_repositories_and_urls(trained, hub, tmp_path):
    model, psm = trained
    for name in PSM_FILES:
        shutil.copy(psm / name, hub / name)
    assert "the 40 hexadecimal digits" in told("add", "someone/psm@main", code=2)
    assert "The hub did not give" in told("add", f"someone/psm@{'d' * 40}", code=2)
    told("add", f"someone/psm@{COMMIT}", "--encoder", str(model), "--name", "from-hub")
    told("add", psm.as_uri() + "/", "--sha256", registry.checksum(psm), "--name", "from-url")
    found = registry.load(registry.user_path()).encoders
    assert [(entry.psms[0].state, entry.psms[0].revision) for entry in found.values()] == [
        ("url", None),
        ("hub", COMMIT),
    ]
    assert {entry.psms[0].sha256 for entry in found.values()} == {registry.checksum(psm)}


def test_add_lists_a_psm_without_mappers_as_a_purifier(online, call, tmp_path):
    any_size(call).save_pretrained(tmp_path / "psm")
    told("add", str(tmp_path / "psm"), "--name", "mine")
    assert known_encoders().purifier("mine").config.image_size is None
    assert "mine unet any 0.25 folder psm yours" in told("list")


def test_verify_finds_what_is_wrong_and_says_what_it_could_not_check(trained, tmp_path):
    model, psm = trained
    told("add", str(psm), "--encoder", str(model))
    path = registry.user_path()
    data = yaml.safe_load(path.read_text("utf-8"))
    data["purifiers"] = {
        "far": {"kind": "diffusion", "sigma": 0.25, "state": "url", "path": "https://example.org/far.pt", "sha256": SHA}
    }
    write(path, data)
    assert "unchecked far not on this machine: url https://example.org/far.pt" in told("verify", "far")

    def wrong(change, message: str) -> None:
        broken = copy.deepcopy(data)
        change(broken["encoders"]["new"])
        write(path, broken)
        assert message in told("verify", "new", code=1)
        write(path, data)

    wrong(lambda e: e["psms"][0].update(sha256=SHA), "has the checksum")
    wrong(lambda e: e["psms"][0].update(path=str(tmp_path / "gone")), "not on this machine: folder")
    wrong(lambda e: e["psms"][0].update(sigma_range=[0.1, 0.5]), "WRONG new")
    wrong(lambda e: e["psms"][0].update(readout="pooler_output"), "has no mapper for pooler_output")
    wrong(lambda e: e.update(fingerprint=[1.0] * 16), "was trained for other weights")
    wrong(lambda e: e.update(fingerprint=[1.0] * 16), "WRONG new, weights")
    told("verify", "new")
    weights = psm / "psm.safetensors"
    weights.write_bytes(truncated(weights.read_bytes()))
    assert "WRONG new" in told("verify", "new", code=1)
    assert "no entry 'nobody'" in told("verify", "nobody", code=2)
    assert "Nothing to check" in told("verify", "llava-1.5")


def test_verify_looks_at_conversions_too(online, checkpoint, tmp_path, monkeypatch):
    known = purifiers(tmp_path, **in_one_file(checkpoint))
    assert [check.right for check in known.verify()] == [None]
    known.purifier("mine")
    assert [(check.what, check.right) for check in known.verify()] == [("mine", True), ("mine, converted", True)]
    (weights,) = online.glob("*-converted/psm.safetensors")
    weights.write_bytes(corrupted(weights.read_bytes()))
    assert [check.right for check in known.verify()] == [True, False]
    (download,) = online.glob("*/model.pt")
    download.write_bytes(corrupted(download.read_bytes()))
    assert [check.right for check in known.verify("mine")] == [False, False]


def test_list_and_show_tell_everything_of_the_registry_that_ships(online):
    listed = told("list")
    for name, entry in SHIPPED.entries.items():
        assert name in listed
        assert name in told("show", name) or entry.weights.location in told("show", name)
    assert "photo unet any 0.05 to 0.5 shipped photo shipped" in listed
    assert "fare4-clip fare those of clip-vit-large-patch14 shipped" in listed
    assert "diffusion diffusion any 0.01 to 1 url 256x256_diffusion_uncond.pt shipped" in listed
    assert "trained for clip-vit-large-patch14 and are used unchanged" in told("show", "fare4-clip")
    shown = told("show", "diffusion")
    for fact in ("licence MIT", "size 2211383297", SHIPPED.purifiers["diffusion"].sha256):
        assert fact in shown
    assert "The registry has no entry 'nobody'" in told("show", "nobody", code=2)
