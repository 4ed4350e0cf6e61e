"""The page in a real browser: every step, people who do harm, people who come at once, keyboards, phones, the dark.

Writes a picture of every step into runs/playground. Runs in an environment that has gradio and Playwright; elsewhere it
is skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, urlsplit

import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright")

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from fs_plugins.pictures import png, rgb
from fs_plugins.playground.models import Facts
from fs_plugins.playground.server import SESSIONS

SHOTS = Path(__file__).parents[1] / "runs" / "playground"
PATIENCE = 120_000
"""Milliseconds; a busy machine is no failure."""
VISITS = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, int, Path]]:
    """Its address, its process, and the folder that all temporary files go to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = tmp_path_factory.mktemp("temporary")
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "fs_plugins.playground"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}/", process.pid, temporary
        process.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser, server):
    """Opens the page in a context of its own; afterwards nothing was asked of others, and no script has complained."""
    strangers, complaints, contexts = [], [], []

    def open_(query: str = "", **context) -> Page:
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda one: strangers.append(one.url) if not is_ours(one.url, server[0]) else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
        page.goto(server[0] + query)
        page.locator("#status p").wait_for()
        expect(page.locator("#status")).not_to_contain_text("is coming", timeout=PATIENCE)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not strangers
    assert not complaints


