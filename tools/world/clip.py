"""The small CLIP: contrastive, with attribute heads on the patch tokens that are thrown away afterwards."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fs_plugins.demo import text, world
from fs_plugins.pictures import to_unit
from tools.world.data import (
    TRAIN_SCENES,
    batches,
    normalise,
    pictures,
    schedule,
    update,
    write_image_processor,
)


def build_clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    words = len(text.vocabulary())
    shared = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**shared, **ids, "num_hidden_layers": 2, "vocab_size": words, "max_position_embeddings": 24},
        vision_config={**shared, "num_hidden_layers": 4, "image_size": world.IMAGE_SIZE, "patch_size": 8},
        projection_dim=64,
    )
    return CLIPModel(config)


def train_clip(out: Path, cache: Path, steps: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = build_clip()
    heads = nn.ModuleList([nn.Linear(128, n) for n in (12, len(world.COLOURS), 2, 3)])
    tokenizer = text.build_tokenizer(append_eos=True)
    images = pictures("train", TRAIN_SCENES, cache)
    facts = world.scenes("train", TRAIN_SCENES)
    attributes = _attributes(facts)
    captions, caption_of = caption_labels(facts)
    ids, mask = _tokens(tokenizer, captions, 12)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = schedule(optimizer, steps, 100)
    began = time.time()
    for step, chosen in enumerate(batches(TRAIN_SCENES, batch, steps, seed)):
        output = model.vision_model(normalise(images[chosen]), output_hidden_states=True)
        image = F.normalize(model.visual_projection(output.pooler_output), dim=-1)
        unique, inverse = caption_of[chosen].unique(return_inverse=True)
        words = model.text_model(input_ids=ids[unique], attention_mask=mask[unique]).pooler_output
        words = F.normalize(model.text_projection(words), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ words.T
        to_text = F.cross_entropy(logits, inverse)
        same = F.one_hot(inverse, len(unique)).float()
        to_image = -(same / same.sum(0) * logits.log_softmax(0)).sum(0).mean()
        contrastive = (to_text + to_image) / 2
        patches = output.hidden_states[-2][:, 1:].mean(1)
        heads_loss = sum(
            F.cross_entropy(head(patches), attributes[chosen, i], ignore_index=-100) for i, head in enumerate(heads)
        )
        loss = contrastive + 0.5 * heads_loss
        update(loss, optimizer, scheduler)
        if step % 50 == 0 or step == steps - 1:
            right = (heads[0](patches).argmax(-1) == attributes[chosen, 0]).float().mean().item()
            print(
                f"clip {step}/{steps} contrastive {contrastive.item():.3f} heads {float(heads_loss):.3f} "
                f"text acc {(logits.argmax(1) == inverse).float().mean():.3f} shape(patches) {right:.3f} "
                f"{time.time() - began:.0f}s",
                flush=True,
            )
        if step % 250 == 249 or step == steps - 1:
            model.save_pretrained(out)
    write_clip_processor(out)
    print(json.dumps(zero_shot(model.eval(), 550)))


@torch.no_grad()
def zero_shot(model: Any, count: int) -> dict[str, float]:
    """Held-out zero-shot accuracy by shape name."""
    facts = [s for s in world.scenes("heldout", count) if s.shape]
    images = torch.stack([to_unit(s.draw()) for s in facts])
    image = F.normalize(model.visual_projection(model.vision_model(normalise(images)).pooler_output), dim=-1)
    words = class_directions(model)
    answers = (image @ words.T).argmax(-1)
    return {"zero_shot": (answers == torch.tensor([s.label for s in facts])).float().mean().item()}


@torch.no_grad()
def class_directions(model: Any) -> Tensor:
    """(11, E) unit text embeddings of the shapes, averaged over colours, sizes and places."""
    prompts = [
        f"a {size} {colour} {shape} {where}"
        for shape in world.CLASSES
        for colour in world.COLOURS
        for size in world.SIZES
        for where in ("on the left", "in the middle", "on the right")
    ]
    words = caption_directions(model, prompts)
    return F.normalize(words.view(len(world.CLASSES), -1, words.shape[-1]).mean(1), dim=-1)


def caption_labels(facts: list[world.Scene]) -> tuple[list[str], Tensor]:
    """The different captions of some scenes, and for each scene the index of its own."""
    captions = sorted({s.caption for s in facts})
    position = {c: i for i, c in enumerate(captions)}
    return captions, torch.tensor([position[s.caption] for s in facts])


@torch.no_grad()
def caption_directions(model: Any, captions: list[str]) -> Tensor:
    """(len(captions), E) unit text embeddings."""
    ids, mask = _tokens(text.build_tokenizer(append_eos=True), captions, 12)
    return F.normalize(
        model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output), dim=-1
    )


def _attributes(scenes: list[world.Scene]) -> Tensor:
    """(count, 4) class indices of shape, colour, size and side; -100 where the scene has none."""
    names = (world.CLASSES, tuple(world.COLOURS), tuple(world.SIZES), tuple(world.PLACES))
    rows = [
        [names[0].index(s.shape), names[1].index(s.colour), names[2].index(s.size), names[3].index(s.side)]
        if s.shape
        else [len(world.CLASSES), -100, -100, -100]
        for s in scenes
    ]
    return torch.tensor(rows)


def _tokens(tokenizer: Any, sentences: list[str], length: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(sentences), length, dtype=torch.long)
    for row, encoding in zip(ids, tokenizer.encode_batch(sentences), strict=True):
        row[: len(encoding.ids)] = torch.tensor(encoding.ids)
    return ids, (ids != 0).long()


def write_clip_processor(out: Path) -> None:
    text.save_tokenizer(out, append_eos=True, model_max_length=24)
    write_image_processor(out, "CLIPProcessor")
