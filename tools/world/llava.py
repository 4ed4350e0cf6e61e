"""The small LLaVA: CLIP's frozen vision tower, a projector and a four-layer Llama."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from fs_plugins.demo import text, world
from tools.world.data import (
    TRAIN_SCENES,
    batches,
    normalise,
    pictures,
    schedule,
    update,
    write_image_processor,
)


def build_llava(clip_folder: Path) -> Any:
    """A LLaVA whose vision tower is the CLIP's, with a small Llama and a fresh projector."""
    from transformers import CLIPModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    clip = CLIPModel.from_pretrained(clip_folder)
    language = LlamaConfig(
        vocab_size=len(text.vocabulary()),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=language,
        image_token_index=text.SPECIAL.index(text.IMAGE),
        image_seq_length=(world.IMAGE_SIZE // 8) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    tower = {name.removeprefix("vision_model."): value for name, value in clip.vision_model.state_dict().items()}
    own = model.model.vision_tower
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in own.state_dict()) else ""
    own.load_state_dict({prefix + name: value for name, value in tower.items()})
    own.requires_grad_(False)
    model.generation_config.max_new_tokens = 16
    model.generation_config.do_sample = False
    return model


def questions_and_answers(scene: world.Scene) -> list[tuple[str, str]]:
    """All that is asked of a training scene: caption, class, and each question, open and multiple-choice."""
    label = str(scene.label) if scene.shape else world.NONE
    choices = [scene.question(about) for about in world.ATTRIBUTES]
    return [
        (world.CAPTION_PROMPT, scene.caption),
        (world.CLASS_PROMPT, label),
        *((world.QUESTIONS[about], getattr(scene, about) if scene.shape else world.NONE) for about in world.ATTRIBUTES),
        *((question.prompt, question.answer) for question in choices),
    ]


@dataclass
class Dialogues:
    """Several one-turn dialogues about each image in one row, as if each stood alone after the image.

    Token ids, labels (only on answers) and positions are (B, T); ``mask`` is (B, 1, T, T), additive: a token
    sees the image and its own dialogue.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    mask: Tensor

    @classmethod
    def of(cls, tokenizer: Any, facts: list[world.Scene]) -> Dialogues:
        before, after = text.prompt("{}").split(text.IMAGE)
        image = [text.SPECIAL.index(text.IMAGE)] * (world.IMAGE_SIZE // 8) ** 2
        prefix = tokenizer.encode(before).ids + image

        def words(sentence: str) -> list[int]:
            return tokenizer.encode(sentence, add_special_tokens=False).ids

        rows = []
        for scene in facts:
            ids, labels, positions, turn = (
                list(prefix),
                [-100] * len(prefix),
                list(range(len(prefix))),
                [0] * len(prefix),
            )
            for number, (question, answer) in enumerate(questions_and_answers(scene), start=1):
                head, tail = words(after.format(question)), [*words(answer), text.SPECIAL.index(text.EOS)]
                ids += head + tail
                labels += [-100] * len(head) + tail
                positions += range(len(prefix), len(prefix) + len(head + tail))
                turn += [number] * len(head + tail)
            rows.append((ids, labels, positions, turn))
        length = max(len(ids) for ids, *_ in rows)

        def padded(column: int, fill: int) -> Tensor:
            return torch.tensor([row[column] + [fill] * (length - len(row[column])) for row in rows])

        turns = padded(3, -1)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = (turns[:, None, :] == turns[:, :, None]) | (turns[:, None, :] == 0)
        mask = torch.zeros(len(rows), 1, length, length).masked_fill(
            ~(same & causal)[:, None], torch.finfo(torch.float32).min
        )
        return cls(padded(0, 0), padded(1, -100), padded(2, 0), mask)


def train_llava(clip_folder: Path, out: Path, cache: Path, steps: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = build_llava(clip_folder)
    tokenizer = text.build_tokenizer(append_eos=False)
    images = pictures("train", TRAIN_SCENES, cache)
    facts = world.scenes("train", TRAIN_SCENES)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.01, betas=(0.9, 0.98))
    scheduler = schedule(optimizer, steps, 100)
    began = time.time()
    for step, chosen in enumerate(batches(TRAIN_SCENES, batch, steps, seed + 1)):
        talk = Dialogues.of(tokenizer, [facts[i] for i in chosen.tolist()])
        core = model.model
        with torch.no_grad():
            seen = core.vision_tower(normalise(images[chosen]), output_hidden_states=True).hidden_states[-2][:, 1:]
        projected = core.multi_modal_projector(seen)
        embedded = core.get_input_embeddings()(talk.ids)
        at_image = (talk.ids == text.SPECIAL.index(text.IMAGE)).unsqueeze(-1).expand_as(embedded)
        embedded = embedded.masked_scatter(at_image, projected)
        hidden = core.language_model(
            inputs_embeds=embedded, attention_mask=talk.mask, position_ids=talk.positions, use_cache=False
        ).last_hidden_state
        wanted = talk.labels[:, 1:]
        asked = wanted != -100
        logits = model.lm_head(hidden[:, :-1][asked])
        loss = F.cross_entropy(logits, wanted[asked])
        update(loss, optimizer, scheduler)
        if step % 25 == 0 or step == steps - 1:
            right = (logits.argmax(-1) == wanted[asked]).float().mean().item()
            print(
                f"llava {step}/{steps} loss {loss.item():.3f} tokens right {right:.3f} {time.time() - began:.0f}s",
                flush=True,
            )
        if step % 300 == 299 or step == steps - 1:
            model.save_pretrained(out)
            use_public_names(out / "model.safetensors")
            write_llava_processor(out)


def use_public_names(path: Path) -> None:
    """Name the tower's weights as public LLaVA checkpoints do, so that transformers 4.57 and 5.x both load them."""
    inner, outer = "vision_tower.", "vision_tower.vision_model."
    weights = {
        outer + name.removeprefix(inner) if name.startswith(inner) and not name.startswith(outer) else name: value
        for name, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def write_llava_processor(out: Path) -> None:
    text.save_tokenizer(out, append_eos=False, model_max_length=512)
    write_image_processor(out, "LlavaProcessor")
    settings = {
        "processor_class": "LlavaProcessor",
        "patch_size": 8,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": text.IMAGE,
    }
    (out / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    (out / "chat_template.jinja").write_text(text.CHAT_TEMPLATE, "utf-8")
