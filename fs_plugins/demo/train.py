"""Train the embedded world's models: ``python -m fs_plugins.demo.train clip|llava|psm``.

CLIP first, then LLaVA on CLIP's frozen vision tower, then the PSMs. Everything is seeded and
runs on a CPU; the folders written are the ones that ship.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import fs_plugins
from fs_plugins.demo import text, world
from fs_plugins.psm import PSM, Part
from fs_plugins.training import Stage, TrainingConfig, robustness_score, train_psm
from fs_plugins.training.data import to_unit

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TRAIN_SCENES = 50_000


def _draw(split: world.Split, index: int) -> np.ndarray:
    return np.asarray(world.scene(split, index).draw())


def pictures(split: world.Split, count: int, cache: Path | None = None) -> Tensor:
    """(count, 3, 64, 64) uint8. ``cache`` keeps the drawn pixels between runs."""
    if cache is not None and cache.exists():
        drawn = np.load(cache)
    else:
        with ProcessPoolExecutor() as pool:
            drawn = np.stack(list(pool.map(partial(_draw, split), range(count), chunksize=500)))
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            np.save(cache, drawn)
    return torch.from_numpy(drawn[:count]).permute(0, 3, 1, 2)


def normalise(images: Tensor) -> Tensor:
    """uint8 or [0, 1] images to what the towers see."""
    unit = images.float() / 255 if images.dtype == torch.uint8 else images
    return (unit - unit.new_tensor(MEAN).view(3, 1, 1)) / unit.new_tensor(STD).view(3, 1, 1)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


def schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


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


def _tokens(tokenizer: Any, sentences: list[str], length: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(sentences), length, dtype=torch.long)
    for row, encoding in zip(ids, tokenizer.encode_batch(sentences), strict=True):
        row[: len(encoding.ids)] = torch.tensor(encoding.ids)
    return ids, (ids != 0).long()


def train_clip(out: Path, cache: Path, steps: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = build_clip()
    heads = nn.ModuleList([nn.Linear(128, n) for n in (12, len(world.COLOURS), 2, 3)])
    tokenizer = text.build_tokenizer(append_eos=True)
    images = pictures("train", TRAIN_SCENES, cache)
    facts = world.scenes("train", TRAIN_SCENES)
    attributes = _attributes(facts)
    captions = sorted({s.caption for s in facts})
    position = {c: i for i, c in enumerate(captions)}
    caption_of = torch.tensor([position[s.caption] for s in facts])
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
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
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
    tokenizer = text.build_tokenizer(append_eos=True)
    facts = [s for s in world.scenes("heldout", count) if s.shape]
    images = torch.stack([torch.from_numpy(np.array(s.draw())) for s in facts]).permute(0, 3, 1, 2)
    image = F.normalize(model.visual_projection(model.vision_model(normalise(images)).pooler_output), dim=-1)
    prompts = [
        f"a {size} {colour} {shape} {where}"
        for shape in world.CLASSES
        for colour in world.COLOURS
        for size in world.SIZES
        for where in ("on the left", "in the middle", "on the right")
    ]
    ids, mask = _tokens(tokenizer, prompts, 12)
    words = model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)
    words = F.normalize(F.normalize(words, dim=-1).view(len(world.CLASSES), -1, words.shape[-1]).mean(1), dim=-1)
    answers = (image @ words.T).argmax(-1)
    return {"zero_shot": (answers == torch.tensor([s.label for s in facts])).float().mean().item()}


def write_clip_processor(out: Path) -> None:
    text.save_tokenizer(out, append_eos=True, model_max_length=24)
    _write_image_processor(out, "CLIPProcessor")


def _write_image_processor(out: Path, processor_class: str) -> None:
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": processor_class,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": world.IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": world.IMAGE_SIZE, "width": world.IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


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
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        if step % 25 == 0 or step == steps - 1:
            right = (logits.argmax(-1) == wanted[asked]).float().mean().item()
            print(
                f"llava {step}/{steps} loss {loss.item():.3f} tokens right {right:.3f} {time.time() - began:.0f}s",
                flush=True,
            )
        if step % 300 == 299 or step == steps - 1:
            model.save_pretrained(out)
            write_llava_processor(out)


def write_llava_processor(out: Path) -> None:
    text.save_tokenizer(out, append_eos=False, model_max_length=512)
    _write_image_processor(out, "LlavaProcessor")
    settings = {
        "processor_class": "LlavaProcessor",
        "patch_size": 8,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": text.IMAGE,
    }
    (out / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(text.CHAT_TEMPLATE)


class Scenes(Dataset[Tensor]):
    """Training pictures for a PSM: (3, 64, 64) floats in [0, 1]."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index].float() / 255