def is_ours(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def says(page: Page, text: str) -> None:
    expect(page.locator("#status")).to_contain_text(re.compile(text), timeout=PATIENCE)


def shot(page: Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def choose(page: Page, name: str, value: str) -> None:
    """Of a list, as the keyboard does it."""
    box = page.locator(f"#{name} input")
    box.click()
    box.fill(value)
    box.press("Enter")


def test_somebody_draws_attacks_asks_certifies_and_shares(opened, server):
    page = opened("?draws=60&choices=")
    picture = page.locator("#picture img")
    picture.wait_for()
    shot(page, "1-picture")
    choose(page, "shape", "ring")
    expect(picture).to_have_attribute("alt", re.compile("a large yellow ring in the middle"))
    began = time.monotonic()
    page.click("#run-attack")
    says(page, "Attacked, 40 steps")
    assert time.monotonic() - began < 15
    assert page.locator("#attacked img").count() == 2
    shot(page, "2-attack")
    page.click("#run-ask")
    says(page, "Answered")
    answers = page.locator("#answers")
    expect(answers.get_by_role("row", name="Clean picture: answer")).to_contain_text("ring")
    expect(answers.get_by_role("row", name="Attacked picture: answer")).to_contain_text("bolt")
    assert page.locator("#answers img").count() == 8
    shot(page, "3-answers")
    page.click("#run-certify")
    says(page, "Certified")
    expect(page.locator("#proof li").first).to_contain_text("99.9 %")
    expect(page.locator("#proof")).to_contain_text("The attack above moved the picture")
    shot(page, "4-proof")
    link = page.locator("#link a").get_attribute("href")
    expected = {"draws": ["60"], "shape": ["ring"], "choices": [""]}
    assert parse_qs(urlsplit(link).query, keep_blank_values=True) == expected
    assert page.locator("#link a").inner_text() == server[0] + link
    expect(page).to_have_url(server[0] + link)
    other = opened(link)
    expect(other.locator("#picture img")).to_have_attribute("alt", re.compile("yellow ring"))
    assert other.locator("#draws input[type=number]").input_value() == "60"


def test_what_one_can_save_is_in_the_page(opened):
    page = opened("?shape=heart")
    with page.expect_download() as saved:
        page.get_by_role("link", name="Save the picture").click()
    assert saved.value.suggested_filename == "picture.png"
    assert rgb(Path(saved.value.path())).size == (64, 64)
    page.get_by_role("button", name="The same in Python").click()
    expect(page.locator("#python")).to_contain_text("fs_plugins.attacks.attack")
    expect(page.locator("#shell")).to_contain_text("fs-plugins certify picture.png")


def send(page: Page, path: Path) -> None:
    page.locator("#source").get_by_label("Upload").check()
    with page.expect_file_chooser() as chooser:
        page.locator("#upload").click()
    chooser.value.set_files(path)


def left_behind(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".png", ".jpg", ".jpeg")]


def test_a_photograph_from_a_phone_stands_upright_and_is_not_kept(opened, server, tmp_path):
    lying = Image.new("RGB", (200, 100), "red")
    lying.paste("blue", (0, 0, 100, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    page = opened()
    send(page, tmp_path / "phone.jpg")
    says(page, "Uploaded")
    expect(page.locator("#picture img")).to_have_attribute("alt", re.compile("Uploaded"))
    assert page.locator("#question textarea").input_value() == "What is in this image?"
    assert page.locator("#choices textarea").input_value() == ""
    pixels = page.evaluate(
        """async () => {
            const image = document.querySelector('#picture img'); await image.decode();
            const canvas = document.createElement('canvas'); canvas.width = image.naturalWidth;
            canvas.height = image.naturalHeight; const pen = canvas.getContext('2d'); pen.drawImage(image, 0, 0);
            return [pen.getImageData(32, 4, 1, 1).data[2], pen.getImageData(32, 60, 1, 1).data[0]]; }"""
    )
    assert min(pixels) > 180  # blue above, red below
    assert not left_behind(server[2])
    shot(page, "5-upload")
    page.locator("#source").get_by_label("Draw").check()
    expect(page.locator("#question textarea")).to_have_value("Which shape is in this image?", timeout=PATIENCE)


def test_a_file_that_nobody_reads_is_gone_after_a_while(monkeypatch, tmp_path):
    """An hour, of which this is a second."""
    from fs_plugins.playground import page
    from fs_plugins.playground.server import _launched

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(page, "KEPT", 1)
    monkeypatch.setattr(page, "SWEPT", 1)
    blocks = page.Page(SimpleNamespace(models=models())).blocks
    try:
        address = _launched(blocks, "127.0.0.1", None, False)
        content = {"files": ("seen.png", png(Image.new("RGB", (8, 8))), "image/png")}
        (path,) = httpx.post(f"{address}gradio_api/upload", files=content, timeout=60).json()
        assert Path(path).is_relative_to(tmp_path)
        deadline = time.monotonic() + 30
        while Path(path).exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not Path(path).exists()
    finally:
        blocks.close(verbose=False)


@pytest.mark.parametrize("name", ["drawing.png", "page.jpg"])
def test_what_only_says_that_it_is_a_picture_is_refused(opened, server, tmp_path, name):
    hostile = "<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'><script>alert(1)</script></svg>"
    (tmp_path / name).write_text(hostile, "utf-8")
    page = opened()
    send(page, tmp_path / name)
    says(page, "neither PNG nor JPEG")
    assert not left_behind(server[2])
    assert "alert" not in page.locator("#picture").inner_html()


def test_words_of_visitors_are_words(opened):
    hostile = "<img src=x onerror=alert(1)>"
    query = f"?model=demo-clip&question=a {{}}&choices={quote(hostile)},{quote('${alert(2)} {{alert(3)}}')}&attack=none"
    page = opened(query)
    page.click("#run-ask")
    says(page, "Answered")
    assert page.locator("#answers img[src=x]").count() == 0
    expect(page.locator("#answers td").first).to_contain_text(re.compile(r"onerror=alert\(1\)|alert\(2\)"))


def test_a_link_that_is_no_state_is_a_message(opened):
    page = opened("?eps=9999&attack=nuke")
    says(page, "cannot be used")
    page.locator("#picture img").wait_for()


def test_an_attack_is_stopped_and_leaves_what_it_had(opened):
    page = opened("?steps=500&adaptive=true")
    page.click("#run-attack")
    expect(page.locator("#attacked")).to_contain_text(re.compile(r"Step [1-9]\d* of 500"), timeout=PATIENCE)
    first = page.locator("#attacked img").first.get_attribute("src")
    expect(page.locator("#attacked img").first).not_to_have_attribute("src", first, timeout=PATIENCE)
    shot(page, "6-attack-under-way")
    page.click("#stop-attack")
    says(page, r"Stopped after \d+ steps")
    assert page.locator("#attacked img").count() == 2


def test_two_come_at_once_and_the_second_sees_the_line(opened):
    one, other = opened("?steps=500&adaptive=true"), opened("?shape=heart&steps=2")
    one.click("#run-attack")
    expect(one.locator("#attacked")).to_contain_text(re.compile(r"Step [1-9]"), timeout=PATIENCE)
    other.click("#run-attack")
    says(other, "In the line: 1 run is served before yours")
    shot(other, "7-line")
    one.click("#stop-attack")
    says(one, "Stopped after")
    says(other, "Attacked, 2 steps")
    expect(one.locator("#picture img")).to_have_attribute("alt", re.compile("star"))
    expect(other.locator("#picture img")).to_have_attribute("alt", re.compile("heart"))


def test_who_leaves_frees_the_worker(opened):
    one, other = opened("?steps=500&adaptive=true"), opened("?steps=2")
    one.click("#run-attack")
    expect(one.locator("#attacked")).to_contain_text(re.compile(r"Step [1-9]"), timeout=PATIENCE)
    one.close()
    other.click("#run-attack")
    says(other, "Attacked, 2 steps")


def test_the_keyboard_is_enough(opened):
    page = opened("?steps=2")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#run-attack') !== null"):
            break
    page.keyboard.press("Enter")
    says(page, "Attacked, 2 steps")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, button, select')].filter(one =>
            one.offsetParent && !(one.labels?.length || one.ariaLabel || one.title || one.innerText.trim()
            || one.getAttribute('aria-labelledby') || one.placeholder)).map(one => one.outerHTML)"""
    )
    assert not unnamed


def test_a_phone_is_wide_enough(opened):
    page = opened("?steps=2", viewport={"width": 360, "height": 740})
    page.click("#run-attack")
    says(page, "Attacked")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    shot(page, "8-phone")


def test_the_dark_is_dark(opened):
    page = opened(color_scheme="dark")
    page.locator("#picture img").wait_for()
    colours = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('h1')).color]"
    )
    ground, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert ground < 150 < 500 < ink
    shot(page, "9-dark")


def test_the_first_paint_is_soon(opened):
    """The best of three: others are at work on this machine."""
    paints = []
    for _ in range(3):
        page = opened()
        paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    assert min(paints) < 2000


def models() -> SimpleNamespace:
    """Of a page that asks none."""
    facts = Facts("demo", True, (64, 64), 0.25, (0.25, 0.5))
    return SimpleNamespace(names=("demo",), psm="auto", about=lambda name: facts, sigma=lambda state: 0.25)


def test_a_fault_of_a_run_is_a_message(caplog):
    from fs_plugins.playground.page import Page, Visit

    class Faulty:
        """A page's engine that has something wrong."""

        def __init__(self) -> None:
            self.models = models()

        def picture(self, state, sent=None):
            raise RuntimeError("a secret of the server")

    page = Page(Faulty())
    values = [control.value for control in page.controls.values()]
    request = SimpleNamespace(session_hash="tab", client=SimpleNamespace(host="here"))
    for run in (page._attack, page._ask, page._certify):
        told = str(list(run(request, Visit(), *values))[-1][page.status])
        assert "failed on the server; the page goes on" in told
        assert "secret" not in told
    assert "a secret of the server" in caplog.text


def resident(process: int) -> float:
    """MiB."""
    told = Path(f"/proc/{process}/status").read_text("utf-8")
    return int(re.search(r"VmRSS:\s+(\d+) kB", told)[1]) / 1024


def test_two_hundred_visits_leave_memory_as_it_was(server):
    address, process, _ = server
    with httpx.Client(base_url=address, timeout=120) as client:
        arrive = next(
            one["id"]
            for one in client.get("config").json()["dependencies"]
            if any(t[1] == "load" for t in one["targets"])
        )

        def visit(number: int) -> None:
            assert client.get("/").status_code == 200
            body = {"data": [], "fn_index": arrive, "session_hash": f"visit{number}", "trigger_id": None}
            found = client.post("gradio_api/run/predict", json=body)
            assert found.status_code == 200, found.text[:500]

        for number in range(SESSIONS + 20):  # so many are remembered
            visit(number)
        before = resident(process)
        for number in range(VISITS):
            visit(-1 - number)
        assert resident(process) - before < 24


def test_it_is_there_for_this_machine_alone_and_says_so_to_browsers(server):
    found = httpx.get(server[0])
    assert "default-src 'self'" in found.headers["content-security-policy"]
    port = urlsplit(server[0]).port
    outward = socket.gethostbyname(socket.gethostname())
    if not outward.startswith("127."):
        with pytest.raises(ConnectionError), socket.create_connection((outward, port), timeout=5):
            pass


def test_the_space_serves_the_same_page():
    space = Path(__file__).parents[1] / "docs" / "space" / "app.py"
    scope: dict[str, object] = {"__name__": "app"}
    exec(compile(space.read_text("utf-8"), str(space), "exec"), scope)
    from fs_plugins.playground.__main__ import main

    assert scope["main"] is main
