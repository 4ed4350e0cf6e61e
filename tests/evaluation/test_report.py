"""The HTML report of an evaluation, from rows that are written here: what it shows, and that it is safe to open."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fs_plugins.certificates import Certificate
from fs_plugins.errors import SettingError
from fs_plugins.evaluation import report
from fs_plugins.evaluation.datasets import open_dataset
from fs_plugins.evaluation.judges import ExactMatch
from fs_plugins.evaluation.report import write
from fs_plugins.evaluation.results import Results, Table
from fs_plugins.evaluation.run import Evaluation, Settings, fixed
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


def make(folder: Path, **changes) -> Results:
    """An evaluation that has run. On the model's own encoder attacks add 2 to every pixel, through FS-PSM they take 40."""
    data = folder / "data"
    (data / "images").mkdir(parents=True)
    samples = []
    for i, label in enumerate(("cat", "dog", "cat")):
        Image.fromarray(pixels(i)).save(data / NAMES[i])
        samples.append({"image": NAMES[i], "target": NAMES[i - 1], "label": label, "caption": f"a {label}"})
    samples[2] |= {"question": "How?", "options": ["so", "none of the above"], "answer": "none of the above"}
    samples[0] |= {"question": "Is it <b>wet</b>?", "options": ["yes", "no"], "answer": "no"}
    (data / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (data / "dataset.json").write_text(
        json.dumps({"name": "pets <3", "classes": ["cat", "dog", "shark"], "target_class": "shark"})
    )
    dataset = open_dataset(data)
    settings = Settings(adaptive_images=2, seed=17)
    towers = {"none": "", "fare": "robust"}
    store = Store(folder / "results", fixed("tiny-model", towers, dataset, settings))
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
    certificates.parent.mkdir()
    rows = [
        {"image": name, "certificate": json.loads(one.to_json())} for name, one in zip(NAMES, CERTIFIED, strict=False)
    ]
    certificates.write_text("".join(json.dumps(row) + "\n" for row in [{}, *rows]))
    judge = ExactMatch()
    evaluation = Evaluation(
        **{
            "load": lambda tower: pytest.fail("a report loads no model"),
            "towers": list(towers),
            "dataset": dataset,
            "suites": SUITES,
            "settings": settings,
            "store": store,
            "judge": judge,
            "track": lambda what, count: lambda done: None,
            "tasks": ("captioning", "classification"),
            "notes": ["No <tecoa> tower.", "No <tecoa> tower."],
            **changes,
        }
    )
    for condition in (CLEAN, FOA):
        pairs = [(said, ref) for _, said, *both in evaluation.captions(NONE, condition) for ref in both]
        for (said, reference), score in zip(pairs, judge.scores(pairs), strict=True):
            store.score(judge.name, said, reference, score)
    return Results(evaluation)


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


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Element, str]:
    """The report of all of it, and its source."""
    folder = tmp_path_factory.mktemp("report")
    page = page_of(make(folder), folder / "deep" / "report.html", purify=lambda images: 1 - images)
    return page, (folder / "deep" / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def page(told) -> Element:
    return told[0]


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


def test_header_says_what_was_evaluated_how_and_what_is_missing(page):
    assert page.one("h1").text == "Evaluation of tiny-model on pets <3"
    listed = page.one("dl")
    told = dict(zip([e.text for e in listed.all("dt")], [e.text for e in listed.all("dd")], strict=True))
    assert told["seed"] == "17"
    assert told["adaptive images"] == "2"
    assert told["sigma"] == "the PSM's own"
    assert told["tower fare"] == "robust"
    assert told["judge"] == "exact"
    assert told["data"].startswith("3 samples, ")
    left_out = [item.text for item in page.one("section", id="notes").all("li")]
    assert left_out == ["No <tecoa> tower.", "Questions: left out, because the data or the model is not for vqa."]


def test_every_figure_of_every_table_is_there_with_its_interval(page, tmp_path):
    tables = make(tmp_path).tables()
    drawn = page.one("section", id="tables")
    assert [h.text for h in drawn.all("h3")] == [table.title for table in tables]
    for table, element in zip(tables, drawn.all("table"), strict=True):
        assert [head.text for head in element.one("thead").all("th", scope="col")] == list(table.headings)
        assert grid(element) == [[" ".join(str(cell).split()) for cell in row] for row in table.rows]
    assert [table.note for table in tables] == [
        note.text for note in drawn.all("p", class_="note")
    ]  # each table has one
    rows = grid(drawn.all("table")[0])
    # Of three pictures two are right; Wilson's interval of 2/3 is .208 to .939.
    assert rows[0][:4] == ["clean", "none", "3", "66.7 (21-94)"]
    assert drawn.all("table")[0].all("th", scope="rowgroup")[1].attributes["rowspan"] == "3"


def test_rows_without_a_second_header_are_not_grouped():
    table = Table("x", "X", ("attack", "n"), (("adaptive", 3), ("adaptive", 4)))
    [lines] = report._grouped(table)["groups"]
    assert [line["heads"] for line in lines] == [[("adaptive", "row", 1)]] * 2
    assert [line["cells"] for line in lines] == [[("3", "")], [("4", "")]]


def test_pictures_are_the_ones_that_were_shown(page):
    articles = page.one("section", id="pictures").all("article")
    assert [article.one("h3").text for article in articles] == NAMES
    for i, article in enumerate(articles):
        clean, pictures = pixels(i), shown(article)
        assert np.array_equal(pictures["clean"]["clean"], clean)
        assert np.array_equal(pictures["clean"]["what attacks aim at"], pixels((i - 1) % 3))
        oblivious = pictures["FOA-Attack 16/255"]
        assert np.array_equal(oblivious["clean"], clean)
        assert np.array_equal(oblivious["attacked"], shifted(clean, 2))
        assert np.array_equal(oblivious["attacked, purified"], 255 - shifted(clean, 2))
        # Grey, 127.5, and 8 times the change.
        assert np.abs(oblivious["difference, 8 times"].astype(float) - 143.5).max() <= 0.5
        assert ("FOA-Attack 16/255, adaptive, made through FS-PSM" in pictures) == (i < 2)
    adaptive = shown(articles[0])["FOA-Attack 16/255, adaptive, made through FS-PSM"]
    assert np.array_equal(adaptive["attacked"], shifted(pixels(0), -40))
    assert not adaptive["difference, 8 times"].any()  # 127.5 - 320, cut off


def test_replies_stand_under_the_pictures_and_say_whose_they_are(page):
    first, second, _ = page.one("section", id="pictures").all("article")
    clean, oblivious, adaptive = (grid(table) for table in first.all("table"))
    assert clean == [
        ["none", "0 = cat ✓ right", "a cat ✓ right"],
        ["FS-PSM", "0 = cat ✓ right", ""],
        ["FARE", "0 = cat ✓ right", ""],
    ]
    assert oblivious == [
        ["none", "2 = shark ⚠ the attacker's", "a shark ⚠ the attacker's"],
        ["FS-PSM", "0 = cat ✓ right", ""],
        ["FARE *", "0 = cat ✓ right", ""],
    ]
    assert adaptive == [["FS-PSM", "2 = shark ⚠ the attacker's"]]  # FS was shown another picture
    assert grid(second.all("table")[1])[1] == ["FS-PSM", "nothing ✗ wrong", ""]
    facts = [item.text for item in first.one("ul", class_="facts").all("li")]
    assert facts == ["Class: right is cat, the attacker wants shark.", "Caption: right is a cat, the attacker wants a shark."]  # fmt: skip


def test_answers_of_every_picture_are_marked(page):
    asked, adaptive, said = page.one("section", id="answers").all("details")
    assert asked.one("summary").text == "Classes & attacks: what was said of 3 pictures"
    groups = [(head.text, head.attributes["colspan"]) for head in asked.all("th", scope="colgroup")]
    assert groups == [("clean", "3"), ("FOA-Attack 16/255", "3")]
    rows = grid(asked)
    assert rows[0][3:] == ["0 = cat ✓ right"] * 3 + ["2 = shark ⚠ the attacker's"] + ["0 = cat ✓ right"] * 2
    assert rows[2] == [
        NAMES[2], "cat", "shark",
        "2 = shark ⚠ the attacker's", "0 = cat ✓ right", "0 = cat ✓ right",
        "0 = cat ✓ right", "2 = shark ⚠ the attacker's", "0 = cat ✓ right",
    ]  # fmt: skip
    assert rows[1][-1] == "0 = cat ✗ wrong"
    assert [row[0] for row in grid(adaptive)] == NAMES[:2]
    assert [row[-1] for row in grid(said)] == ["a shark ⚠ the attacker's", "a dog ✓ right", "a fish ✗ wrong"]
    # The colour goes with the word.
    styles = {(mark.text[2:], mark.attributes["class"]) for mark in asked.all("span") if "mark" in str(mark.attributes)}
    assert styles == {("right", "mark right"), ("wrong", "mark wrong"), ("the attacker's", "mark attacked")}


def test_replies_cannot_bring_markup_in(told):
    page, source = told
    assert not page.all("script")
    assert EVIL not in source
    cell = grid(page.one("details", id="answers-asked"))[1][6]
    assert cell == f"{EVIL} ✗ wrong"


def test_nothing_is_fetched(told):
    page, source = told
    everything = [element for tag in ("a", "img", "use", "link", "iframe", "object", "image") for element in page.all(tag)]  # fmt: skip
    addresses = [
        value for e in everything for name, value in e.attributes.items() if name in ("src", "href", "xlink:href")
    ]
    assert len(addresses) > 10
    assert all(re.match(r"#[\w.-]+$|data:image/png;base64,", address) for address in addresses)
    assert not re.search(r"""@import|url\((?!\s*["']?#)|\ssrcset|\son\w+=""", source)
    ids = re.findall(r'\sid="([^"]+)"', source)
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in addresses if address.startswith("#")} <= set(ids)


