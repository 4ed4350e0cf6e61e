"""Where files come from: pinned, fetched once, whole, verified before they are used."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from pydantic import ValidationError
from registering import COMMIT, SHA, corrupted, files, killed, longer, truncated
from support import make_psm

import fs_plugins
from fs_plugins import PSM, PSMError, RegistryError, registry, sources
from fs_plugins.sources import PSM_FILES, Source


def published(folder: Path, **changes) -> Source:
    size = sum((folder / name).stat().st_size for name in PSM_FILES)
    facts = {"state": "url", "path": folder.as_uri() + "/", "sha256": sources.checksum(folder), "size": size}
    return Source(**{**facts, **changes})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"state": "hub", "path": "owner/name"}, "revision that cannot move"),
        ({"state": "hub", "path": "owner/name", "revision": "main"}, "revision that cannot move"),
        ({"state": "hub", "path": "owner/name", "revision": COMMIT[:7]}, "revision that cannot move"),
        ({"state": "hub", "path": "name", "revision": COMMIT}, "owner/name"),
        ({"state": "hub", "path": "owner/model.pt", "revision": COMMIT}, "owner/name"),
        ({"state": "url", "path": "http://example.org/psm/"}, "begins with https"),
        ({"state": "url", "path": "ftp://example.org/model.pt"}, "begins with https"),
        ({"state": "url", "path": "https://example.org/psm"}, "ends in /"),
        ({"state": "folder"}, "needs path"),
    ],
)
def test_sources_that_are_not_pinned_or_not_secure_are_refused(facts, message):
    with pytest.raises(ValidationError, match=message):
        Source(**facts, sha256=SHA)


def test_a_url_is_fetched_once_and_then_used_without_it(online, site, monkeypatch):
    source = published(site)
    folder = source.fetch(Path(), "It")
    assert files(online) == [f"{source.sha256}/{name}" for name in PSM_FILES]
    assert PSM.from_pretrained(folder).config.name == "random"
    shutil.rmtree(site)
    assert source.fetch(Path(), "It") == folder
    monkeypatch.setenv("FS_PLUGINS_OFFLINE", "1")
    assert source.fetch(Path(), "It") == folder


def test_the_checksum_is_over_both_files_in_order_and_known(tmp_path):
    (tmp_path / "config.json").write_bytes(b"ab")
    (tmp_path / "psm.safetensors").write_bytes(b"c")
    assert registry.checksum(tmp_path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("harm", [truncated, corrupted, longer])
@pytest.mark.parametrize("name", PSM_FILES)
def test_what_a_url_gives_must_be_what_was_published_or_nothing_is_kept(online, site, harm, name):
    source = published(site)
    (site / name).write_bytes(harm((site / name).read_bytes()))
    with pytest.raises(PSMError, match=r"It: file://.* bytes with SHA-256 .*, not .* Nothing of it is kept"):
        source.fetch(Path(), "It")
    assert files(online) == []
    assert source.here(Path()) is None


def test_the_size_must_be_right_as_well(online, site):
    with pytest.raises(PSMError, match="not 100 with"):
        published(site, size=100).fetch(Path(), "It")
    with pytest.raises(PSMError, match="not 9,999,999 with"):
        published(site, size=9_999_999).fetch(Path(), "It")
    assert files(online) == []
    published(site, size=None).fetch(Path(), "It")


def test_another_file_of_the_same_size_is_refused(online, site, call, tmp_path):
    source = published(site)
    other = make_psm(call)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(site)
    assert published(site).size == source.size
    with pytest.raises(PSMError, match=rf"{published(site).sha256}, not .* with {source.sha256}"):
        source.fetch(Path(), "It")
    assert files(online) == []


def test_a_damaged_cache_is_fetched_again_online_and_refused_offline(online, site, monkeypatch):
    source = published(site)
    weights = source.fetch(Path(), "It") / "psm.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(corrupted(right))
    monkeypatch.setenv("FS_PLUGINS_OFFLINE", "1")
    with pytest.raises(PSMError, match=r"does not have the registry's checksum.*fetch it again online"):
        source.fetch(Path(), "It")
    monkeypatch.delenv("FS_PLUGINS_OFFLINE")
    source.fetch(Path(), "It")
    assert weights.read_bytes() == right


@pytest.mark.parametrize("variable", sources.OFFLINE)
def test_offline_nothing_is_fetched_and_the_error_says_what_to_do(online, site, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(sources, "_open", lambda url: pytest.fail("fetched"))
    with pytest.raises(RegistryError, match=rf"{variable} is set.*psm.safetensors of file://.* to {online}"):
        published(site).fetch(Path(), "It")
    with pytest.raises(RegistryError, match=f"{variable} is set"):
        Source(state="hub", path="owner/name", revision=COMMIT, sha256=SHA).fetch(Path(), "It")
    monkeypatch.setenv(variable, "0")
    with pytest.raises(pytest.fail.Exception, match="fetched"):
        published(site).fetch(Path(), "It")


def test_what_cannot_be_fetched_is_told(online, site, tmp_path):
    source = published(site)
    (site / "psm.safetensors").unlink()
    with pytest.raises(RegistryError, match="It could not be fetched from file://"):
        source.fetch(Path(), "It")
    assert files(online) == []
    (tmp_path / "cache").rename(tmp_path / "away")
    (tmp_path / "cache").write_text("a file where the cache should be", "utf-8")
    with pytest.raises(RegistryError, match="It could not be fetched"):
        source.fetch(Path(), "It")


def test_http_answers_that_are_errors_or_break_off(online, site, monkeypatch):
    """A server of this test's own; https is taken away, as nobody signs certificates for it."""
    answers = {"/gone/config.json": (404, 0, b"no"), "/short/config.json": (200, 500, b"broken off")}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, length, body = answers[self.path]
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        plain = f"http://127.0.0.1:{server.server_port}/"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        monkeypatch.setattr(sources, "_open", lambda url: opener.open(url.replace("https://host/", plain), timeout=5))
        with pytest.raises(RegistryError, match=r"could not be fetched.*404"):
            published(site, path="https://host/gone/").fetch(Path(), "It")
        answers["/short/psm.safetensors"] = answers["/short/config.json"]
        with pytest.raises((PSMError, RegistryError), match=r"gave \d+ bytes|IncompleteRead"):
            published(site, path="https://host/short/").fetch(Path(), "It")
        server.shutdown()
    assert files(online) == []


