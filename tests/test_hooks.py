from __future__ import annotations

import importlib.metadata
import json
import pickle
import re
import types
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import TinyEncoder, make_psm, plugin, tiny_call

import fs_plugins
from fs_plugins import ModelError, PluginError, RegistryError, SettingError, doctor, hooks
from fs_plugins.attacks import METHODS, Ascent, attack, known_attacks
from fs_plugins.evaluation.datasets import Dataset, Reader, open_dataset, sample_of
from fs_plugins.evaluation.judges import judge
from fs_plugins.plugins import known_encoders
from fs_plugins.psm import ResidualMapper, UNetPurifier


def test_fs_unclaimed_says_what_a_stranger_knows_of_a_model(manager):
    hooks.register(manager, plugin(fs_unclaimed=lambda model: "It is mine, and has no eyes."), "mine")
    with pytest.raises(ModelError, match="It is mine, and has no eyes"):
        fs_plugins.enable(torch.nn.Linear(2, 2).eval(), psm=None, sigma=0.25)


def test_fs_vision_call_is_told_whether_it_was_named_and_of_the_processor(manager):
    told = []
    hooks.register(
        manager, plugin(fs_vision_call=lambda processor, model, named: told.append((processor, named))), "mine"
    )
    model, processor = torch.nn.Linear(2, 2).eval(), object()
    for adapter in (None, "mine"):
        with pytest.raises(ModelError):
            fs_plugins.enable(model, psm=None, sigma=0.25, adapter=adapter, processor=processor)
    assert told == [(processor, False), (processor, True)]


def test_fs_vision_call_lets_a_stranger_claim_a_model(manager):
    def claim(model):
        return tiny_call(model) if isinstance(model, TinyEncoder) else None

    hooks.register(manager, plugin(fs_vision_call=claim), "tiny")
    encoder = TinyEncoder().eval()
    images = torch.rand(2, 3, 8, 8)
    pixels = tiny_call(encoder).pixels.from_unit(images, torch.float32)
    scale = torch.tensor([1.0, 2.0])
    with fs_plugins.enable(encoder, psm=make_psm(tiny_call(encoder))) as handle:
        served = encoder(pixels, scale=scale)
        assert served["tokens"].shape == (2, 4, 6)
        assert handle.status().vision[0].adapter == "tiny"
        keyword = encoder(pixel_values=pixels, scale=scale)
        assert keyword["extra"].shape == (2, 2)


def test_several_calls_per_model_are_each_smoothed(manager):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.video = TinyEncoder(1), TinyEncoder(2)

        def forward(self, pixel_values):
            return self.image(pixel_values)["tokens"] + self.video(pixel_values)["tokens"]

    def claim(model):
        return [tiny_call(model.image), tiny_call(model.video)] if isinstance(model, Two) else None

    hooks.register(manager, plugin(fs_vision_call=claim), "two")
    model = Two().eval()
    with fs_plugins.enable(model, psm=None, sigma=0.25) as handle:
        model(pixel_values=torch.zeros(1, 3, 8, 8))
        assert [v.calls for v in handle.status().vision] == [1, 1]


def test_an_encoder_called_with_other_names_is_an_error_never_unprotected(manager):
    def claim(model):
        if not isinstance(model, TinyEncoder):
            return None
        return tiny_call(model, pixels=replace(tiny_call(model).pixels, argument="images"))

    hooks.register(manager, plugin(fs_vision_call=claim), "tiny")
    encoder = TinyEncoder().eval()
    with fs_plugins.enable(encoder, psm=None, sigma=0.25):
        with pytest.raises(fs_plugins.PixelError, match=r"called with pixel_values and without images"):
            encoder(pixel_values=torch.zeros(1, 3, 8, 8))
        encoder(torch.zeros(1, 3, 8, 8))