def test_headers_have_a_scope_and_pictures_a_description(page):
    assert all(head.attributes.get("scope") in ("col", "row", "colgroup", "rowgroup") for head in page.all("th"))
    descriptions = [image.attributes.get("alt") for image in page.all("img")]
    assert all(descriptions)
    assert len(set(descriptions)) == len(descriptions)
    for one in page.all("div", role="region"):
        assert one.attributes["aria-label"]


def test_the_same_rows_give_the_same_bytes(told, tmp_path):
    again = make(tmp_path)
    write(again, tmp_path / "report.html", purify=lambda images: 1 - images)
    assert (tmp_path / "report.html").read_text("utf-8") == told[1]


def test_certificates_are_drawn(page):
    drawn = page.one("section", id="certificates")
    assert "FS-PSM at sigma 0.25" in drawn.one("div", role="img").attributes["aria-label"]
    words = [text.text for text in drawn.one("svg").all("text")]
    assert "FS-PSM, sigma 0.25 (n = 2)" in words
    assert "unrelated pictures (0.20)" in words
    assert "certified cosine" in words


def test_average_curve_counts_a_missing_promise_as_nothing():
    nothing = Certificate.from_scores([-1.0] * 200, sigma=0.25)
    good = CERTIFIED[0]
    eps = np.array([0.0, 0.1])
    assert nothing.is_empty
    expected = [good.fcsb(0.0) / 2, good.fcsb(0.1) / 2]
    assert report._average([good, nothing], eps) == pytest.approx(expected)


