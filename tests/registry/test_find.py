"""Which PSM an encoder gets, and by whose word."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from registering import SHIPPED, put_psm, write
from support import TinyEncoder, make_llava, make_psm, tiny_call

import fs_plugins
from fs_plugins import FSPluginsWarning, PSMError, RegistryError, hooks, registry
from fs_plugins.identity import fingerprint
from fs_plugins.plugins import known_encoders


def test_psm_auto_finds_an_encoder_by_what_it_is(llava, own, tmp_path):
    found = registry.Registry([write(tmp_path / "r.yaml", own)]).find(fs_plugins.vision_call(llava))
    assert (found.name, found.psm_name) == ("mine", "mine")
    half = copy.deepcopy(llava).bfloat16()
    assert registry.Registry([tmp_path / "r.yaml"]).find(fs_plugins.vision_call(half)).name == "mine"


def test_psm_auto_refuses_other_weights_other_readouts_and_other_sigmas(llava, own, tmp_path):
    known = registry.Registry([write(tmp_path / "r.yaml", own)])
    stranger = make_llava()
    with torch.no_grad():
        for p in stranger.model.vision_tower.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    for model, sigma in ((stranger, None), (make_llava(vision_feature_layer=-1), None), (llava, 0.5)):
        with pytest.raises(RegistryError, match="No PSM in the registry fits"):
            known.find(fs_plugins.vision_call(model), sigma)


def test_a_purifier_that_learnt_by_one_readout_serves_another_alone(llava, own, tmp_path):
    other = make_llava(vision_feature_layer=-1)
    other.model.vision_tower.load_state_dict(llava.model.vision_tower.state_dict())
    call = fs_plugins.vision_call(other)
    (mapped,) = own["encoders"]["mine"]["psms"]
    alone = mapped | {"readout": call.readouts[0].name, "mapped": False}
    own["encoders"]["mine"]["psms"].append(alone)
    known = registry.Registry([write(tmp_path / "r.yaml", own)])
    match = known.find(call)
    assert "by its purifier alone" in str(match)
    psm = known.load(match)
    assert (psm.mapped, psm.purifier is None) == ((), False)
    psm.check(call, 0.25)
    assert known.load(known.find(fs_plugins.vision_call(llava))).mapped == (mapped["readout"],)
    assert all(check.right for check in known.verify("mine"))
    alone["mapped"] = True
    wrong = registry.Registry([write(tmp_path / "wrong.yaml", own)]).verify("mine")
    assert [check.right for check in wrong] == [True, False]


def test_a_variant_is_asked_for_by_its_name(llava, own, tmp_path, monkeypatch):
    call = fs_plugins.vision_call(llava)
    (usual,) = own["encoders"]["mine"]["psms"]
    other = make_psm(call, name="hard")
    other.save_pretrained(tmp_path / "hard")
    hard = {"path": "hard", "sha256": registry.checksum(tmp_path / "hard"), "variant": "robust"}
    own["encoders"]["mine"]["psms"].insert(0, {**usual, **hard})
    known = registry.Registry([write(tmp_path / "r.yaml", own)])
    assert known.variants == ("robust",)
    assert known.find(call).psm.variant is None
    assert known.load(known.find(call, variant="robust")).config.name == "hard"
    monkeypatch.setenv("FS_PLUGINS_REGISTRY", str(tmp_path / "r.yaml"))
    with fs_plugins.enable(llava, psm="robust", seed=0) as handle:
        assert handle.smoothers[0].psm.config.name == "hard"
    with fs_plugins.enable(llava, seed=0) as handle:
        assert handle.smoothers[0].psm.config.name != "hard"
    with pytest.raises(RegistryError, match="No robust PSM in the registry fits this encoder"):
        fs_plugins.enable(make_llava(vision_feature_layer=-1), psm="robust")


def test_an_encoder_of_known_architecture_without_a_psm_is_told_so():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        model = CLIPVisionModel(
            CLIPVisionConfig(**SHIPPED.entries["llava-1.5"].architecture.model_dump(exclude={"family"}))
        )
    with pytest.raises(RegistryError, match=r"architecture of clip-vit-large-patch14-336, llava-1.5"):
        SHIPPED.find(fs_plugins.vision_call(model))


def test_a_robust_encoder_takes_the_vanilla_ones_psm_visibly(llava, own, tmp_path):
    robust = copy.deepcopy(llava)
    with torch.no_grad():
        for p in robust.model.vision_tower.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(9)) * 0.05)
    fare = copy.deepcopy(own["encoders"]["mine"]) | {"kind": "fare", "psm_of": "mine"}
    fare["fingerprint"] = list(fingerprint(robust.model.vision_tower))
    del fare["psms"]
    own["encoders"]["fare"] = fare
    match = registry.Registry([write(tmp_path / "r.yaml", own)]).find(fs_plugins.vision_call(robust))
    assert (match.name, match.psm_name) == ("fare", "mine")


def test_encoders_of_any_family_can_be_listed(own, tmp_path):
    call = tiny_call(TinyEncoder().eval())
    make_psm(call).save_pretrained(tmp_path / "psm")
    entry = own["encoders"]["mine"] | {
        "architecture": {"family": "tiny"},
        "fingerprint": list(fingerprint(call.module)),
    }
    entry["psms"][0] |= {"readout": "tokens", "sha256": registry.checksum(tmp_path / "psm")}
    known = registry.Registry([write(tmp_path / "r.yaml", {"version": 1, "encoders": {"tiny": entry}})])
    assert known.find(call).name == "tiny"
    with pytest.raises(RegistryError, match=r"tokens, None pixels|No PSM"):
        known.find(tiny_call(TinyEncoder(seed=1).eval()))


def test_the_first_file_wins_and_plugins_add_theirs(llava, own, tmp_path):
    other = copy.deepcopy(own)
    other["encoders"]["mine"]["kind"] = "tecoa"
    files = [write(tmp_path / "a.yaml", own), write(tmp_path / "b.yaml", other)]
    assert registry.Registry(files).entries["mine"].kind == "vanilla"
    assert registry.Registry(files[::-1]).entries["mine"].kind == "tecoa"


def test_a_name_belongs_to_the_first_file_whatever_it_is_there(tmp_path):
    hiding = {"version": 1, "purifiers": {"clip-vit-large-patch14": {"kind": "unet", "state": "not trained yet"}}}
    known = registry.Registry([write(tmp_path / "r.yaml", hiding), registry.shipped_path()])
    assert "clip-vit-large-patch14" not in known.entries
    assert known.psms("fare4-clip") == ()
    assert known.files["clip-vit-large-patch14"] == [tmp_path / "r.yaml", registry.shipped_path()]


def test_the_users_registry_comes_before_plugins_and_they_before_the_one_that_ships(
    online, manager, llava, own, tmp_path, monkeypatch
):
    call = fs_plugins.vision_call(llava)
    for name in ("user", "plugin"):
        make_psm(call, name=f"psm of the {name}").save_pretrained(tmp_path / name)
    user = put_psm(registry.user_path(), own, "demo-clip", tmp_path / "user")
    plugin = put_psm(tmp_path / "plugin.yaml", own, "demo-clip", tmp_path / "plugin")
    module = types.ModuleType("plugin")
    module.fs_registries = fs_plugins.hookimpl(lambda: [plugin])
    hooks.register(manager, module, "plugin")
    assert user == tmp_path / "config" / "fs-plugins" / "registry.yaml"
    assert known_encoders().files["demo-clip"] == [user, plugin, registry.shipped_path()]
    for expected in ("psm of the user", "psm of the plugin"):
        with fs_plugins.enable(llava) as handle:
            assert handle.status().vision[0].psm == expected
        user.unlink(missing_ok=True)
    user.parent.joinpath("elsewhere.yaml").touch()
    monkeypatch.setenv("FS_PLUGINS_REGISTRY", str(user.parent / "elsewhere.yaml"))
    assert known_encoders().files["demo-clip"] == [plugin, registry.shipped_path()], (
        "an empty file is an empty registry"
    )
    monkeypatch.setenv("FS_PLUGINS_REGISTRY", str(user.parent / "typing error.yaml"))
    with pytest.raises(RegistryError, match=r"Cannot read the registry .*typing error\.yaml"):
        known_encoders()


def test_two_psms_for_the_same_weights_the_first_wins_visibly(llava, own, tmp_path):
    call = fs_plugins.vision_call(llava)
    paths = []
    for name in ("first", "second"):
        make_psm(call, name=name).save_pretrained(tmp_path / name)
        paths.append(put_psm(tmp_path / f"{name}.yaml", own, name, tmp_path / name))
    known = registry.Registry(paths)
    match = known.find(call)
    assert (match.name, match.passed_over, match.file) == ("first", ("second",), paths[0])
    assert known.load(match).config.name == "first"
    assert (known.passed_over("first"), known.passed_over("second")) == ({}, {"first": ["hidden_states[-2][1:]"]})
    assert "first (by its fingerprint)" in str(match)
    assert str(match).endswith("passed over: second")
    assert registry.Registry(paths[::-1]).find(call).name == "second"


def test_a_match_says_whose_psm_a_robust_encoder_gets_and_how_sure_that_is(llava, own, tmp_path):
    call = fs_plugins.vision_call(llava)
    own["encoders"]["mine"]["fingerprint"] = [float(i) for i in range(16)]
    fare = {key: value for key, value in own["encoders"]["mine"].items() if key != "psms"}
    own["encoders"]["fare"] = fare | {"kind": "fare", "psm_of": "mine", "fingerprint": list(fingerprint(call.module))}
    match = registry.Registry([write(tmp_path / "r.yaml", own)]).find(call)
    assert str(match).startswith(
        "fare (by its fingerprint): PSM of mine, used unchanged, hidden_states[-2][1:], sigma 0.25"
    )
    own["encoders"]["fare"]["fingerprint"] = "unverified"
    match = registry.Registry([write(tmp_path / "r.yaml", own)]).find(call)
    assert not match.verified
    assert "architecture alone" in str(match)


def test_checksum_is_compared_before_anything_is_parsed(llava, own, tmp_path, monkeypatch):
    known = registry.Registry([write(tmp_path / "r.yaml", own)])
    match = known.find(fs_plugins.vision_call(llava))
    assert known.load(match).config.name == "random"
    (tmp_path / "psm" / "config.json").write_text((tmp_path / "psm" / "config.json").read_text("utf-8") + " ", "utf-8")
    monkeypatch.setattr(registry.PSM, "from_pretrained", lambda *_, **__: pytest.fail("parsed before it was verified"))
    with pytest.raises(PSMError, match="checksum"):
        known.load(match)


def test_a_psm_given_by_hand_for_a_lora_or_foreign_encoder_warns(llava, tmp_path):
    make_psm(fs_plugins.vision_call(llava), fingerprint=(1.0,) * 16).save_pretrained(tmp_path / "psm")
    with pytest.warns(FSPluginsWarning, match="measure it"):
        fs_plugins.enable(llava, psm=tmp_path / "psm")
