"""An evaluation's folder, written by hand, and its report's page as a tree."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fs_plugins.certificates import Certificate
from fs_plugins.certificates.ledger import File, Row
from fs_plugins.evaluation.captions import captions
from fs_plugins.evaluation.datasets import open_dataset
from fs_plugins.evaluation.judges import ExactMatch
from fs_plugins.evaluation.plan import Plan, Setup, fixed
from fs_plugins.evaluation.record import Record
from fs_plugins.evaluation.report import write
from fs_plugins.evaluation.results import Results
from fs_plugins.evaluation.store import Store
from fs_plugins.evaluation.suites import CLEAN, FOA, FS, FS_PSM, NONE, TARGET, Condition, Defence, Suite

FARE = Defence("fare", "FARE", "fare")
ADAPTIVE = Condition("foa", 16, adaptive=True)
SUITES = (
    Suite("asked", "Classes & attacks", "classification", (NONE, FS_PSM, FARE), (FOA,)),
    Suite("adaptive", "Through the defence", "classification", (FS_PSM, FS), (ADAPTIVE,), plain=False),
    Suite("said", "Captions", "captioning", (NONE,), (FOA,)),
    Suite("sure", "Certified", None, (FS_PSM,), certified=True, sigmas=(0.25,)),
    Suite("vqa", "Questions", "vqa", (NONE,), (FOA,)),
)
EVIL = "<script>alert('owned')</script>"
REPLIES = {
    # The classes are 0. cat, 1. dog, 2. shark; the pictures show a cat, a dog, a cat.
    (NONE, CLEAN): ["0", "1", "2"],
    (NONE, FOA): ["2", EVIL, "0"],
    (FS_PSM, CLEAN): ["0", "1", "0"],
    (FS_PSM, FOA): ["0", "", "2"],
    (FARE, CLEAN): ["0", "1", "0"],
    (FARE, FOA): ["0", "0", "0"],
    (FS_PSM, ADAPTIVE): ["2", "0"],
    (FS, ADAPTIVE): ["0", "1"],
}
CAPTIONS = {CLEAN: ["a cat", "a dog", "a cat"], FOA: ["a shark", "a dog", "a fish"], TARGET: ["a shark"] * 3}
NAMES = [f"images/{i}.png" for i in range(3)]
CERTIFIED = [Certificate.from_scores([level] * 200, sigma=0.25, unrelated=0.2) for level in (0.9, 0.95)]


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 180, (8, 8, 3), dtype=np.uint8)


def unit(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255


def shifted(picture: np.ndarray, by: int) -> np.ndarray:
    return (picture.astype(int) + by).astype(np.uint8)


def make(
    folder: Path,
    *,
    suites=SUITES,
    tasks=("captioning", "classification"),
    notes=("No <tecoa> tower.", "No <tecoa> tower."),
    purified=False,
) -> Results:
    """An evaluation that has run. On the model's own encoder attacks add 2 to every pixel, through FS-PSM they take 40.

    What is kept as purified is the negative.
    """
    data = folder / "data"
    (data / "images").mkdir(parents=True)
    samples = []
    for i, label in enumerate(("cat", "dog", "cat")):
        Image.fromarray(pixels(i)).save(data / NAMES[i])
        samples.append({"image": NAMES[i], "target": NAMES[i - 1], "label": label, "caption": f"a {label}"})
    samples[2] |= {"question": "How?", "options": ["so", "none of the above"], "answer": "none of the above"}
    samples[0] |= {"question": "Is it <b>wet</b>?", "options": ["yes", "no"], "answer": "no"}
    (data / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples), "utf-8")
    (data / "dataset.json").write_text(
        json.dumps({"name": "pets <3", "classes": ["cat", "dog", "shark"], "target_class": "shark"}),
        "utf-8",
    )
    dataset = open_dataset(data)
    setup = Setup(adaptive_images=2, seed=17)
    towers = {"none": "", "fare": "robust"}
    store = Store.begin(folder / "results", fixed("tiny-model", towers, dataset, setup))
    for (defence, condition), replies in REPLIES.items():
        rows = [
            {"image": name, "task": "classification", "reply": reply, "seconds": 0.5}
            for name, reply in zip(NAMES, replies, strict=False)
        ]
        features = [
            {"image": name, "task": "features", "cosine": 0.25, "pooled": 0.5} for name in NAMES[: len(replies)]
        ]
        store.add(f"{defence.name}/{condition.name}", rows + features)
    for condition, replies in CAPTIONS.items():
        rows = [
            {"image": name, "task": "captioning", "reply": reply, "seconds": 0.5}
            for name, reply in zip(NAMES, replies, strict=True)
        ]
        store.add(f"none/{condition.name}", rows)
    for i, name in enumerate(NAMES):
        store.keep("none/foa-16", name, unit(shifted(pixels(i), 2)))
        store.keep("fare/foa-16", name, unit(shifted(pixels(i), 5)))
    for i, name in enumerate(NAMES[:2]):
        store.keep("fs_psm/foa-16-adaptive", name, unit(shifted(pixels(i), -40)))
    certificates = store.folder / "certificates" / "fs_psm-sigma0.25.0-of-1.jsonl"
    rows = [Row(name, "", one).line for name, one in zip(NAMES, CERTIFIED, strict=False)]
    File(certificates, {"sigma": 0.25}, b"", rows).write()
    for i, name in enumerate(NAMES):
        store.keep_picture("shown/clean", name, unit(pixels(i)))
        store.keep_picture("shown/target", name, unit(pixels((i - 1) % 3)))
        for key in ("none/foa-16", "fs_psm/foa-16-adaptive") if purified else ():
            if (attacked := store.attacked(key, name)) is not None:
                store.keep_picture(f"shown/purified/{key}", name, 1 - attacked)
    judge = ExactMatch()
    for condition in (CLEAN, FOA):
        found = captions(store, NONE, condition, dataset.samples)
        asked = dict.fromkeys((one.said, reference) for one in found for reference in (one.own, one.aim))
        pairs = [pair for pair in asked if pair not in store.scores(judge.name)]
        for (said, reference), score in zip(pairs, judge.scores(pairs), strict=True):
            store.score(judge.name, said, reference, score)
    plan = Plan(tuple(suites), dataset, setup, tuple(towers), tuple(tasks))
    Record(plan, judge.name, tuple(notes)).write(store.folder)
    return Results(folder)


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    parent: Element | None
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        parts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join("".join(parts).split())

    def all(self, tag: str, **wanted: str) -> list[Element]:
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and all(child.attributes.get(name.rstrip("_")) == v for name, v in wanted.items()):
                    found.append(child)
                found += child.all(tag, **wanted)
        return found

    def one(self, tag: str, **wanted: str) -> Element:
        found = self.all(tag, **wanted)
        assert len(found) == 1, f"{len(found)} of {tag} {wanted}"
        return found[0]


class Tree(HTMLParser):
    """A page whose tags must balance."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = self.here = Element("", {}, None)
        self.feed(page)
        self.close()
        assert self.here is self.root, f"<{self.here.tag}> is not closed"

    def handle_starttag(self, tag, attributes):
        element = Element(tag, dict(attributes), self.here)
        assert len(element.attributes) == len(attributes), f"<{tag}> has an attribute twice"
        self.here.children.append(element)
        if tag not in self.VOID:
            self.here = element

    def handle_startendtag(self, tag, attributes):
        self.here.children.append(Element(tag, dict(attributes), self.here))

    def handle_endtag(self, tag):
        assert self.here.tag == tag, f"<{self.here.tag}> is closed by </{tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def page_of(results: Results, path: Path, **options) -> Element:
    write(results, path, **options)
    return Tree(path.read_text("utf-8")).root


def grid(table: Element) -> list[list[str]]:
    """The text of a table's body, cells that span rows repeated."""
    lines, hanging = [], (0, "")
    for row in [row for body in table.all("tbody") for row in body.all("tr")]:
        cells = [cell for cell in row.children if isinstance(cell, Element)]
        line = [cell.text for cell in cells]
        if hanging[0]:
            line.insert(0, hanging[1])
            hanging = (hanging[0] - 1, hanging[1])
        elif "rowspan" in cells[0].attributes:
            hanging = (int(cells[0].attributes["rowspan"]) - 1, cells[0].text)
        lines.append(line)
    return lines


def decoded(image: Element) -> np.ndarray:
    head, _, content = image.attributes["src"].partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def shown(article: Element) -> dict[str, dict[str, np.ndarray]]:
    """Heading -> caption -> picture."""
    found: dict[str, dict[str, np.ndarray]] = {}
    heading = ""
    for part in [child for child in article.children if isinstance(child, Element)]:
        if part.tag == "h4":
            heading = part.text
        for figure in part.all("figure") if part.attributes.get("class") == "shown" else ():
            found.setdefault(heading, {})[figure.one("figcaption").text] = decoded(figure.one("img"))
    return found
