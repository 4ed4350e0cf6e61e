"""Mean and std of a checkpoint however it was loaded: the right ones, or a word that nobody knows them."""

from __future__ import annotations

import json
import os
import shutil
import types
from pathlib import Path

import pytest
import torch
from support import knowing, make_psm
from test_families import FAMILIES
from torch import nn

import fs_plugins
from fs_plugins import FSPluginsWarning, PixelSpace, SettingError
from fs_plugins.attacks import attack
from fs_plugins.plugins import claim
from fs_plugins.training import TrainingConfig, robustness_score, train_psm

MEAN, STD = 0.3, 0.7
OTHER = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}
REPOSITORY = "somebody/something"
COMMIT, LATER = "a" * 40, "b" * 40
PLAIN = {"psm": None, "sigma": 0.25}
TRUTH = PixelSpace((MEAN,) * 3, (STD,) * 3)


def says(folder: Path, saved: dict | None = None) -> Path:
    """A folder with an image processor, as a rule the one that is true."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = saved or {"image_mean": [MEAN] * 3, "image_std": [STD] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(saved), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family -> its class, and a checkpoint without a processor, written once."""
    made: dict[str, tuple[type, Path]] = {}

    def of(family: str) -> tuple[type, Path]:
        if family not in made:
            model = FAMILIES[family][0]()
            folder = tmp_path_factory.mktemp("family")
            model.save_pretrained(folder)
            made[family] = (type(model), folder)
        return made[family]

    return of


