"""``photo-vlm``: a FastVLM of transformers, made of an encoder and a language model that pip can install.

EfficientNet-Lite0, untouched, says what is in each of 7 x 7 places of a photograph; a projector and LoRA weights, which
ship, were taught to tell SmolLM2-135M-Instruct. ``tools/photos/vlm.py`` trained them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fs_plugins import kept, sources
from fs_plugins.errors import OutputError, SettingError
from fs_plugins.files import filling, locked_file, writing
from fs_plugins.photos.parts import language_model_file, timm, tower, tower_file

NAME = "photo-vlm"
SHIPPED = Path(__file__).parent / "vlm"
"""Projector and LoRA weights, as PEFT writes them."""
IMAGE_TOKEN = "<image>"
SIZE = 224
PATCH = 32
"""The tower's map has one place for so many pixels, each way."""
_READERS = {"transformers.models.fast_vlm": "transformers 5", "peft": "peft", "gguf": "gguf"}
_RECIPE = 1
"""Goes up when ``assemble`` writes something else of the same parts."""
_PATIENCE = 1800.0
"""Seconds to wait for another process that assembles."""
_LATELY = 3600.0
"""A copy that was asked for within so many seconds may be about to be loaded."""
_SETTLED = 10.0
"""Seconds after which a change to a file is sure to give it another time."""
_KNOWN = f"{NAME}-parts.json"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""SmolLM2's turns, without the system's words that its own template puts first."""


def folder() -> Path:
    """The whole checkpoint, in the cache; assembled there at the first call, in about a minute.

    Raises:
        SettingError: the parts are not installed, or another process is at it for half an hour.
        OutputError: there is no room for it.
    """
    place = sources.cache() / f"{NAME}-{_parts()}"
    if not (place / kept.SUMS).is_file():
        with writing(place), locked_file(place, "the model", wait=_PATIENCE):
            if not (place / kept.SUMS).is_file():
                assemble(place)
                _remove_others(place)
    with suppress(OSError):  # a cache may be for reading only
        os.utime(place)
    return place


def _parts() -> str:
    """A digest of all that the checkpoint is made of."""
    _needed()
    digest = hashlib.sha256(str(_RECIPE).encode())
    for one in _digests((*sorted(SHIPPED.glob("adapter_*")), tower_file(), language_model_file())):
        digest.update(bytes.fromhex(one))
    return digest.hexdigest()[:16]


def _digests(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of files, which are read where the cache does not know it or they may have changed since."""
    listed = sources.cache() / _KNOWN
    known: dict[str, Any] = {}
    with suppress(SettingError):  # damaged, or not there yet
        known = kept.read(listed, "photo-vlm")
    told: dict[str, str] = {}
    sure: dict[str, Any] = {}
    for path in map(os.path.abspath, paths):
        found, now = os.stat(path), time.time()
        state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        before = known.get(path)
        if not isinstance(before, list) or before[:-1] != state:
            with open(path, "rb") as file:
                before = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
        told[path] = str(before[-1])
        if now - max(found.st_mtime, found.st_ctime) > _SETTLED:
            sure[path] = before
    if known | sure != known:
        with suppress(OutputError):
            kept.write(listed, known | sure)  # those of another environment's too
    return list(told.values())


def _remove_others(place: Path) -> None:
    """Copies made of other parts go, but for those that another process makes or may be about to load."""
    for left in place.parent.glob(f".{NAME}-*.gone"):
        shutil.rmtree(left, ignore_errors=True)
    for other in place.parent.glob(f"{NAME}-{'[0-9a-f]' * 16}"):
        if other != place:
            with suppress(OSError, SettingError), locked_file(other, "the model"):
                if time.time() - other.stat().st_mtime > _LATELY:
                    gone = other.with_name(f".{other.name}.gone")
                    os.replace(other, gone)  # at once: what is not whole would be taken for the model
                    shutil.rmtree(gone)


