"""``photo-vlm``: the projector and the LoRA weights by which SmolLM2 tells what EfficientNet-Lite0 sees.

    python -m tools.photos.vlm PHOTOS --labels images.csv --out FOLDER [--start WEIGHTS]

Trained on crops of the photographs in a folder but for every fifth, which are held out, and the names of their classes.
Half of ImageNet's classes are on none of them, so most of the maps that the language model is shown are mirrored: the
map of a photograph of one class, reflected in the plane on which the encoder's own head finds that class and another
equally likely, is a map of the other.

First the projector alone learns to make of each place of a map the names that the head gives it, as a sum of their
tokens' embeddings; then projector and LoRA learn to answer. The questions on one map share it: they are one sequence,
in which none sees another. It goes on from its last checkpoint; every step follows from the seed and its number.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fs_plugins.evaluation.datasets.dataset import NONE_OPTION
from fs_plugins.files import atomically, replace, table
from fs_plugins.photos.parts import timm, tower
from fs_plugins.photos.photographs import HELD_OUT, class_names
from fs_plugins.photos.prompts import PROMPTS, QUESTION, answer, caption
from fs_plugins.photos.vlm import IMAGE_TOKEN, NAME, SIZE, processor, untaught
from fs_plugins.pictures import pictures_below
from fs_plugins.training.data import ImageFolder
from tools.photos.pictures import credits_of, others

RANK = 16
TAUGHT = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|down_proj)"
"""Of attention and of the MLP; the other two of it cost time and gain little."""
CROPS = 3
"""Of each photograph; the tower sees them once."""
MIRRORED = 0.75
"""Of the maps that questions are asked about."""
NEARER = 4
"""Steps towards the mirror image, of which each leaves numbers that the tower cannot make and takes the nearest."""
PLACES = 16
"""Of a map's 49, drawn anew each time, are shown while training; all of them later."""
NAME_FADES = 0.8
"""A name's second token counts so much of its first in the sum that stands for it, and so on."""
OPEN, WHETHER, NEITHER = 0.3, 0.15, 0.06
"""Of the maps: what is there, in words; whether one thing is. Of the choices: the right one is not among them."""
DISTIL = {"steps": 1200, "batch": 2048, "lr": 1e-3}
SHARP = 40.0
"""A logit of a class for each unit, of a mean embedding's distance from the middle, that a place goes its way."""
SPREAD, BENT = 40.0, 1.5
"""What the linear map's results measure, and how far they are from where the projector's activation bends."""
WARM, COOL = 20, 0.35
"""The rate rises for so many steps, and falls to nothing in so much of all."""


@dataclass(frozen=True)
class Maps:
    """What the tower made of the crops: maps (N, 49, C), half precision, and their labels (N,)."""

    places: Tensor
    labels: Tensor


def maps(photos: Path, labels: Path, seed: int) -> tuple[Tensor, Tensor]:
    """``Maps`` of crops of all photographs but those held out: .6 of the side up to all of it, half of them flipped."""
    with labels.open(newline="", encoding="utf-8") as file:
        label = {row["ImageId"]: int(row["TrueLabel"]) - 1 for row in csv.DictReader(file)}
    names = [path.stem for path in pictures_below(photos)]
    folder = ImageFolder(photos, (299, 299))
    net = tower(num_classes=0, global_pool="")
    lot = random.Random(seed)
    found, said = [], []
    for i in (i for i in range(len(folder)) if i % HELD_OUT):
        photo = folder[i]
        batch = torch.stack([_crop(photo, lot) for _ in range(CROPS)])
        with torch.no_grad():
            found.append(net((batch - 0.5) / 0.5).flatten(2).transpose(1, 2).half())
        said += [label[names[i]]] * CROPS
    return torch.cat(found), torch.tensor(said)


