"""The HTML report of an evaluation, from rows that are written here: what it shows, and that it is safe to open."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from pages import CERTIFIED, CLEAN, EVIL, FOA, NAMES, SUITES, Element, grid, make, page_of, pixels, shifted, shown

from fs_plugins.certificates import Certificate
from fs_plugins.errors import SettingError
from fs_plugins.evaluation import curves, report
from fs_plugins.evaluation.report import write
from fs_plugins.evaluation.tables import Table
from fs_plugins.kept import Lines


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Element, str]:
    """The report of all of it, and its source."""
    folder = tmp_path_factory.mktemp("report")
    page = page_of(make(folder, purified=True), folder / "deep" / "report.html")
    return page, (folder / "deep" / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def page(told) -> Element:
    return told[0]


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
    assert facts == [
        "Class: right is cat, the attacker wants shark.",
        "Caption: right is a cat, the attacker wants a shark.",
    ]


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
    tags = ("a", "img", "use", "link", "iframe", "object", "image")
    everything = [element for tag in tags for element in page.all(tag)]
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
    write(make(tmp_path, purified=True), tmp_path / "report.html")
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
    assert curves._average([good, nothing], eps) == pytest.approx(expected)


def test_without_purifier_pictures_certificates_or_suites(tmp_path):
    results = make(tmp_path, suites=SUITES[:1], notes=())
    page = page_of(results, tmp_path / "a.html", shown=1)
    [article] = page.all("article")
    assert set(shown(article)["FOA-Attack 16/255"]) == {"clean", "attacked", "difference, 8 times"}
    assert not page.all("svg")
    assert not page.all("section", id="notes")
    assert not page_of(results, tmp_path / "b.html", shown=0).all("img")
    bare = page_of(make(tmp_path / "vqa", suites=SUITES[-1:]), tmp_path / "c.html")
    assert bare.one("section", id="tables").one("p").text == "No suite had anything to measure."
    assert not bare.all("table")


def test_a_bad_call_is_refused_and_the_old_report_stays(tmp_path):
    results, path = make(tmp_path, purified=True), tmp_path / "report.html"
    path.write_text("old", "utf-8")
    with pytest.raises(SettingError, match="0 or more, got -1"):
        write(results, path, shown=-1)
    results.store.keep_picture("shown/purified/none/foa-16", NAMES[1], torch.zeros(3, 4, 4))
    with pytest.raises(SettingError, match=r"must have the attacked one's shape, \(3, 8, 8\), and has \(3, 4, 4\)"):
        write(results, path)
    assert path.read_text("utf-8") == "old"


def test_an_unfinished_run_and_half_a_character_can_be_reported(tmp_path):
    results = make(tmp_path)
    store = results.store
    store.path("attacked/none/foa-16", NAMES[0]).unlink()
    answers = Lines(store.folder / "answers" / "none" / "clean.0.jsonl")
    half = {(NAMES[1], "classification"): {"reply": "\ud83d"}}
    answers.replace([row | half.get((row["image"], row["task"]), {}) for row in answers.read()])
    page = page_of(results, tmp_path / "report.html")
    first = page.all("article")[0]
    assert list(shown(first)) == ["clean", "FOA-Attack 16/255, adaptive, made through FS-PSM"]
    assert grid(page.one("details", id="answers-asked"))[1][3] == "? ✗ wrong"


def test_questions_are_shown_with_their_options(tmp_path):
    results = make(tmp_path, suites=SUITES[-1:], tasks=("vqa",))
    for condition, reply in ((CLEAN, "B"), (FOA, "C")):
        rows = [{"image": name, "task": "vqa", "reply": reply, "seconds": 0.5} for name in (NAMES[0], NAMES[2])]
        results.store.add(f"none/{condition.name}", rows)
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