def assemble(place: str | os.PathLike[str], adapter: Path = SHIPPED) -> Path:
    """Write a checkpoint that ``from_pretrained`` of transformers loads without anything of ours; returns its folder.

    In fp32, half a gigabyte; the LoRA weights are in those of the language model.

    Args:
        place: the folder; SHA256SUMS is written last.
        adapter: what was taught, as ``tools/photos/vlm.py`` leaves it.

    Raises:
        SettingError: the parts are not installed.
        OutputError: it cannot be written.
    """
    root = Path(place)
    _needed()
    from peft import PeftModel

    reader = processor()
    model = PeftModel.from_pretrained(untaught(reader.image_token_id), adapter).merge_and_unload()
    with writing(root), filling(root) as fresh:
        model.save_pretrained(fresh)
        reader.save_pretrained(fresh)
        names = sorted(path.name for path in fresh.iterdir())
    kept.write_sums(root, names)
    return root


def tokenizer() -> Any:
    """SmolLM2's, with a token that stands for a place of an image.

    A GGUF says neither which of its tokens end a turn nor that digits stand alone.

    Raises:
        SettingError: the parts are not installed.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = _gguf()
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer
    read.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=read,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        additional_special_tokens=[IMAGE_TOKEN],
        clean_up_tokenization_spaces=False,
    )


def processor() -> Any:
    """What the model takes: text with ``IMAGE_TOKEN`` once for each image, and images of any size.

    Raises:
        SettingError: the parts are not installed.
    """
    timm()
    from transformers import CLIPImageProcessor, LlavaProcessor

    pixels = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        pixels,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def untaught(image_token_id: int) -> Any:
    """The FastVLM in fp32 before it was taught: tower and language model as installed, a projector of the seed's.

    Raises:
        SettingError: the parts are not installed.
    """
    timm()
    from transformers import AutoModelForCausalLM

    file = _gguf()
    language = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return joined(tower(num_classes=0, global_pool=""), language, image_token_id)


def joined(net: Any, language: Any, image_token_id: int) -> Any:
    """A FastVLM of a timm model without a head and a causal language model, whose tied embeddings get one row more.

    Args:
        net: whose maps (B, C, H, W) the language model is to see.
        image_token_id: the number of ``IMAGE_TOKEN``, the first that the language model does not know.
    """
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration

    text = language.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "dtype"):
        text.pop(name, None)
    record = {name: value for name, value in net.pretrained_cfg.items() if name != "num_classes"}
    vision = {
        "model_type": "timm_wrapper",
        "architecture": record["architecture"],
        "do_pooling": False,
        "hidden_size": net.num_features,
        "model_args": {"global_pool": ""},
        "pretrained_cfg": record,
    }
    config = FastVlmConfig(
        vision_config=vision,
        text_config={**text, "vocab_size": image_token_id + 1},
        image_token_index=image_token_id,
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config)
    model.model.vision_tower.timm_model.load_state_dict(net.state_dict())
    weights = language.model.state_dict()
    rows = weights["embed_tokens.weight"]
    # The mean row is never the likeliest next token.
    weights["embed_tokens.weight"] = torch.cat([rows[:image_token_id], rows.mean(0, keepdim=True)])
    model.model.language_model.load_state_dict(weights)
    model.tie_weights()
    model.generation_config.eos_token_id = language.config.eos_token_id
    model.generation_config.pad_token_id = language.config.eos_token_id
    return model.eval()


def _gguf() -> Path:
    _needed()
    return language_model_file()


def _needed() -> None:
    """Whether what reads the parts is installed; the parts say so themselves.

    Raises:
        SettingError: it is not.
    """
    timm()
    for package, told in _READERS.items():
        try:
            found = find_spec(package)
        except ImportError:
            found = None
        if found is None:
            raise SettingError(f'{told} is not installed: pip install "fs-plugins[photos]".')