class Place:
    """An empty directory, a hub cache in it, and this process in it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, monkeypatch
        root.mkdir(exist_ok=True)
        monkeypatch.chdir(root)
        monkeypatch.setattr(fs_plugins, "_began_in", str(root))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "cache"))
        # Until transformers 5 it has a copy of its own.
        monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(root / "cache"), raising=False)

    def folder(self, checkpoint: Path, name: str) -> Path:
        return Path(shutil.copytree(checkpoint, self.root / name))

    def snapshot(self, checkpoint: Path, cache: str = "cache", commit: str = COMMIT, *, main: bool = True) -> Path:
        home = self.root / cache / f"models--{REPOSITORY.replace('/', '--')}"
        (home / "refs").mkdir(parents=True, exist_ok=True)
        if main:
            (home / "refs" / "main").write_text(commit, encoding="utf-8")
        return Path(shutil.copytree(checkpoint, home / "snapshots" / commit))

    def leave(self) -> None:
        (self.root / "elsewhere").mkdir()
        self.patch.chdir(self.root / "elsewhere")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    return Place(tmp_path, monkeypatch)


def folder(kind, checkpoint, place):
    return kind.from_pretrained(says(place.folder(checkpoint, "model")))


def relative(kind, checkpoint, place):
    says(place.folder(checkpoint, "model"))
    return kind.from_pretrained("model")


def relative_and_chdir(kind, checkpoint, place):
    model = relative(kind, checkpoint, place)
    place.leave()
    return model


def subfolder(kind, checkpoint, place):
    says(place.folder(checkpoint, "model/step-5"))
    return kind.from_pretrained("model", subfolder="step-5")


def subfolder_of_one_processor(kind, checkpoint, place):
    place.folder(checkpoint, "model/step-5")
    says(place.root / "model")
    return kind.from_pretrained(place.root / "model", subfolder="step-5")


def among_its_own_checkpoints(kind, checkpoint, place):
    place.folder(checkpoint, "model")
    place.folder(checkpoint, "model/checkpoint-5")
    return kind.from_pretrained(says(place.root / "model"))


def hub(kind, checkpoint, place):
    says(place.snapshot(checkpoint))
    return kind.from_pretrained(REPOSITORY)


def revision(kind, checkpoint, place):
    says(place.snapshot(checkpoint, main=False))
    says(place.snapshot(checkpoint, commit=LATER), OTHER)
    return kind.from_pretrained(REPOSITORY, revision=COMMIT)


def a_folder_of_the_repositorys_name(kind, checkpoint, place):
    model = hub(kind, checkpoint, place)
    says(place.root / REPOSITORY, OTHER)
    return model


def cache_dir_and_the_same_commit_here(kind, checkpoint, place):
    place.snapshot(checkpoint, "disk")
    says(place.snapshot(checkpoint))
    return kind.from_pretrained(REPOSITORY, cache_dir=place.root / "disk")


KNOWN = [
    folder, relative, relative_and_chdir, subfolder, subfolder_of_one_processor, among_its_own_checkpoints, hub,
    revision, a_folder_of_the_repositorys_name, cache_dir_and_the_same_commit_here,
]  # fmt: skip


def chdir_before_we_began(kind, checkpoint, place):
    model = relative_and_chdir(kind, checkpoint, place)
    place.patch.setattr(fs_plugins, "_began_in", os.getcwd())
    return model


def chdir_to_another_of_its_name(kind, checkpoint, place):
    model = relative_and_chdir(kind, checkpoint, place)
    says(Path(shutil.copytree(checkpoint, "model")), OTHER)
    return model


def one_of_two_subfolders(kind, checkpoint, place):
    says(place.folder(checkpoint, "model/one"))
    says(place.folder(checkpoint, "model/two"), OTHER)
    return kind.from_pretrained(place.root / "model", subfolder="one")


def subfolder_beside_another_model(kind, checkpoint, place):
    says(place.folder(checkpoint, "model"), OTHER)
    says(place.folder(checkpoint, "model/tuned"))
    return kind.from_pretrained(place.root / "model", subfolder="tuned")


def cache_dir(kind, checkpoint, place):
    says(place.snapshot(checkpoint, "disk"))
    return kind.from_pretrained(REPOSITORY, cache_dir=place.root / "disk")


def cache_dir_and_another_commit_here(kind, checkpoint, place):
    says(place.snapshot(checkpoint, commit=LATER), OTHER)
    return cache_dir(kind, checkpoint, place)


def revision_without_its_processor(kind, checkpoint, place):
    place.snapshot(checkpoint, main=False)
    says(place.snapshot(checkpoint, commit=LATER), OTHER)
    return kind.from_pretrained(REPOSITORY, revision=COMMIT)


def no_processor(kind, checkpoint, place):
    return kind.from_pretrained(place.folder(checkpoint, "model"))


def damaged_processor(kind, checkpoint, place):
    folder = place.folder(checkpoint, "model")
    (folder / "preprocessor_config.json").write_text("{", encoding="utf-8")
    return kind.from_pretrained(folder)


def from_a_configuration(kind, checkpoint, place):
    return kind(kind.config_class.from_pretrained(place.folder(checkpoint, "model")))


UNKNOWN = [
    chdir_before_we_began, chdir_to_another_of_its_name, one_of_two_subfolders, subfolder_beside_another_model,
    cache_dir, cache_dir_and_another_commit_here, revision_without_its_processor, no_processor, damaged_processor,
    from_a_configuration,
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_knows_its_own_however_it_was_loaded(family, saved, tmp_path, monkeypatch):
    for load in KNOWN:
        model = load(*saved(family), Place(tmp_path / load.__name__, monkeypatch)).eval()
        for call in claim(model)[1]:
            assert (call.pixels.mean, call.pixels.std, call.pixels.assumed) == (TRUTH.mean, TRUTH.std, False), load
        fs_plugins.enable(model, **PLAIN).disable()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_where_it_does_not_know(family, saved, tmp_path, monkeypatch):
    for load in UNKNOWN:
        model = load(*saved(family), Place(tmp_path / load.__name__, monkeypatch)).eval()
        with pytest.warns(FSPluginsWarning, match=r"assumed are mean .*processor=") as told:
            handle = fs_plugins.enable(model, **PLAIN)
        assert len(told) == 1, load
        handle.disable()
        with pytest.raises(SettingError, match=r"assumed are mean .*another sigma"):
            fs_plugins.certify(model, [torch.rand(3, 16, 16)], n=60, **PLAIN)
        with fs_plugins.enable(model, **PLAIN, processor=TRUTH) as handle:
            assert handle.smoothers[0].call.pixels.std == TRUTH.std


# What sigma is in the end, and who is told.


def real_sigma(model: nn.Module, **settings) -> float:
    """The standard deviation, in [0, 1] pixels under the true normalisation, of the noise that an encoder sees."""
    seen: list[torch.Tensor] = []
    (smoother,) = fs_plugins.smoothers(model, **PLAIN, n0=64, noise="iid", seed=0, **settings)
    hook = smoother.call.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True
    )
    images = torch.full((1, 3, 16, 16), 0.5)
    smoother.smooth(images)
    hook.remove()
    return float((TRUTH.to_unit(torch.cat(seen)) - 0.5).std(dim=0).mean())


@pytest.mark.parametrize("family", ["SigLIP", "LLaVA with CLIP, two layers"])
@pytest.mark.parametrize("load", [folder, relative_and_chdir, subfolder, hub, revision])
def test_the_real_sigma_is_the_one_asked_for(family, load, saved, place):
    model = load(*saved(family), place).eval()
    assert real_sigma(model) == pytest.approx(0.25, rel=0.05)


def test_where_nobody_knows_the_real_sigma_is_another_unless_it_is_told(saved, place):
    model = cache_dir(*saved("SigLIP"), place).eval()
    with pytest.warns(FSPluginsWarning, match="assumed"):
        assert real_sigma(model) == pytest.approx(0.25 * STD / 0.5, rel=0.05)
    assert real_sigma(model, processor=TRUTH) == pytest.approx(0.25, rel=0.05)
    model.image_processor = types.SimpleNamespace(image_mean=MEAN, image_std=STD)
    assert real_sigma(model) == pytest.approx(0.25, rel=0.05), "one number for all channels"


@pytest.fixture
def unsure(llava) -> nn.Module:
    del llava.image_processor
    return llava


def test_what_only_serves_and_attacks_is_told_once(unsure, images):
    for verb in (
        lambda: fs_plugins.enable(unsure, **PLAIN).disable(),
        lambda: fs_plugins.smoothers(unsure, **PLAIN),
        lambda: attack(unsure, images, steps=1),
        lambda: attack(fs_plugins.vision_call(unsure), images, steps=1),
        lambda: attack(fs_plugins.smoothers(unsure, **PLAIN)[0], images, steps=1),
        lambda: robustness_score(unsure, None, images, 0.25, draws=1),
    ):
        with pytest.warns(FSPluginsWarning, match="assumed") as told:
            verb()
        assert len(told) == 1
        assert told[0].filename == __file__


def test_what_proves_or_trains_refuses_unless_it_is_told(unsure, images, tmp_path):
    with pytest.warns(FSPluginsWarning, match="assumed"):
        smoother = fs_plugins.smoothers(unsure, **PLAIN)[0]
    call = fs_plugins.vision_call(unsure)
    directions, config = torch.randn(2, 16 * 32), TrainingConfig()
    for verb in (
        lambda: fs_plugins.certify(unsure, images, n=60, **PLAIN, out=tmp_path / "rows.jsonl"),
        lambda: fs_plugins.certify(call, images, n=60, **PLAIN),
        lambda: fs_plugins.certify(smoother, images, n=60),
        lambda: fs_plugins.certify_predictions(unsure, images, directions, n=60, **PLAIN),
        lambda: fs_plugins.certify_predictions(smoother, images, directions, n=60),
        lambda: train_psm(unsure, images, config, name="x", encoder="x", out=tmp_path / "psm"),
        lambda: train_psm(call, images, config, name="x", encoder="x"),
    ):
        with pytest.raises(SettingError, match=r"assumed are mean .*processor=.*another sigma"):
            verb()
    assert not list(tmp_path.iterdir())
    space = PixelSpace((0.5,) * 3, (0.5,) * 3)
    assert len(fs_plugins.certify(unsure, images, n=60, **PLAIN, processor=space)) == 3
    told = fs_plugins.vision_call(unsure, processor=space)
    assert told.pixels.mean == (0.5,) * 3
    assert len(fs_plugins.certify(told, images, n=60, **PLAIN)) == 3


def test_a_smoothed_model_that_was_told_is_attacked_without_a_word(unsure, images):
    with fs_plugins.enable(unsure, **PLAIN, processor=TRUTH):
        attack(unsure, images, steps=1)


def test_encoders_of_one_model_are_told_of_once(saved, place):
    model = FAMILIES["Qwen2-VL"][0]()
    assert len(claim(model)[1]) == 1
    from test_families import video_llava

    video = video_llava()
    del video.image_processor
    with pytest.warns(FSPluginsWarning, match="assumed") as told:
        fs_plugins.enable(video, **PLAIN).disable()
    assert len(told) == 1


def test_a_part_of_a_model_does_not_know_what_the_whole_was_loaded_with(saved, place):
    model = folder(*saved("LLaVA with SigLIP"), place).eval()
    with pytest.warns(FSPluginsWarning, match="assumed"):
        fs_plugins.enable(model.model.vision_tower, **PLAIN).disable()


def test_other_frameworks_say_too_where_they_do_not_know(monkeypatch):
    from fs_plugins.adapters import openclip

    visual = types.SimpleNamespace(preprocess_cfg=None, image_size=8)
    assert openclip.pixel_space(visual, argument="x").assumed
    visual.preprocess_cfg = {"mean": 0.5, "std": (0.1, 0.2, 0.3)}
    known = openclip.pixel_space(visual, argument="x")
    assert (known.mean, known.std, known.assumed) == ((0.5,) * 3, (0.1, 0.2, 0.3), False)

    from fs_plugins.adapters import llava_original

    assert llava_original._pixel_space(types.SimpleNamespace(image_processor=None)).assumed
    processor = types.SimpleNamespace(image_mean=0.5, image_std=[0.5])
    found = llava_original._pixel_space(types.SimpleNamespace(image_processor=processor))
    assert (found.mean, found.std, found.assumed) == ((0.5,) * 3, (0.5,) * 3, False)


# Numbers of channels.


@pytest.mark.parametrize("given", [0.5, [0.5], (0.5,), torch.tensor(0.5).numpy(), torch.full((1,), 0.5).numpy()])
def test_one_number_is_every_channels(given, llava, images):
    processor = types.SimpleNamespace(image_mean=given, image_std=given)
    with fs_plugins.enable(llava, **PLAIN, processor=processor) as handle:
        pixels = handle.smoothers[0].call.pixels
        assert (pixels.mean, pixels.std) == ((0.5,) * 3, (0.5,) * 3)


def test_one_number_in_a_checkpoint_is_every_channels(saved, place):
    checkpoint = place.folder(saved("SigLIP")[1], "model")
    model = saved("SigLIP")[0].from_pretrained(says(checkpoint, {"image_mean": 0.5, "image_std": 0.25})).eval()
    assert fs_plugins.vision_call(model).pixels.std == (0.25,) * 3


def grey(family: str) -> nn.Module:
    """The family's model for pictures of one channel."""
    from test_families import LLAMA, QWEN, ROTARY, SIGLIP, TEXT, VISION, llava, make

    if family == "SigLIP":
        return make("SiglipModel", text_config=TEXT, vision_config={**SIGLIP, "num_channels": 1})
    if family == "LLaVA":
        return llava({**VISION, "model_type": "clip_vision_model", "num_channels": 1})
    assert LLAMA
    words = {key: value for key, value in ROTARY.items() if key != "model_type"}
    return make(
        "Qwen2VLForConditionalGeneration", text_config=words, vision_config={**QWEN, "in_channels": 1},
        image_token_id=30, video_token_id=31, vision_start_token_id=32, vision_end_token_id=33,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["SigLIP", "LLaVA", "Qwen2-VL"])