def test_without_purifier_pictures_certificates_or_suites(tmp_path):
    results = make(tmp_path, suites=SUITES[:1], notes=[])
    page = page_of(results, tmp_path / "a.html", shown=1)
    [article] = page.all("article")
    assert set(shown(article)["FOA-Attack 16/255"]) == {"clean", "attacked", "difference, 8 times"}
    assert not page.all("svg")
    assert not page.all("section", id="notes")
    assert not page_of(results, tmp_path / "b.html", shown=0).all("img")
    results.evaluation.suites = SUITES[-1:]
    bare = page_of(results, tmp_path / "c.html")
    assert bare.one("section", id="tables").one("p").text == "No suite had anything to measure."
    assert not bare.all("table")


def test_a_bad_call_is_refused_and_the_old_report_stays(tmp_path):
    results, path = make(tmp_path), tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(SettingError, match="0 or more, got -1"):
        write(results, path, shown=-1)
    with pytest.raises(SettingError, match=r"shape it was given, \(3, 3, 8, 8\), and returned \(3, 3, 4, 4\)"):
        write(results, path, purify=lambda images: images[:, :, :4, :4])
    assert path.read_text() == "old"


def test_an_unfinished_run_and_half_a_character_can_be_reported(tmp_path):
    results = make(tmp_path)
    store = results.evaluation.store
    store._picture("none/foa-16", NAMES[0]).unlink()
    row = {"image": NAMES[1], "task": "classification", "reply": "\ud83d", "seconds": 0.5}
    store.add("none/clean", [row])
    page = page_of(results, tmp_path / "report.html")
    first = page.all("article")[0]
    assert list(shown(first)) == ["clean", "FOA-Attack 16/255, adaptive, made through FS-PSM"]
    assert grid(page.one("details", id="answers-asked"))[1][3] == "? ✗ wrong"


def test_questions_are_shown_with_their_options(tmp_path):
    results = make(tmp_path, suites=SUITES[-1:], tasks=("vqa",))
    for condition, reply in ((CLEAN, "B"), (FOA, "C")):
        rows = [{"image": name, "task": "vqa", "reply": reply, "seconds": 0.5} for name in (NAMES[0], NAMES[2])]
        results.evaluation.store.add(f"none/{condition.name}", rows)
    page = page_of(results, tmp_path / "report.html")
    question = "Is it <b>wet</b>? (yes / no / None of the above)"
    facts = [[item.text for item in article.one("ul").all("li")] for article in page.all("article")]
    assert facts[:2] == [[f"Question {question}: right is no, the attacker wants None of the above."], []]
    row, truth_is_none = grid(page.one("details", id="answers-vqa"))
    assert row == [
        f"{NAMES[0]}{question}", "no", "None of the above", "B = no ✓ right", "C = None of the above ⚠ the attacker's"
    ]  # fmt: skip
    # What is true is no success of an attack, so no answer of the attacker's is told.
    assert facts[2] == ["Question How? (so / none of the above): right is none of the above."]
    assert truth_is_none[1:] == ["none of the above", "", "B = none of the above ✓ right", "C ✗ wrong"]