def test_a_vision_module_that_is_no_part_of_the_model_is_refused(manager):
    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = [TinyEncoder()]

    hooks.register(
        manager,
        plugin(fs_vision_call=lambda model: tiny_call(model.tower[0]) if isinstance(model, Hidden) else None),
        "hidden",
    )
    model = Hidden().eval()
    with pytest.raises(PluginError, match="'hidden' points at a TinyEncoder that is no submodule of Hidden"):
        fs_plugins.enable(model, psm=None, sigma=0.25)
    assert not model.tower[0]._forward_pre_hooks


@pytest.mark.parametrize("answer", ["a string", [], [1]])
def test_an_adapter_that_answers_nonsense_is_named(manager, answer):
    hooks.register(manager, plugin(fs_vision_call=lambda model: answer), "nonsense")
    with pytest.raises(PluginError, match="'nonsense' must answer a VisionCall"):
        fs_plugins.vision_call(TinyEncoder())


def test_an_adapter_that_fails_is_named_with_the_way_out(manager):
    def fail(model):
        raise AttributeError("no such tower")

    hooks.register(manager, plugin(fs_vision_call=fail), "fragile")
    with pytest.raises(
        PluginError, match=r"'fragile' failed on TinyEncoder.*no such tower.*FS_PLUGINS_DISABLE=fragile"
    ):
        fs_plugins.vision_call(TinyEncoder())


def test_two_adapters_that_both_claim_are_an_error_unless_one_is_chosen(manager, llava):
    hooks.register(manager, plugin(fs_vision_call=lambda model: tiny_call(TinyEncoder())), "greedy")
    with pytest.raises(ModelError, match="greedy, hf_multimodal"):
        fs_plugins.vision_call(llava)
    assert fs_plugins.vision_call(llava, adapter="hf_multimodal").module is llava.model.vision_tower


def test_fs_purifiers_and_fs_mappers_are_found_by_kind(manager, tmp_path):
    class MyPurifier(UNetPurifier):
        pass

    class MyMapper(ResidualMapper):
        pass

    hooks.register(
        manager, plugin(fs_purifiers=lambda: {"mine": MyPurifier}, fs_mappers=lambda: {"my-mapper": MyMapper}), "parts"
    )
    parts = fs_plugins.plugins.plugin_parts()
    assert parts == {"purifiers": {"mine": MyPurifier}, "mappers": {"my-mapper": MyMapper}}
    call = tiny_call(TinyEncoder())
    base = make_psm(call).config
    config = base.model_copy(update={"purifier": base.purifier.model_copy(update={"kind": "mine"})})
    psm = fs_plugins.PSM(config, **parts)
    psm.save_pretrained(tmp_path / "psm")
    assert isinstance(fs_plugins.PSM.from_pretrained(tmp_path / "psm", **parts).purifier, MyPurifier)
    with pytest.raises(fs_plugins.PSMError, match="'mine'"):
        fs_plugins.PSM.from_pretrained(tmp_path / "psm")


@dataclass(frozen=True)
class Brighter:
    """An attack of a plugin: every picture becomes brighter, whatever it aims at."""

    name: str = "Brighter"
    optimiser: Ascent = field(default_factory=Ascent)

    def objective(self, victims, aims, stream, sign):
        return lambda images, step, draw: images.flatten(1).sum(1)


def test_fs_attacks_are_found_by_name(manager):
    hooks.register(manager, plugin(fs_attacks=lambda: {"brighter": Brighter(), "extra": METHODS["foa"]}), "bright")
    images = torch.full((2, 3, 8, 8), 0.5)
    attacked = attack(tiny_call(TinyEncoder()), images, method="brighter", eps=0.1, steps=3)
    assert torch.allclose(attacked, images + 0.1, atol=1e-2)
    assert known_attacks()["brighter"].name == "Brighter"
    assert list(known_attacks()) == [*METHODS, "brighter", "extra"]
    with pytest.raises(SettingError, match=r"no attack 'mine'.* square, brighter, extra\."):
        attack(tiny_call(TinyEncoder()), images, method="mine")


