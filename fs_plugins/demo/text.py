"""The embedded world's tokenizer: whole words, one vocabulary for CLIP and for LLaVA."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from fs_plugins.demo.world import CAPTION_PROMPT, CLASS_PROMPT, CLASSES, COLOURS, NONE, PLACES, QUESTIONS, SIZES

PAD, BOS, UNK, EOS, IMAGE = "<pad>", "<s>", "<unk>", "</s>", "<image>"
SPECIAL = (PAD, BOS, UNK, EOS, IMAGE)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> list[str]:
    """Special tokens first, then every word and mark of the world's sentences, in sorted order."""
    sentences = [CAPTION_PROMPT, CLASS_PROMPT, NONE, "an empty background", *QUESTIONS.values(), *CLASSES, *COLOURS]
    sentences += [
        *SIZES,
        *PLACES,
        "a in the middle on the left",
        "USER: ASSISTANT:",
        "A. B. C. D. Answer with the letter only.",
    ]
    sentences.append(" ".join(str(i) for i in range(21)))
    words = {word for sentence in sentences for word in re.findall(r"\w+|[^\w\s]", sentence)}
    return [*SPECIAL, *sorted(words)]


def prompt(question: str) -> str:
    """What CHAT_TEMPLATE makes of one image and one question."""
    return f"USER: {IMAGE}\n{question} ASSISTANT:"


def build_tokenizer(*, append_eos: bool) -> Tokenizer:
    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tail = f" {EOS}" if append_eos else ""
    specials = [(BOS, words.index(BOS)), (EOS, words.index(EOS))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A{tail}", special_tokens=specials)
    return tokenizer


def save_tokenizer(folder: Path, *, append_eos: bool, model_max_length: int) -> None:
    """Write the tokenizer files by hand, so that transformers 4.57 and 5.x both load them."""
    build_tokenizer(append_eos=append_eos).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "pad_token": PAD,
        "bos_token": BOS,
        "unk_token": UNK,
        "eos_token": EOS,
        "image_token": IMAGE,
        "padding_side": "right" if append_eos else "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if not append_eos:
        settings["extra_special_tokens"] = {"image_token": IMAGE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