PURIFIER = Part(kind="unet", args={"channels": [64, 128], "layers": 1, "unshuffle": 4})
PURIFIER_STAGE = Stage(steps=2400, batch_size=16, draws=2, lr=1e-3, ema=0.99)
MAPPER_STAGE = Stage(steps=900, batch_size=16, draws=4, lr=2e-3)


def train_parts(what: str, assets: Path, cache: Path, steps: int | None, seed: int) -> None:
    """One of the demo's PSMs: the shared purifier (trained on LLaVA's readout), then a mapper for each readout."""
    from transformers import CLIPModel, LlavaForConditionalGeneration

    if what == "psm-clip":
        model = CLIPModel.from_pretrained(assets / "clip").eval()
    elif (assets / "llava" / "config.json").exists():
        model = LlavaForConditionalGeneration.from_pretrained(assets / "llava").eval()
    else:
        model = build_llava(assets / "clip").eval()
    stage = PURIFIER_STAGE if what == "purifier" else MAPPER_STAGE
    stage = replace(stage, steps=steps or stage.steps)
    config = TrainingConfig(
        sigma=0.25,
        purifier=None if what == "psm-llava-no-purifier" else PURIFIER,
        mapper=None if what == "purifier" else Part(kind="residual"),
        purifier_stage=stage,
        mapper_stage=stage,
        seed=seed,
    )
    start = PSM.from_pretrained(assets / "purifier") if what in ("psm-llava", "psm-clip") else None
    call = fs_plugins.vision_call(model)
    images = Scenes(pictures("train", TRAIN_SCENES, cache))
    began = time.time()

    def report(name: str, step: int, total: int, values: dict[str, float]) -> None:
        if step % 25 == 0 or step == total:
            shown = " ".join(f"{key} {value:.4f}" for key, value in values.items())
            print(f"{what} {name} {step}/{total} {shown} {time.time() - began:.0f}s", flush=True)

    encoder = "demo-clip"
    psm = train_psm(call, images, config, name=f"demo-{what}", encoder=encoder, start=start, report=report)
    psm.save_pretrained(assets / what)
    held = torch.stack([images_to_unit(s) for s in world.scenes("heldout", 110)])
    scores = {"plain noise": None, "purifier": psm.only(mapper=False), "mapper": psm.only(purifier=False), "both": psm}
    print(json.dumps({k: robustness_score(call, part, held, config.sigma) for k, part in scores.items()}, indent=2))


def images_to_unit(scene: world.Scene) -> Tensor:
    return to_unit(scene.draw())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ["purifier", "psm-llava", "psm-clip", "psm-llava-no-purifier"]
    parser.add_argument("what", choices=["clip", "llava", *parts])
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/world/train.npy"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    assets, cache, steps, seed = arguments.assets, arguments.cache, arguments.steps, arguments.seed
    if arguments.what == "clip":
        train_clip(assets / "clip", cache, steps or 2200, 128, seed)
    elif arguments.what == "llava":
        train_llava(assets / "clip", assets / "llava", cache, steps or 1300, 24, seed)
    else:
        train_parts(arguments.what, assets, cache, steps, seed)


if __name__ == "__main__":
    main()