def test_fs_attacks_that_are_none_or_taken_are_refused(manager):
    hooks.register(manager, plugin(fs_attacks=lambda: {"foa": Brighter()}), "usurper")
    with pytest.raises(PluginError, match="'usurper' provides an attack 'foa', and so does fs_plugins itself"):
        known_attacks()
    manager.unregister(name="usurper")
    for nonsense in (0.5, Brighter, ("Brighter", Ascent())):
        hooks.register(manager, plugin(fs_attacks=lambda answer=nonsense: {"mine": answer}), "nonsense")
        with pytest.raises(PluginError, match=r"'nonsense' must answer fs_attacks with name -> an attack \(name, opt"):
            known_attacks()
        manager.unregister(name="nonsense")


def cards(root):
    """A plugin's layout: a line of cards.txt is a picture's name and what it shows."""
    lines = (root / "cards.txt").read_text("utf-8").splitlines()
    samples = tuple(sample_of(root, root / line.split()[0], label=line.split()[1]) for line in lines)
    return Dataset("cards", root, samples, ("ace", "king"))


def test_fs_datasets_are_read(manager, tmp_path):
    for name in ("1.png", "2.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "cards.txt").write_text("1.png ace\n2.png king\n", "utf-8")
    assert open_dataset(tmp_path).tasks == ("captioning",), "just pictures"
    hooks.register(manager, plugin(fs_datasets=lambda: {"cards": Reader(("cards.txt", "deck/"), cards)}), "cards")
    found = open_dataset(tmp_path)
    assert [sample.label for sample in found.samples] == ["ace", "king"]
    assert [found.target_path(sample).name for sample in found.samples] == ["2.png", "1.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match=r"problems\.json, cards\.txt, \*\.png"):
        open_dataset(tmp_path / "empty")
    (tmp_path / "samples.jsonl").write_text('{"image": "1.png", "target": "2.png"}\n', "utf-8")
    assert len(open_dataset(tmp_path).samples) == 1, "what a reader that ships recognises, it reads"


def test_fs_datasets_that_are_none_taken_or_in_doubt_are_refused(manager, tmp_path):
    (tmp_path / "cards.txt").write_text("", "utf-8")
    one, other = Reader(("cards.txt",), lambda root: None), Reader(("cards.txt",), cards)
    for answer, told in (
        ({"nips17": other}, "'mine' provides a reader 'nips17', and so does fs_plugins itself"),
        ({"cards": cards}, "'mine' must answer fs_datasets with name -> Reader; it answered"),
        ({"one": one, "other": other}, f"recognise {tmp_path}: one, other. Turn a plugin off with FS_PLUGINS_DISABLE"),
        ({"one": one}, f"The reader 'one' must read a Dataset; of {tmp_path} it read None"),
    ):
        hooks.register(manager, plugin(fs_datasets=lambda answer=answer: answer), "mine")
        with pytest.raises(PluginError, match=re.escape(told)):
            open_dataset(tmp_path)
        manager.unregister(name="mine")


class Mine:
    """A judge of a plugin."""

    def __init__(self, value: float = 0.5):
        self.name, self.value = f"mine({value})", value

    def scores(self, pairs):
        yield from (self.value for _ in pairs)


def test_fs_judges_are_found_by_name(manager):
    hooks.register(manager, plugin(fs_judges=lambda: {"mine": Mine}), "judges")
    made = judge("mine", value=0.25)
    assert made.name == "mine(0.25)"
    assert list(made.scores([("a", "b"), ("c", "d")])) == [0.25, 0.25]
    assert judge("exact").name == "exact"
    with pytest.raises(SettingError, match=r"no judge 'mein'.* endpoint, exact, mine, similarity\."):
        judge("mein")
    with pytest.raises(SettingError, match=r"'mine'.*'values'.*It takes value; got values\."):
        judge("mine", values=1)


def test_a_judges_name_has_one_meaning(manager):
    hooks.register(manager, plugin(fs_judges=lambda: {"mine": Mine}), "first")
    hooks.register(manager, plugin(fs_judges=lambda: {"mine": Mine}), "second")
    with pytest.raises(PluginError, match=r"'(first|second)' provides a judge 'mine', and so does (first|second)"):
        judge("exact")
    manager.unregister(name="second")
    assert judge("mine").name == "mine(0.5)"
    hooks.register(manager, plugin(fs_judges=lambda: {"exact": Mine}), "usurper")
    with pytest.raises(PluginError, match="'usurper' provides a judge 'exact', and so does fs_plugins itself"):
        judge("exact")


def fail():
    raise AttributeError("no such court")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda: [Mine], r"'court' must answer fs_judges with name -> factory; it answered \[<class"),
        (lambda: {"mine": 0.5}, r"'court' must answer fs_judges with name -> factory; it answered \{'mine': 0.5\}"),
        (lambda: {"mine": dict}, r"'mine' is a dict; it must have a name and scores\(pairs\)"),
        (fail, "'court' failed to name its judges: AttributeError: no such court.*FS_PLUGINS_DISABLE=court"),
    ],
)
def test_judges_that_are_none_are_refused(manager, answer, told):
    hooks.register(manager, plugin(fs_judges=answer), "court")
    with pytest.raises(PluginError, match=told):
        judge("mine")


