from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_llava, make_psm

import fs_plugins
from fs_plugins import FSPluginsWarning, PSMError, RegistryError, registry
from fs_plugins.identity import fingerprint

SHIPPED = registry.shipped()
DATA = yaml.safe_load(registry.shipped_path().read_text())


def write(path: Path, data: object) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def own(llava, tmp_path) -> dict:
    """A registry entry for the test's LLaVA with a PSM beside the file."""
    call = fs_plugins.vision_call(llava)
    make_psm(call).save_pretrained(tmp_path / "psm")
    entry = copy.deepcopy(DATA["encoders"]["demo-clip"])
    entry |= {"architecture": dict(call.architecture), "fingerprint": list(fingerprint(call.module))}
    entry["psms"] = [
        {
            "readout": call.readouts[0].name,
            "state": "shipped",
            "sigma": 0.25,
            "path": "psm",
            "sha256": registry.checksum(tmp_path / "psm"),
        }
    ]
    return {"version": 1, "encoders": {"mine": entry}}


@pytest.mark.parametrize("name", list(SHIPPED.entries))
def test_every_entry_builds_on_the_meta_device_with_its_psms_readouts(name):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    entry = SHIPPED.entries[name]
    facts = entry.architecture.model_dump(exclude={"family"})
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**facts)).eval()
        size = entry.architecture.image_size
        output = model(torch.zeros(1, 3, size, size), output_hidden_states=True)
    assert dict(fs_plugins.vision_call(model).architecture) == entry.architecture.model_dump()
    tokens = (size // entry.architecture.patch_size) ** 2
    width = entry.architecture.hidden_size
    shapes = {
        "pooler_output": (output.pooler_output, (1, width)),
        "hidden_states[-2][1:]": (output.hidden_states[-2][:, 1:], (1, tokens, width)),
        "tokens": (output.last_hidden_state[:, 1:], (1, tokens, width)),
    }
    for psm in SHIPPED.entries[entry.psm_of or name].psms:
        tensor, shape = shapes[psm.readout]
        assert tuple(tensor.shape) == shape


def test_the_registry_names_what_the_paper_uses():
    assert {
        "clip-vit-base-patch16",
        "clip-vit-large-patch14",
        "clip-vit-large-patch14-336",
        "llava-1.5",
        "openflamingo-9b",
    } <= set(SHIPPED.entries)
    for name in ("fare2-clip", "fare4-clip", "tecoa2-clip", "tecoa4-clip"):
        assert SHIPPED.entries[name].psm_of == "clip-vit-large-patch14", "robust encoders use the vanilla one's PSM"
        assert SHIPPED.entries[name].weights.location == f"chs20/{name}"


def test_public_towers_have_their_known_parameter_counts():
    """Counts that the public checkpoints are known by, so that a wrong width cannot slip in."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    known = {"clip-vit-base-patch16": 85_799_424, "clip-vit-large-patch14": 303_179_776, "llava-1.5": 303_507_456}
    for name, count in known.items():
        with torch.device("meta"):
            facts = SHIPPED.entries[name].architecture.model_dump(exclude={"family"})
            assert sum(p.numel() for p in CLIPVisionModel(CLIPVisionConfig(**facts)).parameters()) == count


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


def test_checksum_is_compared_before_anything_is_parsed(llava, own, tmp_path, monkeypatch):
    known = registry.Registry([write(tmp_path / "r.yaml", own)])
    match = known.find(fs_plugins.vision_call(llava))
    assert known.load(match).config.name == "random"
    (tmp_path / "psm" / "config.json").write_text((tmp_path / "psm" / "config.json").read_text() + " ")
    monkeypatch.setattr(registry.PSM, "from_pretrained", lambda *_, **__: pytest.fail("parsed before it was verified"))
    with pytest.raises(PSMError, match="checksum"):
        known.load(match)


def test_the_first_file_wins_and_plugins_add_theirs(llava, own, tmp_path):
    other = copy.deepcopy(own)
    other["encoders"]["mine"]["kind"] = "tecoa"
    files = [write(tmp_path / "a.yaml", own), write(tmp_path / "b.yaml", other)]
    assert registry.Registry(files).entries["mine"].kind == "vanilla"
    assert registry.Registry(files[::-1]).entries["mine"].kind == "tecoa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.update(version=2), "version"),
        (lambda d: d["encoders"]["demo-clip"].update(wieghts=1), "wieghts"),
        (lambda d: d["encoders"]["demo-clip"]["architecture"].update(patch_size="big"), "patch_size"),
        (lambda d: d["encoders"]["demo-clip"].update(fingerprint="probably fine"), "fingerprint"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].update(state="perhaps"), "state"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].pop("sha256"), "needs sigma, path and sha256"),
        (lambda d: d["encoders"]["llava-1.5"]["psms"][0].update(sigma=0.25), "not trained yet"),
        (lambda d: d["encoders"]["fare2-clip"].update(psm_of="nobody"), "nobody"),
        (lambda d: d["encoders"]["fare2-clip"].pop("psm_of"), "either psms or psm_of"),
    ],
)
def test_schema_violations_are_refused_with_their_place(tmp_path, change, message):
    data = copy.deepcopy(DATA)
    change(data)
    with pytest.raises(RegistryError, match=message):
        registry.load(write(tmp_path / "r.yaml", data))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(RegistryError, match="Cannot read"):
        registry.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("encoders: [")
    with pytest.raises(RegistryError, match="not YAML"):
        registry.load(tmp_path / "bad.yaml")


def test_a_psm_given_by_hand_for_a_lora_or_foreign_encoder_warns(llava, tmp_path):
    make_psm(fs_plugins.vision_call(llava), fingerprint=(1.0,) * 16).save_pretrained(tmp_path / "psm")
    with pytest.warns(FSPluginsWarning, match="measure it"):
        fs_plugins.enable(llava, psm=tmp_path / "psm")