def test_redirections_may_not_leave_https():
    request = urllib.request.Request("https://example.org/a")
    redirect = sources._OnlySecure().redirect_request
    assert redirect(request, None, 302, "", {}, "https://example.org/b").full_url == "https://example.org/b"
    for insecure in ("http://example.org/b", "ftp://example.org/b", "file:///etc/passwd"):
        with pytest.raises(URLError, match="not https"):
            redirect(request, None, 302, "", {}, insecure)


def test_many_at_once_all_get_it_and_leave_nothing_behind(online, site):
    source, found = published(site), []
    ready = threading.Barrier(6)

    def fetch():
        ready.wait()
        found.append(source.fetch(Path(), "It"))

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [online / source.sha256] * 6
    assert sorted(path.name for path in found[0].iterdir()) == sorted(PSM_FILES)


def test_a_download_that_is_killed_leaves_nothing_that_looks_finished(online, tmp_path):
    """The slow source is a FIFO that gives four of its five megabytes."""
    whole = os.urandom(5 << 20)
    address = tmp_path / "model.pt"
    os.mkfifo(address)
    source = Source(state="url", path=address.as_uri(), size=len(whole), sha256=hashlib.sha256(whole).hexdigest())
    script = f"""
import sys, types
from pathlib import Path

sys.modules["fs_plugins"] = types.ModuleType("fs_plugins")  # without torch: quicker
sys.modules["fs_plugins"].__path__ = [{str(Path(fs_plugins.__file__).parent)!r}]
from fs_plugins.sources import Source

Source.model_validate_json({source.model_dump_json()!r}).fetch(Path(), "It")
"""

    def partial() -> list[Path]:
        return [path for path in online.rglob("*") if path.is_file() and path.stat().st_size > 2 << 20]

    def feed() -> None:
        with suppress(BrokenPipeError), address.open("wb") as pipe:
            pipe.write(whole[: 4 << 20])
            pipe.flush()
            time.sleep(60)

    killed(script, partial, feed)
    (left,) = partial()
    assert left.parent.name.startswith(".fs-plugins-partial-")
    assert source.here(Path()) is None
    address.unlink()
    address.write_bytes(whole)
    assert source.fetch(Path(), "It") == online / source.sha256
    assert (online / source.sha256 / "model.pt").read_bytes() == whole
    assert files(online) == [f"{source.sha256}/model.pt"], "its process is gone"


def test_the_hubs_cache_is_used_and_verified(hub):
    source = Source(state="hub", path="someone/psm", revision=COMMIT, sha256=registry.checksum(hub))
    assert source.fetch(Path(), "It") == hub
    other = source.model_copy(update={"revision": "d" * 40})
    with pytest.raises(RegistryError, match="The hub did not give It"):
        other.fetch(Path(), "It")


def test_what_the_hub_gives_is_asked_for_at_the_commit_and_once_more_if_damaged(hub, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options["revision"], options["local_files_only"], options["force_download"]))
        return str(hub / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    right = registry.checksum(hub)
    (hub / "psm.safetensors").write_bytes(corrupted((hub / "psm.safetensors").read_bytes()))
    with pytest.raises(PSMError, match="does not have the registry's checksum"):
        Source(state="hub", path="someone/psm", revision=COMMIT, sha256=right).fetch(Path(), "It")
    assert asked == [("someone/psm", name, COMMIT, False, True) for name in PSM_FILES]
    asked.clear()
    monkeypatch.setenv("FS_PLUGINS_OFFLINE", "1")
    with pytest.raises(PSMError, match="damaged"):
        PSM.from_pretrained("someone/psm")
    assert asked == [
        ("someone/psm", "config.json", None, True, False),
        ("someone/psm", "psm.safetensors", COMMIT, True, False),
    ]