def test_fs_registries_add_entries(manager, tmp_path):
    shipped = Path(fs_plugins.registry.shipped_path()).read_text(encoding="utf-8")
    (tmp_path / "more.yaml").write_text(shipped.replace("  llava-1.5:", "  mine:"), "utf-8")
    hooks.register(manager, plugin(fs_registries=lambda: [tmp_path / "more.yaml"]), "more")
    assert "mine" in known_encoders().entries


def entry_of(**architecture):
    """A registry file's text with one encoder of another family."""
    psm = {"readout": "tokens", "state": "not trained yet"}
    entry = {
        "kind": "mine",
        "architecture": architecture,
        "weights": {"source": "hub", "location": "someone/eye"},
        "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "fingerprint": "unverified",
        "psms": [psm],
    }
    return json.dumps({"version": 1, "encoders": {"mine": entry}})


def test_fs_encoder_families_say_what_a_registry_has_to_tell(manager, monkeypatch, tmp_path):
    path = tmp_path / "mine.yaml"
    monkeypatch.setenv("FS_PLUGINS_REGISTRY", str(path))
    path.write_text(entry_of(family="eye", lenses=2), "utf-8")
    assert "mine" in known_encoders().entries, "a family that nobody describes is taken as it is"
    eye = plugin(fs_encoder_families=lambda: {"eye": {"lenses": int, "glass": str}})
    hooks.register(manager, eye, "eye")
    path.write_text(entry_of(family="eye", lenses=2, glass="flint"), "utf-8")
    assert known_encoders().entries["mine"].architecture.model_dump()["glass"] == "flint"
    for wrong in ({"lenses": 2}, {"lenses": 2, "glass": 3}, {"lenses": 2, "glass": "flint", "colour": "red"}):
        path.write_text(entry_of(family="eye", **wrong), "utf-8")
        with pytest.raises(RegistryError, match=r"(glass|colour): eye has lenses \(a number\), glass \(a word\)"):
            known_encoders()


def test_fs_encoder_families_that_are_none_or_taken_are_refused(manager):
    for answer, told in (
        ({"clip_vision": {"width": int}}, "'mine' provides an architecture 'clip_vision', and so does hf_clip"),
        (
            {"eye": {"width": float}},
            "'mine' must answer fs_encoder_families with name -> what it says, each int or str",
        ),
    ):
        hooks.register(manager, plugin(fs_encoder_families=lambda answer=answer: answer), "mine")
        with pytest.raises(PluginError, match=told):
            known_encoders()
        manager.unregister(name="mine")