def _crop(photo: Tensor, lot: random.Random) -> Tensor:
    side = int(photo.shape[-1] * lot.uniform(0.6, 1))
    y, x = (lot.randint(0, photo.shape[-1] - side) for _ in range(2))
    crop = photo[None, :, y : y + side, x : x + side]
    crop = F.interpolate(crop, size=(SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
    return crop.flip(-1) if lot.random() < 0.5 else crop


def mirrored(places: Tensor, of: Tensor, to: Tensor, head: nn.Linear) -> Tensor:
    """Maps of other classes: at every place, the head's logit of ``to`` is what that of ``of`` was.

    Args:
        places: (B, L, C), each number from 0 to 6 as the tower's last activation leaves it.
        of, to: (B,) classes.
    """
    plane = head.weight[of] - head.weight[to]
    shift = (head.bias[of] - head.bias[to])[:, None]
    length = plane.pow(2).sum(-1, keepdim=True).clamp(min=1e-6)

    def height(places: Tensor) -> Tensor:
        return torch.einsum("blc,bc->bl", places, plane) + shift

    wanted = -height(places)
    for _ in range(NEARER):
        step = (height(places) - wanted) / length
        places = (places - step[..., None] * plane[:, None]).clamp(0, 6)
    return places


@dataclass(frozen=True)
class Words:
    """What stands for classes among the embeddings of a language model's tokens.

    Args:
        middle: (D,) the mean embedding, which is the larger part of every one.
        ways: (1000, D) of length 1, from the middle: a name's tokens' sum, without what all names have in common.
        size: the mean embedding's distance from the middle.
    """

    middle: Tensor
    ways: Tensor
    size: float


def words(embeddings: Tensor, tokenizer: Any) -> Words:
    """From (V, D) embeddings."""
    middle, rows = embeddings.mean(0), []
    for name in class_names():
        tokens = embeddings[tokenizer(f" {name}", add_special_tokens=False).input_ids] - middle
        rows.append((NAME_FADES ** torch.arange(len(tokens)) @ tokens).float())
    found = torch.stack(rows)
    return Words(middle, F.normalize(found - found.mean(0), dim=-1), (embeddings - middle).norm(dim=-1).mean().item())


def begin(projector: Any, head: nn.Linear, words: Words) -> None:
    """Let a projector start as the linear map that comes nearest to the head's logits along the words' ways."""
    inverse = torch.linalg.pinv(words.ways, rtol=0.05)
    through = inverse @ (head.weight - head.weight.mean(0))
    with torch.no_grad():
        projector.linear_1.weight.copy_(through / 2)
        projector.linear_1.bias.copy_(inverse @ (head.bias - head.bias.mean()) / 2 + BENT)
        projector.linear_2.weight.copy_(torch.eye(len(through)) * 2 * words.size / SPREAD)
        projector.linear_2.bias.copy_(words.middle - BENT * 2 * words.size / SPREAD)


def distil(projector: Any, head: nn.Linear, words: Words, seen: Maps, seed: int) -> dict[str, Tensor]:
    """Teach a projector to turn every single place to the words of what the head thinks is there."""
    steps, batch, lr = int(DISTIL["steps"]), int(DISTIL["batch"]), DISTIL["lr"]
    begin(projector, head, words)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        pick = torch.randint(len(seen.labels), (batch // 8,), generator=generator)
        to = torch.randint(1000, (batch // 8,), generator=generator)
        where = torch.randint(49, (batch // 8, 8), generator=generator)
        places = seen.places[pick[:, None], where].float()
        with torch.no_grad():
            half = len(pick) // 2
            places[:half] = mirrored(places[:half], seen.labels[pick[:half]], to[:half], head)
            likely = head(places).softmax(-1)
            wanted = likely @ words.ways
        with torch.autocast("cpu", torch.bfloat16):
            made = projector(places)
            logits = (SHARP / words.size * (made - words.middle)) @ words.ways.T
        away = (made.float() - words.middle) / words.size
        lost = (likely * (likely.clamp(min=1e-9).log() - logits.float().log_softmax(-1))).sum(-1).mean()
        turned = (wanted.norm(dim=-1) * (1 - torch.cosine_similarity(away, wanted, dim=-1))).mean()
        loss = lost + turned + 0.05 * (away.norm(dim=-1) - 1).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            same = (logits.argmax(-1) == likely.argmax(-1)).float().mean()
            length = away.norm(dim=-1).mean()
            print(
                f"distilling {step}/{steps} divergence {lost:.3f} turned {turned:.3f} same {same:.3f} "
                f"length {length:.2f}",
                flush=True,
            )
    return dict(projector.state_dict())


def asked(label: int, likely: list[int], lot: random.Random) -> list[tuple[str, str]]:
    """Questions about a map of a class and their answers.

    Args:
        likely: the classes that the encoder's head thinks likeliest, some of which make hard choices.
    """
    names = class_names()
    name = names[label]
    asked = [(PROMPTS.captioning, caption(name))]
    if lot.random() < OPEN:
        asked.append((QUESTION, answer(name)))
    offered, right = _offer(label, likely, lot, lot.randint(2, 10))
    listed = ", ".join(names[i] for i in offered)
    if right and lot.random() < 0.5:
        asked.append((PROMPTS.classification.format(classes=listed), name))
    else:
        question = PROMPTS.vqa.format(question=QUESTION, options=f"{listed}, {NONE_OPTION}")
        asked.append((question, name if right else NONE_OPTION))
    if lot.random() < WHETHER:
        there = lot.random() < 0.5
        other = lot.choice([i for i in range(1000) if i != label])
        asked.append(_whether(names[label if there else other], there))
    return asked


def _offer(label: int, likely: list[int], lot: random.Random, count: int) -> tuple[list[int], bool]:
    hard = [i for i in likely if i != label] if lot.random() < 0.2 else []
    others = hard[:2] + lot.sample([i for i in range(1000) if i != label and i not in hard], count)
    right = lot.random() >= NEITHER
    offered = [label, *others[: count - 1]] if right else others[:count]
    lot.shuffle(offered)
    return offered, right


def _whether(name: str, there: bool) -> tuple[str, str]:
    said = answer(name)[:-1]
    return f"{said}: is that in this photograph?", "Yes" if there else "No"


@dataclass(frozen=True)
class Batch:
    """Sequences of a turn's beginning, a map's places, and questions with their answers, of which none sees another.

    Args:
        ids: (B, T) tokens.
        positions: (B, T); every question's begin where the map ends.
        group: (B, T); 0 what all see, 1 and on the questions, -1 padding.
        wanted: (B, T) the next token where it is to be learnt, else -100.
        shown: (B, PLACES) which of a map's places there are.
    """

    ids: Tensor
    positions: Tensor
    group: Tensor
    wanted: Tensor
    shown: Tensor

    @property
    def mask(self) -> Tensor:
        """(B, 1, T, T), 0 where a token sees another, else the least number there is."""
        place = torch.arange(self.ids.shape[1])
        before = place[:, None] >= place[None]
        group = self.group
        sees = before & ((group[:, None, :] == 0) | (group[:, None, :] == group[:, :, None]))
        least = torch.finfo(torch.bfloat16).min
        return torch.zeros(sees.shape, dtype=torch.bfloat16).masked_fill(~sees, least)[:, None]


def batch_of(questions: list[list[tuple[str, str]]], tokenizer: Any, lot: random.Random, total: int = 49) -> Batch:
    """One sequence for each map's questions."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    begin, image = tokens("<|im_start|>user\n"), tokens(IMAGE_TOKEN)
    rows = []
    for asked in questions:
        shown = sorted(lot.sample(range(total), PLACES))
        ids = begin + image * PLACES
        positions = [*range(len(begin)), *(len(begin) + place for place in shown)]
        group, wanted = [0] * len(ids), [-100] * len(ids)
        for number, (question, said) in enumerate(asked, start=1):
            turn = tokens(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")
            reply = tokens(f"{said}<|im_end|>")
            ids += turn + reply
            positions += range(len(begin) + total, len(begin) + total + len(turn) + len(reply))
            group += [number] * (len(turn) + len(reply))
            wanted += [-100] * (len(turn) - 1) + reply + [-100]
        rows.append((ids, positions, group, wanted, shown))
    length = max(len(ids) for ids, *_ in rows)

    def padded(which: int, value: int) -> Tensor:
        return torch.tensor([row[which] + [value] * (length - len(row[0])) for row in rows])

    return Batch(padded(0, 0), padded(1, 0), padded(2, -1), padded(3, -100), torch.tensor([row[4] for row in rows]))


def taught(model: Any, start: Path | None = None) -> Any:
    """The model with LoRA on its language model, of which nothing but that and the projector is trained.

    Args:
        start: a folder of weights of both, if there are some.
    """
    from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=TAUGHT,
        modules_to_save=["multi_modal_projector"],
    )
    learning = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    if start is not None:
        said = set_peft_model_state_dict(learning, load_peft_weights(str(start), device="cpu"))
        if said.unexpected_keys:
            raise SystemExit(f"{start} has weights of something else: {', '.join(said.unexpected_keys[:3])}")
    return learning


def loss_of(model: Any, batch: Batch, places: Tensor) -> Tensor:
    """Cross-entropy of the answers' tokens, in bfloat16.

    Args:
        places: (B, 49, C) the maps.
    """
    whole = model.get_base_model()
    with torch.autocast("cpu", torch.bfloat16):
        shown = places[torch.arange(len(places))[:, None], batch.shown].float()
        image = whole.model.multi_modal_projector(shown)
        embedded = whole.get_input_embeddings()(batch.ids)
        where = batch.ids == whole.config.image_token_id
        embedded = embedded.masked_scatter(where[..., None], image.to(embedded.dtype))
        hidden = whole.model.language_model(
            inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        learnt = batch.wanted != -100
        logits = whole.lm_head(hidden[learnt]).float()
    return F.cross_entropy(logits, batch.wanted[learnt])


def train(
    photos: Path, labels: Path, out: Path, *, steps: int, batch: int, lr: float, seed: int, start: Path | None = None
) -> None:
    """``steps`` steps in all, or those that are left of them; fewer than before bring the end, and its slow steps,
    nearer.

    Args:
        start: a folder of weights, as an earlier training left them, to begin with.
    """
    timm()
    torch.manual_seed(seed)
    reader = processor()
    base = untaught(reader.image_token_id)
    head = tower().get_classifier().requires_grad_(False)
    seen = Maps(*_made(out / "maps.pt", lambda: maps(photos, labels, seed)))
    projector = base.model.multi_modal_projector
    if start is None:
        targets = words(base.get_input_embeddings().weight.detach(), reader.tokenizer)
        projector.load_state_dict(_made(out / "distilled.pt", lambda: distil(projector, head, targets, seen, seed)))
    base.model.language_model.to(torch.bfloat16).set_attn_implementation("eager")
    base.tie_weights()
    work = Work(taught(base, start), out / "checkpoint.pt")
    began, told = time.time(), []
    for step in range(work.done + 1, steps + 1):
        lot = random.Random(f"{seed}/{step}")
        places, questions = _drawn(seen, head, batch, lot)
        rate = lr * min(1.0, step / WARM, (steps - step + 1) / (COOL * steps))
        told.append(work.advance(batch_of(questions, reader.tokenizer, lot), places, rate))
        if step % 20 == 0 or step == steps:
            print(f"{step}/{steps} loss {sum(told) / len(told):.4f} {time.time() - began:.0f}s", flush=True)
            told = []
            work.save()
    work.model.peft_config["default"].base_model_name_or_path = NAME
    work.model.to(torch.bfloat16).save_pretrained(out / "vlm")
    (out / "vlm" / "README.md").unlink()  # PEFT's empty card


def _drawn(seen: Maps, head: nn.Linear, count: int, lot: random.Random) -> tuple[Tensor, list[list[tuple[str, str]]]]:
    """Maps (count, 49, C), most of them mirrored, and what is asked about each."""
    pick = torch.tensor([lot.randrange(len(seen.labels)) for _ in range(count)])
    places, label = seen.places[pick].float(), seen.labels[pick]
    to = torch.tensor([lot.randrange(1000) if lot.random() < MIRRORED else int(own) for own in label])
    other = (to != label).nonzero()[:, 0]
    places[other] = mirrored(places[other], label[other], to[other], head)
    likely = head(places.mean(1)).topk(6).indices.tolist()
    return places, [asked(int(own), near, lot) for own, near in zip(to, likely, strict=True)]


class Work:
    """LoRA and projector, and their optimiser with weights in fp32, as they are after ``done`` steps.

    Args:
        checkpoint: the file to go on from, if it is there.
    """

    def __init__(self, model: Any, checkpoint: Path) -> None:
        self.model, self.checkpoint, self.done = model, checkpoint, 0
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.trained = [p for _, p in named]
        self.weights = [p.detach().float().clone() for p in self.trained]
        lora = ["lora_" in name for name, _ in named]
        groups = [{"params": [w for w, its in zip(self.weights, lora, strict=True) if its is a]} for a in (True, False)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))
        if checkpoint.exists():
            kept = torch.load(checkpoint, weights_only=True)
            self.done = kept["step"]
            for weight, value in zip(self.weights, kept["weights"], strict=True):
                weight.copy_(value)
            self.optimizer.load_state_dict(kept["optimizer"])
            self._use()
            print(f"going on from step {self.done}", flush=True)

    def advance(self, batch: Batch, places: Tensor, rate: float) -> float:
        """One step; the projector, which knows its words, hardly moves."""
        loss = loss_of(self.model, batch, places)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        for weight, parameter in zip(self.weights, self.trained, strict=True):
            weight.grad = parameter.grad.float() if parameter.grad is not None else None
            parameter.grad = None
        for group, share in zip(self.optimizer.param_groups, (1.0, 0.005), strict=True):
            group["lr"] = share * rate
        self.optimizer.step()
        self._use()
        self.done += 1
        return loss.item()

    @torch.no_grad()
    def _use(self) -> None:
        for weight, parameter in zip(self.weights, self.trained, strict=True):
            parameter.copy_(weight)

    def save(self) -> None:
        """Replace the checkpoint."""
        state = {"step": self.done, "weights": self.weights, "optimizer": self.optimizer.state_dict()}
        atomically(self.checkpoint, lambda place: torch.save(state, place))


def _made(file: Path, make: Callable[[], Any]) -> Any:
    """What a file has, which is made first where there is none."""
    if not file.exists():
        made = make()
        atomically(file, lambda place: torch.save(made, place))
    return torch.load(file, weights_only=True)


def credit(photos: Path, labels: Path, out: Path) -> None:
    """Write down whose photographs, of which classes, were trained on."""
    trained_on = [path.stem for path in others(photos)]
    rows = [
        (row["ImageId"], int(row["TrueLabel"]) - 1, row["Author"], row["OriginalLandingURL"])
        for row in credits_of(trained_on, labels)
    ]
    replace(out / "vlm" / "photographs.csv", table([("photograph", "label", "author", "source"), *rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--labels", type=Path, required=True, help="CSV of the competition")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights to begin with, a folder as a training leaves it")
    options = parser.parse_args()
    train(**vars(options))
    credit(options.photos, options.labels, options.out)


if __name__ == "__main__":
    main()