def test_an_encoder_of_one_channel_asks_for_its_processor_and_is_served_with_it(family, tmp_path):
    model = grey(family)
    with pytest.raises(SettingError, match=r"images of 1 channel\. Pass processor="):
        fs_plugins.enable(model, **PLAIN)
    assert not fs_plugins.status(model).enabled
    with pytest.raises(SettingError, match=r"for 3 channels .* have 1\. Pass processor="):
        fs_plugins.enable(model, **PLAIN, processor=TRUTH)
    processor = types.SimpleNamespace(image_mean=0.4, image_std=[0.6])
    images = torch.rand(2, 1, 16, 16)
    found = fs_plugins.certify(model, images, n=60, **PLAIN, processor=processor)
    assert len(found) == 2
    with fs_plugins.enable(model, **PLAIN, processor=processor) as handle, torch.no_grad():
        call = handle.smoothers[0].call
        assert (call.pixels.mean, call.pixels.std) == ((0.4,), (0.6,))
        argument, others = call.pixels.layout.still(call.pixels.from_unit(images, torch.float32))
        call.module(**{call.pixels.argument: argument, **others, **call.kwargs})
        assert handle.status().vision[0].images == 2
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(says(tmp_path, {"image_mean": 0.4, "image_std": 0.6})).eval()
    assert fs_plugins.vision_call(loaded).pixels.mean == (0.4,)
    loaded = type(model).from_pretrained(says(tmp_path)).eval()
    with pytest.raises(SettingError, match="images of 1 channel"):
        fs_plugins.enable(loaded, **PLAIN)