def test_fs_packages_are_listed_by_doctor(monkeypatch):
    module = plugin(fs_packages=lambda: ["pluggy", "flux-capacitor"])
    point = types.SimpleNamespace(name="mine", value="mine", dist=None, load=lambda: module)
    monkeypatch.setattr(doctor, "entry_points", lambda group: [point])
    found = doctor.frameworks()
    assert found["pluggy"] == importlib.metadata.version("pluggy")
    assert found["flux-capacitor"] is None
    assert "transformers" not in found, "only what plugins are for"


def test_fs_after_smoothing_observes_every_call(manager, llava, images):
    from support import llava_inputs

    seen = []
    hooks.register(manager, plugin(fs_after_smoothing=lambda event: seen.append(event)), "watch")
    with fs_plugins.enable(llava, psm=None, sigma=0.25, n0=3), torch.no_grad():
        pickle.dumps(llava)
        llava(**llava_inputs(images))
    (event,) = seen
    assert (event.adapter, event.images, event.n0, event.sigma, event.non_finite) == ("hf_multimodal", 3, 3, 0.25, 0)
    assert event.seconds > 0


def test_a_misspelled_hook_is_refused_with_both_sides(manager):
    with pytest.raises(PluginError, match=r"fs_vision_cal(.|\n)*fs_vision_call"):
        hooks.register(manager, plugin(fs_vision_cal=lambda model: None), "typo")
    assert not manager.has_plugin("typo")


def test_a_hook_with_an_unknown_argument_is_refused_with_both_sides(manager):
    with pytest.raises(PluginError, match="modell"):
        hooks.register(manager, plugin(fs_vision_call=lambda modell: None), "typo")


class Broken:
    """An installed plugin whose module does not import."""

    name, value, group = "broken", "broken_plugin", hooks.GROUP
    dist = types.SimpleNamespace(name="fs-plugins-broken")

    def load(self):
        raise ImportError("No module named 'flux_capacitor'")


@pytest.fixture
def broken(monkeypatch):
    real = importlib.metadata.entry_points
    monkeypatch.setattr(hooks, "entry_points", lambda group: [*real(group=group), Broken()])
    hooks.plugin_manager.cache_clear()
    yield
    hooks.plugin_manager.cache_clear()


def test_a_plugin_that_fails_to_import_is_named_with_the_way_out(broken, monkeypatch, llava):
    with pytest.raises(PluginError, match=r"'broken'.*fs-plugins-broken.*flux_capacitor.*FS_PLUGINS_DISABLE=broken"):
        fs_plugins.enable(llava, psm=None, sigma=0.25)
    monkeypatch.setenv("FS_PLUGINS_DISABLE", "broken, other")
    assert fs_plugins.vision_call(llava) is not None


def test_plugins_can_be_turned_off(monkeypatch, llava):
    monkeypatch.setenv("FS_PLUGINS_DISABLE", "hf_multimodal")
    hooks.plugin_manager.cache_clear()
    with pytest.raises(ModelError, match="hf_clip"):
        fs_plugins.vision_call(llava)
    monkeypatch.undo()
    hooks.plugin_manager.cache_clear()


def specifications() -> dict:
    return {name: f for name, f in vars(hooks).items() if name.startswith("fs_")}


@pytest.mark.parametrize("name", list(specifications()))
def test_every_hook_is_documented_and_has_a_test_of_its_own(name):
    hook = specifications()[name]
    doc = hook.__doc__ or ""
    assert "versionadded" in doc
    for argument in hook.__code__.co_varnames[: hook.__code__.co_argcount]:
        assert f":param {argument}:" in doc
    assert re.search(rf"^def test_{name}|^def test_.*{name}", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE)
    docs = Path(__file__).parent.parent / "docs" / "reference" / "hooks.md"
    arguments = ", ".join(hook.__code__.co_varnames[: hook.__code__.co_argcount])
    assert f"| `{name}({arguments})` |" in docs.read_text("utf-8")