def test_purifiers_of_rgb_are_refused_before_the_first_call():
    model = grey("SigLIP")
    processor = types.SimpleNamespace(image_mean=0.4, image_std=0.6)
    psm = make_psm(fs_plugins.vision_call(knowing(FAMILIES["SigLIP"][0]())))
    for choice, why in (("auto", "No PSM in the registry fits"), ("photo", "RGB"), (psm, "RGB")):
        with pytest.raises(fs_plugins.FSPluginsError, match=why):
            fs_plugins.enable(model, psm=choice, processor=processor)
        assert not fs_plugins.status(model).enabled


def test_pixels_of_another_number_of_channels_name_the_processor(llava):
    with fs_plugins.enable(llava, **PLAIN), pytest.raises(fs_plugins.PixelError, match=r"3 channels \(.*processor="):
        llava.model.vision_tower(torch.rand(1, 1, 16, 16))


# Commands.


def run(*arguments: object) -> tuple[int, str]:
    from typer.testing import CliRunner

    from fs_plugins.cli import app

    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, " ".join(done.output.split())


def test_commands_refuse_what_nobody_knows_and_take_a_processor(tmp_path):
    from fs_plugins.demo import assets

    model = Path(shutil.copytree(assets.CLIP, tmp_path / "model"))
    (model / "preprocessor_config.json").unlink()
    certify = ("certify", "--model", model, "--scenes", 1, "--n", 60, "--psm", "none", "--sigma", 0.25, "--seed", 0)
    train = ("train", "--model", model, "--scenes", 20, "--held-out", 2, "--dry-run")
    train += ("--batch-size", 2, "--draws", 1, "--purifier-args", '{"channels": [8, 16]}')
    for command in ((*certify, "--out", tmp_path / "out"), train):
        code, told = run(*command)
        assert code == 2
        assert "Nobody knows how this model's pixels are normalised" in told
        assert "--processor" in told
    assert not (tmp_path / "out").exists()
    other = says(tmp_path / "processor")
    code, told = run(*certify, "--out", tmp_path / "told", "--processor", other)
    assert code == 0, told
    (rows,) = (tmp_path / "told").glob("*.jsonl")
    assert str(TRUTH.mean[0]) in rows.read_text(encoding="utf-8").splitlines()[0]
    assert run(*train, "--processor", other)[0] == 0
    code, told = run(*certify, "--out", tmp_path / "no", "--processor", tmp_path / "nowhere")
    assert (code, "Cannot load an image processor" in told) == (2, True)
