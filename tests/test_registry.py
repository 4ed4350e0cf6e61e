"""The registry: what is found, by whose word, and that nothing is read that is not what it should be."""

from __future__ import annotations

import copy
import hashlib
import http.server
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import yaml
from guided_diffusion import TINY, GuidedDiffusion
from pydantic import ValidationError
from support import TinyEncoder, make_llava, make_psm, tiny_call
from typer.testing import CliRunner

import fs_plugins
from fs_plugins import PSM, FSPluginsWarning, PSMError, RegistryError, hooks, registry, sources
from fs_plugins.choice import find_psm
from fs_plugins.cli import app
from fs_plugins.identity import fingerprint
from fs_plugins.plugins import encoder_families, known_encoders
from fs_plugins.psm import PSMConfig
from fs_plugins.psm.diffusion import load_guided_diffusion
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.sources import PSM_FILES, Source

SHIPPED = registry.shipped()
DATA = yaml.safe_load(registry.shipped_path().read_text())


def write(path: Path, data: object) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def own(llava, tmp_path) -> dict:
    """A registry entry for the test's LLaVA with a PSM beside the file."""
    call = fs_plugins.vision_call(llava)
    make_psm(call).save_pretrained(tmp_path / "psm")
    entry = copy.deepcopy(DATA["encoders"]["demo-clip"])
    entry |= {"architecture": dict(call.architecture), "fingerprint": list(fingerprint(call.module))}
    entry["psms"] = [
        {
            "readout": call.readouts[0].name,
            "state": "shipped",
            "sigma": 0.25,
            "path": "psm",
            "sha256": registry.checksum(tmp_path / "psm"),
        }
    ]
    return {"version": 1, "encoders": {"mine": entry}}


@pytest.mark.parametrize("name", list(SHIPPED.entries))
def test_every_entry_builds_on_the_meta_device_with_its_psms_readouts(name):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    entry = SHIPPED.entries[name]
    facts = entry.architecture.model_dump(exclude={"family"})
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**facts)).eval()
        size = entry.architecture.image_size
        output = model(torch.zeros(1, 3, size, size), output_hidden_states=True)
    assert dict(fs_plugins.vision_call(model).architecture) == entry.architecture.model_dump()
    tokens = (size // entry.architecture.patch_size) ** 2
    width = entry.architecture.hidden_size
    shapes = {
        "pooler_output": (output.pooler_output, (1, width)),
        "hidden_states[-2][1:]": (output.hidden_states[-2][:, 1:], (1, tokens, width)),
        "tokens": (output.last_hidden_state[:, 1:], (1, tokens, width)),
    }
    for psm in SHIPPED.entries[entry.psm_of or name].psms:
        tensor, shape = shapes[psm.readout]
        assert tuple(tensor.shape) == shape


def test_the_registry_names_what_the_paper_uses():
    assert {
        "clip-vit-base-patch16",
        "clip-vit-large-patch14",
        "clip-vit-large-patch14-336",
        "llava-1.5",
        "openflamingo-9b",
    } <= set(SHIPPED.entries)
    for name in ("fare2-clip", "fare4-clip", "tecoa2-clip", "tecoa4-clip"):
        assert SHIPPED.entries[name].psm_of == "clip-vit-large-patch14", "robust encoders use the vanilla one's PSM"
        assert SHIPPED.entries[name].weights.location == f"chs20/{name}"


def test_public_towers_have_their_known_parameter_counts():
    """Counts that the public checkpoints are known by, so that a wrong width cannot slip in."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    known = {"clip-vit-base-patch16": 85_799_424, "clip-vit-large-patch14": 303_179_776, "llava-1.5": 303_507_456}
    for name, count in known.items():
        with torch.device("meta"):
            facts = SHIPPED.entries[name].architecture.model_dump(exclude={"family"})
            assert sum(p.numel() for p in CLIPVisionModel(CLIPVisionConfig(**facts)).parameters()) == count


def test_psm_auto_finds_an_encoder_by_what_it_is(llava, own, tmp_path):
    found = registry.Registry([write(tmp_path / "r.yaml", own)]).find(fs_plugins.vision_call(llava))
    assert (found.name, found.psm_name) == ("mine", "mine")
    half = copy.deepcopy(llava).bfloat16()
    assert registry.Registry([tmp_path / "r.yaml"]).find(fs_plugins.vision_call(half)).name == "mine"


def test_psm_auto_refuses_other_weights_other_readouts_and_other_sigmas(llava, own, tmp_path):
    known = registry.Registry([write(tmp_path / "r.yaml", own)])
    stranger = make_llava()
    with torch.no_grad():
        for p in stranger.model.vision_tower.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    for model, sigma in ((stranger, None), (make_llava(vision_feature_layer=-1), None), (llava, 0.5)):
        with pytest.raises(RegistryError, match="No PSM in the registry fits"):
            known.find(fs_plugins.vision_call(model), sigma)


def test_an_encoder_of_known_architecture_without_a_psm_is_told_so():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        model = CLIPVisionModel(
            CLIPVisionConfig(**SHIPPED.entries["llava-1.5"].architecture.model_dump(exclude={"family"}))
        )
    with pytest.raises(RegistryError, match=r"architecture of clip-vit-large-patch14-336, llava-1.5"):
        SHIPPED.find(fs_plugins.vision_call(model))


def test_a_robust_encoder_takes_the_vanilla_ones_psm_visibly(llava, own, tmp_path):
    robust = copy.deepcopy(llava)
    with torch.no_grad():
        for p in robust.model.vision_tower.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(9)) * 0.05)
    fare = copy.deepcopy(own["encoders"]["mine"]) | {"kind": "fare", "psm_of": "mine"}
    fare["fingerprint"] = list(fingerprint(robust.model.vision_tower))
    del fare["psms"]
    own["encoders"]["fare"] = fare
    match = registry.Registry([write(tmp_path / "r.yaml", own)]).find(fs_plugins.vision_call(robust))
    assert (match.name, match.psm_name) == ("fare", "mine")


def test_checksum_is_compared_before_anything_is_parsed(llava, own, tmp_path, monkeypatch):
    known = registry.Registry([write(tmp_path / "r.yaml", own)])
    match = known.find(fs_plugins.vision_call(llava))
    assert known.load(match).config.name == "random"
    (tmp_path / "psm" / "config.json").write_text((tmp_path / "psm" / "config.json").read_text() + " ")
    monkeypatch.setattr(registry.PSM, "from_pretrained", lambda *_, **__: pytest.fail("parsed before it was verified"))
    with pytest.raises(PSMError, match="checksum"):
        known.load(match)


def test_the_first_file_wins_and_plugins_add_theirs(llava, own, tmp_path):
    other = copy.deepcopy(own)
    other["encoders"]["mine"]["kind"] = "tecoa"
    files = [write(tmp_path / "a.yaml", own), write(tmp_path / "b.yaml", other)]
    assert registry.Registry(files).entries["mine"].kind == "vanilla"
    assert registry.Registry(files[::-1]).entries["mine"].kind == "tecoa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.update(version=2), "version"),
        (lambda d: d["encoders"]["demo-clip"].update(wieghts=1), "wieghts"),
        (lambda d: d["encoders"]["demo-clip"]["architecture"].update(patch_size="big"), "patch_size"),
        (lambda d: d["encoders"]["demo-clip"].update(fingerprint="probably fine"), "fingerprint"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].update(state="perhaps"), "state"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].pop("sha256"), "needs path and sha256"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].update(sha256="123"), "64 hexadecimal digits"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].pop("sigma"), "sigma None does not go with state: shipped"),
        (lambda d: d["encoders"]["demo-clip"]["psms"][0].update(sigma=0.1), "does not hold sigma"),
        (lambda d: d["encoders"]["demo-clip"]["architecture"].pop("patch_size"), "patch_size: clip_vision has"),
        (lambda d: d["encoders"]["demo-clip"]["architecture"].update(colour=1), "colour: clip_vision has"),
        (
            lambda d: d["purifiers"]["diffusion"].update(kind="unet"),
            r"\.pt file is read for kind: diffusion",
        ),
        (lambda d: d["purifiers"]["photo"].update(state="not trained yet"), "'not trained yet' has no path"),
        (lambda d: d["purifiers"].update({"demo-clip": d["purifiers"]["photo"]}), "of an encoder and of a purifier"),
        (lambda d: d["encoders"]["llava-1.5"]["psms"][0].update(sigma=0.25), "not trained yet"),
        (lambda d: d["encoders"]["fare2-clip"].update(psm_of="nobody"), "nobody"),
        (lambda d: d["encoders"]["fare2-clip"].pop("psm_of"), "either psms or psm_of"),
    ],
)
def test_schema_violations_are_refused_with_their_place(tmp_path, change, message):
    data = copy.deepcopy(DATA)
    change(data)
    with pytest.raises(RegistryError, match=message):
        registry.load(write(tmp_path / "r.yaml", data), encoder_families())


def test_kinds_are_words_and_others_may_have_their_own(tmp_path):
    data = copy.deepcopy(DATA)
    data["encoders"]["fare4-clip"]["kind"] = "sim-clip"
    assert registry.load(write(tmp_path / "r.yaml", data)).encoders["fare4-clip"].kind == "sim-clip"
    for kind in ("FARE", "4", "", "two words"):
        data["encoders"]["fare4-clip"]["kind"] = kind
        with pytest.raises(RegistryError, match=r"encoders\.fare4-clip\.kind"):
            registry.load(write(tmp_path / "r.yaml", data))


def test_an_architecture_of_a_family_that_nobody_describes_is_taken_as_it_is(tmp_path):
    data = copy.deepcopy(DATA)
    data["encoders"]["demo-clip"]["architecture"] = {"family": "eye", "lenses": 2}
    found = registry.load(write(tmp_path / "r.yaml", data), encoder_families())
    assert found.encoders["demo-clip"].architecture.model_dump() == {"family": "eye", "lenses": 2}


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(RegistryError, match="Cannot read"):
        registry.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("encoders: [")
    with pytest.raises(RegistryError, match="not YAML"):
        registry.load(tmp_path / "bad.yaml")
    (tmp_path / "latin.yaml").write_bytes("# é".encode("latin-1"))
    with pytest.raises(RegistryError, match="not text in UTF-8"):
        registry.load(tmp_path / "latin.yaml")


def test_a_psm_given_by_hand_for_a_lora_or_foreign_encoder_warns(llava, tmp_path):
    make_psm(fs_plugins.vision_call(llava), fingerprint=(1.0,) * 16).save_pretrained(tmp_path / "psm")
    with pytest.warns(FSPluginsWarning, match="measure it"):
        fs_plugins.enable(llava, psm=tmp_path / "psm")


SHA = "a" * 64
COMMIT = "c" * 40


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


@pytest.fixture
def online(tmp_path, monkeypatch):
    """An empty cache, no registry of the user's, and leave to fetch."""
    for name in ("FS_PLUGINS_REGISTRY", *sources.OFFLINE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FS_PLUGINS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "cache"


@pytest.fixture
def site(tmp_path, call):
    """A PSM that somebody publishes."""
    make_psm(call).save_pretrained(tmp_path / "site")
    return tmp_path / "site"


def published(folder: Path, **changes) -> Source:
    size = sum((folder / name).stat().st_size for name in PSM_FILES)
    facts = {"state": "url", "path": folder.as_uri() + "/", "sha256": sources.checksum(folder), "size": size}
    return Source(**{**facts, **changes})


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


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


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def corrupted(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def longer(data: bytes) -> bytes:
    return data + bytes(3_000_000)


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
    (tmp_path / "cache").write_text("a file where the cache should be")
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


def killed(script: str, until, feed=lambda: None) -> None:
    """Run a script, with ``feed()`` beside it, and kill it as soon as ``until()`` holds."""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    threading.Thread(target=feed, daemon=True).start()
    limit = time.time() + 60
    while not until() and process.poll() is None and time.time() < limit:
        time.sleep(0.02)
    ended = process.poll()
    process.send_signal(signal.SIGKILL)
    _, complaints = process.communicate()
    assert ended is None, complaints
    assert until()


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
    assert left.exists(), "another process might be at it"
    for path in (left, left.parent):
        os.utime(path, (0, 0))
    (online / source.sha256 / "model.pt").unlink()
    source.fetch(Path(), "It")
    assert files(online) == [f"{source.sha256}/model.pt"], "what is old was left by a process that is gone"


class Bomb:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_a_bomb_goes_off_if_it_is_loaded(tmp_path):
    """The tests below could not fail otherwise."""
    torch.save({"w": Bomb(tmp_path / "mark")}, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "mark").exists()


def purifiers(tmp_path: Path, **facts) -> registry.Registry:
    entry = {"kind": "diffusion", "args": {**TINY, "channels": [32]}, "sigma": 0.25, "sigma_range": [0.1, 1.0], **facts}
    return registry.Registry([write(tmp_path / "purifiers.yaml", {"version": 1, "purifiers": {"mine": entry}})])


def in_one_file(path: Path) -> dict:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"state": "url", "path": path.as_uri(), "sha256": digest, "size": path.stat().st_size}


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_that_bears_code_is_refused_and_nothing_in_it_is_run(online, tmp_path, legacy):
    torch.save({"w": Bomb(tmp_path / "mark")}, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(PSMError, match="something other than tensors"):
        purifiers(tmp_path, **in_one_file(tmp_path / "model.pt")).purifier("mine")
    assert not (tmp_path / "mark").exists()


def test_a_pickle_in_the_place_of_safetensors_is_refused_and_nothing_in_it_is_run(call, tmp_path):
    make_psm(call).save_pretrained(tmp_path / "psm")
    data = pickle.dumps(Bomb(tmp_path / "mark"))
    old = hashlib.sha256((tmp_path / "psm" / "psm.safetensors").read_bytes()).hexdigest()
    (tmp_path / "psm" / "psm.safetensors").write_bytes(data)
    config = (tmp_path / "psm" / "config.json").read_text()
    (tmp_path / "psm" / "config.json").write_text(config.replace(old, hashlib.sha256(data).hexdigest()))
    with pytest.raises(PSMError, match="does not hold the weights"):
        PSM.from_pretrained(tmp_path / "psm")
    assert not (tmp_path / "mark").exists()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.manual_seed(0)
    torch.save(GuidedDiffusion(**TINY).state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_a_checkpoint_with_another_checksum_is_not_parsed(online, checkpoint, tmp_path, monkeypatch):
    known = purifiers(tmp_path, **{**in_one_file(checkpoint), "state": "folder", "path": str(checkpoint)})
    checkpoint.write_bytes(corrupted(checkpoint.read_bytes()))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("parsed before it was verified"))
    with pytest.raises(PSMError, match=r"The purifier 'mine' in .* does not have the registry's checksum"):
        known.purifier("mine")


def test_a_checkpoint_is_converted_once_into_a_psm_for_any_encoder(online, checkpoint, tmp_path, monkeypatch):
    reference = load_guided_diffusion(checkpoint, **TINY)
    known = purifiers(tmp_path, **in_one_file(checkpoint))
    first = known.purifier("mine")
    assert (first.config.name, first.config.sigma, first.config.sigma_range) == ("mine", 0.25, (0.1, 1.0))
    assert (first.config.image_size, first.config.fingerprint, first.mapped) == (None, (), ())
    assert not any(parameter.requires_grad for parameter in first.parameters())
    monkeypatch.setenv("FS_PLUGINS_OFFLINE", "1")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("converted again"))
    checkpoint.unlink()
    again = known.purifier("mine")
    assert again.config == first.config
    for size in ((8, 8), (16, 20)):
        images = torch.rand(2, 3, *size)
        expected = reference(images, 0.25)
        assert torch.equal(first.purify(images, 0.25), expected)
        assert torch.equal(again.purify(images, 0.25), expected)


def test_a_damaged_conversion_is_made_again(online, checkpoint, tmp_path):
    known = purifiers(tmp_path, **in_one_file(checkpoint))
    expected = known.purifier("mine").state_dict()
    (weights,) = online.glob("*-converted/psm.safetensors")
    weights.write_bytes(truncated(weights.read_bytes()))
    found = known.purifier("mine").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_a_conversion_that_is_killed_leaves_nothing_that_looks_finished(online, checkpoint, tmp_path):
    known = purifiers(tmp_path, **in_one_file(checkpoint))
    script = f"""
import time
from pathlib import Path
from fs_plugins import registry
from fs_plugins.psm import bundle

def half(weights, path, **_):
    Path(path).write_bytes(b"half a file")
    time.sleep(60)

bundle.save_file = half
registry.Registry([Path({str(tmp_path / "purifiers.yaml")!r})]).purifier("mine")
"""
    killed(script, lambda: [path for path in online.rglob("psm.safetensors") if path.stat().st_size])
    assert not list(online.glob("*-converted/psm.safetensors"))
    assert not list(online.glob("*-converted/config.json"))
    assert known.purifier("mine").purifier is not None


def test_enable_takes_a_purifier_by_its_name(online, checkpoint, tmp_path, llava, monkeypatch):
    """A registry of the user's puts a small checkpoint in the public one's place."""
    entry = {"kind": "diffusion", "args": TINY, "sigma": 0.25, "sigma_range": [0.1, 1.0], **in_one_file(checkpoint)}
    write(tmp_path / "own.yaml", {"version": 1, "purifiers": {"diffusion": entry}})
    monkeypatch.setenv("FS_PLUGINS_REGISTRY", str(tmp_path / "own.yaml"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diffusion").mkdir()
    with fs_plugins.enable(llava, psm="diffusion", sigma=0.5) as handle:
        (vision,) = handle.status().vision
        assert (vision.psm, vision.purifier, vision.sigma) == ("diffusion", "diffusion", 0.5)
    with pytest.raises(PSMError, match="is no PSM folder"):
        fs_plugins.enable(llava, psm="./diffusion")


def test_purifiers_that_are_none_are_told(online, call, tmp_path):
    with pytest.raises(RegistryError, match="'mine' is not trained yet"):
        purifiers(tmp_path, state="not trained yet", sigma=None, sigma_range=None).purifier("mine")
    with pytest.raises(RegistryError, match=r"'nobody' is no purifier.*Trained ones: .*diffusion"):
        SHIPPED.purifier("nobody")
    make_psm(call).save_pretrained(tmp_path / "psm")
    facts = in_folder(tmp_path)
    with pytest.raises(PSMError, match="no mapper"):
        purifiers(tmp_path, **facts).purifier("mine")


def test_the_public_diffusion_purifier_is_in_the_registry_that_ships():
    entry = SHIPPED.purifiers["diffusion"]
    assert (entry.kind, entry.state, entry.size, entry.licence) == ("diffusion", "url", 2_211_383_297, "MIT")
    assert entry.sha256.startswith("a37c32fffd316cd4")
    assert entry.names == ("256x256_diffusion_uncond.pt",)


def in_folder(root) -> dict:
    """An entry's facts of the PSM in the folder ``psm``."""
    return {
        "state": "folder",
        "path": "psm",
        "sha256": registry.checksum(root / "psm"),
        "kind": "unet",
        "args": {},
    }


def any_size(call, **changes) -> PSM:
    return make_psm(call, mapper=False, image_size=None, fingerprint=(), encoder="any", **changes)


def test_a_psm_without_mappers_may_serve_any_size_and_encoder(call, llava, tmp_path, monkeypatch):
    any_size(call).save_pretrained(tmp_path / "psm")
    facts = in_folder(tmp_path)
    purifier = purifiers(tmp_path, **facts).purifier("mine")
    for other in (call, fs_plugins.vision_call(llava)):
        purifier.check(other, 0.25)
        assert find_psm(other, purifier, None, pytest.fail) == (purifier, []), "and nobody is warned of other weights"
    free = tiny_call(TinyEncoder(), image_size=None)
    smoother = FeatureSmoother(free, psm=purifier, sigma=0.25, seed=0)
    assert smoother.smooth(torch.rand(1, 3, 8, 8))["tokens"].shape == (1, 4, 6)


@pytest.mark.parametrize("change", [{"image_size": None}, {"fingerprint": ()}])
def test_a_mapper_belongs_to_one_encoder(call, change):
    config = make_psm(call).config.model_dump()
    with pytest.raises(ValidationError, match="a mapper belongs to one encoder"):
        PSMConfig.model_validate(config | change)


@pytest.fixture
def hub(call, tmp_path, monkeypatch, online):
    """The hub's own cache on disk with one PSM at one commit; it is offline all the time."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "models--someone--psm" / "snapshots" / COMMIT
    make_psm(call).save_pretrained(folder)
    return folder


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


def put_psm(path: Path, own: dict, name: str, folder: Path, **changes) -> Path:
    """A registry file whose one entry is ``own``'s encoder with the PSM in ``folder``."""
    entry = copy.deepcopy(own["encoders"]["mine"]) | changes
    entry["psms"][0] |= {"state": "folder", "path": str(folder), "sha256": registry.checksum(folder)}
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, {"version": 1, "encoders": {name: entry}})


@pytest.fixture
def manager():
    hooks.plugin_manager.cache_clear()
    yield hooks.plugin_manager()
    hooks.plugin_manager.cache_clear()


def test_the_users_registry_comes_before_plugins_and_they_before_the_one_that_ships(
    online, manager, llava, own, tmp_path, monkeypatch
):
    call = fs_plugins.vision_call(llava)
    for name in ("user", "plugin"):
        make_psm(call, name=f"psm of the {name}").save_pretrained(tmp_path / name)
    user = put_psm(registry.user_path(), own, "demo-clip", tmp_path / "user")
    plugin = put_psm(tmp_path / "plugin.yaml", own, "demo-clip", tmp_path / "plugin")
    module = types.ModuleType("plugin")
    module.fs_registries = fs_plugins.hookimpl(lambda: [plugin])
    hooks.register(manager, module, "plugin")
    assert user == tmp_path / "config" / "fs-plugins" / "registry.yaml"
    assert known_encoders().files["demo-clip"] == [user, plugin, registry.shipped_path()]
    for expected in ("psm of the user", "psm of the plugin"):
        with fs_plugins.enable(llava) as handle:
            assert handle.status().vision[0].psm == expected
        user.unlink(missing_ok=True)
    user.parent.joinpath("elsewhere.yaml").touch()
    monkeypatch.setenv("FS_PLUGINS_REGISTRY", str(user.parent / "elsewhere.yaml"))
    assert known_encoders().files["demo-clip"] == [plugin, registry.shipped_path()], (
        "an empty file is an empty registry"
    )
    monkeypatch.setenv("FS_PLUGINS_REGISTRY", str(user.parent / "typing error.yaml"))
    with pytest.raises(RegistryError, match=r"Cannot read the registry .*typing error\.yaml"):
        known_encoders()


def test_two_psms_for_the_same_weights_the_first_wins_visibly(llava, own, tmp_path):
    call = fs_plugins.vision_call(llava)
    paths = []
    for name in ("first", "second"):
        make_psm(call, name=name).save_pretrained(tmp_path / name)
        paths.append(put_psm(tmp_path / f"{name}.yaml", own, name, tmp_path / name))
    known = registry.Registry(paths)
    match = known.find(call)
    assert (match.name, match.passed_over, match.file) == ("first", ("second",), paths[0])
    assert known.load(match).config.name == "first"
    assert (known.passed_over("first"), known.passed_over("second")) == ({}, {"first": ["hidden_states[-2][1:]"]})
    assert "first (by its fingerprint)" in str(match)
    assert str(match).endswith("passed over: second")
    assert registry.Registry(paths[::-1]).find(call).name == "second"


def test_a_match_says_whose_psm_a_robust_encoder_gets_and_how_sure_that_is(llava, own, tmp_path):
    call = fs_plugins.vision_call(llava)
    own["encoders"]["mine"]["fingerprint"] = [float(i) for i in range(16)]
    fare = {key: value for key, value in own["encoders"]["mine"].items() if key != "psms"}
    own["encoders"]["fare"] = fare | {"kind": "fare", "psm_of": "mine", "fingerprint": list(fingerprint(call.module))}
    match = registry.Registry([write(tmp_path / "r.yaml", own)]).find(call)
    assert str(match).startswith(
        "fare (by its fingerprint): PSM of mine, used unchanged, hidden_states[-2][1:], sigma 0.25"
    )
    own["encoders"]["fare"]["fingerprint"] = "unverified"
    match = registry.Registry([write(tmp_path / "r.yaml", own)]).find(call)
    assert not match.verified
    assert "architecture alone" in str(match)


def test_a_name_belongs_to_the_first_file_whatever_it_is_there(tmp_path):
    hiding = {"version": 1, "purifiers": {"clip-vit-large-patch14": {"kind": "unet", "state": "not trained yet"}}}
    known = registry.Registry([write(tmp_path / "r.yaml", hiding), registry.shipped_path()])
    assert "clip-vit-large-patch14" not in known.entries
    assert known.psms("fare4-clip") == ()
    assert known.files["clip-vit-large-patch14"] == [tmp_path / "r.yaml", registry.shipped_path()]


def test_encoders_of_any_family_can_be_listed(own, tmp_path):
    call = tiny_call(TinyEncoder().eval())
    make_psm(call).save_pretrained(tmp_path / "psm")
    entry = own["encoders"]["mine"] | {
        "architecture": {"family": "tiny"},
        "fingerprint": list(fingerprint(call.module)),
    }
    entry["psms"][0] |= {"readout": "tokens", "sha256": registry.checksum(tmp_path / "psm")}
    known = registry.Registry([write(tmp_path / "r.yaml", {"version": 1, "encoders": {"tiny": entry}})])
    assert known.find(call).name == "tiny"
    with pytest.raises(RegistryError, match=r"tokens, None pixels|No PSM"):
        known.find(tiny_call(TinyEncoder(seed=1).eval()))


def told(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["registry", *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture
def trained(online, llava, tmp_path) -> tuple[Path, Path]:
    """A small model on disk, and a PSM that was trained for it."""
    llava.save_pretrained(tmp_path / "model")
    make_psm(fs_plugins.vision_call(llava), name="new").save_pretrained(tmp_path / "psm")
    return tmp_path / "model", tmp_path / "psm"


def test_add_puts_a_psm_into_the_users_file_where_enable_finds_it(trained, llava):
    model, psm = trained
    path = registry.user_path()
    with pytest.warns(FSPluginsWarning, match="'photo' stands in"):
        fs_plugins.enable(llava).disable()
    assert f"new is at the top of {path}" in told("add", str(psm), "--encoder", str(model))
    with fs_plugins.enable(llava) as handle:
        assert handle.status().vision[0].psm == "new"
    entry = registry.load(path).encoders["new"]
    assert entry.fingerprint == fingerprint(llava.model.vision_tower)
    assert entry.psms[0].model_dump(exclude_none=True) == {
        "state": "folder",
        "path": str(psm),
        "sha256": registry.checksum(psm),
        "readout": "hidden_states[-2][1:]",
        "sigma": 0.25,
        "sigma_range": (0.25, 0.25),
    }
    assert f"yours {path}"[6:] in told("list")
    assert "right new, hidden_states[-2][1:]" in told("verify", "new")
    assert "right new, weights" in told("verify", "new")


def test_add_refuses_a_name_that_exists_unless_it_is_to_be_replaced(trained, llava, tmp_path):
    model, psm = trained
    told("add", str(psm), "--encoder", str(model))
    before = registry.user_path().read_bytes()
    assert "'new' is in" in told("add", str(psm), code=2)
    assert "'demo-clip' is in" in told("add", str(psm), "--name", "demo-clip", code=2)
    assert registry.user_path().read_bytes() == before
    make_psm(fs_plugins.vision_call(llava), name="better").save_pretrained(tmp_path / "better")
    told("add", str(tmp_path / "better"), "--name", "new", "--replace")
    assert list(registry.load(registry.user_path()).encoders) == ["new"]
    with fs_plugins.enable(llava) as handle:
        assert handle.status().vision[0].psm == "better"
    answer = told("add", str(psm), "--name", "newest")
    assert "new: newest comes first for hidden_states[-2][1:] of the same weights" in answer
    assert known_encoders().find(fs_plugins.vision_call(llava)).passed_over == ("new",)
    assert "demo-clip hides" not in told("list")
    told("add", str(psm), "--name", "demo-clip", "--replace")
    assert f"demo-clip: {registry.user_path()} hides what {registry.shipped_path()} says of it" in told("list")


def test_add_refuses_what_is_damaged_unknown_or_of_another_encoder(trained, tmp_path):
    model, psm = trained
    assert "Say what it was trained for: --encoder" in told("add", str(psm), code=2)
    assert "other weights than those of demo-clip" in told("add", str(psm), "--encoder", "demo-clip", code=2)
    assert "other weights than those of the model demo" in told("add", str(psm), "--encoder", "demo", code=2)
    assert "is no PSM folder" in told("add", str(tmp_path), code=2)
    assert "No PSM folder at" in told("add", str(tmp_path / "nowhere"), code=2)
    assert "needs path and sha256" in told("add", "https://example.org/psm/", code=2)
    assert "begins with https" in told("add", "http://example.org/psm/", "--sha256", SHA, code=2)
    assert "does not have the registry's checksum" in told("add", str(psm), "--sha256", SHA, code=2)
    make_psm(fs_plugins.vision_call(make_llava(vision_feature_layer=-1))).save_pretrained(tmp_path / "last")
    assert "maps readout 'hidden_states[-1]" in told("add", str(tmp_path / "last"), "--encoder", str(model), code=2)
    weights = psm / "psm.safetensors"
    weights.write_bytes(corrupted(weights.read_bytes()))
    assert "is damaged" in told("add", str(psm), "--encoder", str(model), code=2)
    assert registry.load(registry.user_path()).encoders == {}


def test_add_takes_pinned_repositories_and_urls(trained, hub, tmp_path):
    model, psm = trained
    for name in PSM_FILES:
        shutil.copy(psm / name, hub / name)
    assert "the 40 hexadecimal digits" in told("add", "someone/psm@main", code=2)
    assert "The hub did not give" in told("add", f"someone/psm@{'d' * 40}", code=2)
    told("add", f"someone/psm@{COMMIT}", "--encoder", str(model), "--name", "from-hub")
    told("add", psm.as_uri() + "/", "--sha256", registry.checksum(psm), "--name", "from-url")
    found = registry.load(registry.user_path()).encoders
    assert [(entry.psms[0].state, entry.psms[0].revision) for entry in found.values()] == [
        ("url", None),
        ("hub", COMMIT),
    ]
    assert {entry.psms[0].sha256 for entry in found.values()} == {registry.checksum(psm)}


def test_add_lists_a_psm_without_mappers_as_a_purifier(online, call, tmp_path):
    any_size(call).save_pretrained(tmp_path / "psm")
    told("add", str(tmp_path / "psm"), "--name", "mine")
    assert known_encoders().purifier("mine").config.image_size is None
    assert "mine unet any 0.25 folder psm yours" in told("list")


def test_a_users_file_that_would_break_stays_as_it_was(online, tmp_path):
    path = registry.user_path()
    path.parent.mkdir(parents=True)
    path.write_text("# a comment\nversion: 1\n")
    with pytest.raises(RegistryError, match="breaks its schema"):
        registry.put(path, "purifiers", "mine", {"kind": "unet", "state": "perhaps"})
    assert path.read_text() == "# a comment\nversion: 1\n"
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    registry.put(link, "purifiers", "mine", {"kind": "unet", "state": "not trained yet"})
    assert link.is_symlink()
    assert list(registry.load(path).purifiers) == ["mine"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with pytest.raises(RegistryError, match="no file to write"):
        registry.put(tmp_path, "purifiers", "mine", {"kind": "unet", "state": "not trained yet"})


def test_verify_finds_what_is_wrong_and_says_what_it_could_not_check(trained, tmp_path):
    model, psm = trained
    told("add", str(psm), "--encoder", str(model))
    path = registry.user_path()
    data = yaml.safe_load(path.read_text())
    data["purifiers"] = {
        "far": {"kind": "diffusion", "sigma": 0.25, "state": "url", "path": "https://example.org/far.pt", "sha256": SHA}
    }
    write(path, data)
    assert "unchecked far not on this machine: url https://example.org/far.pt" in told("verify", "far")

    def wrong(change, message: str) -> None:
        broken = copy.deepcopy(data)
        change(broken["encoders"]["new"])
        write(path, broken)
        assert message in told("verify", "new", code=1)
        write(path, data)

    wrong(lambda e: e["psms"][0].update(sha256=SHA), "has the checksum")
    wrong(lambda e: e["psms"][0].update(path=str(tmp_path / "gone")), "not on this machine: folder")
    wrong(lambda e: e["psms"][0].update(sigma_range=[0.1, 0.5]), "WRONG new")
    wrong(lambda e: e["psms"][0].update(readout="pooler_output"), "has no mapper for pooler_output")
    wrong(lambda e: e.update(fingerprint=[1.0] * 16), "was trained for other weights")
    wrong(lambda e: e.update(fingerprint=[1.0] * 16), "WRONG new, weights")
    told("verify", "new")
    weights = psm / "psm.safetensors"
    weights.write_bytes(truncated(weights.read_bytes()))
    assert "WRONG new" in told("verify", "new", code=1)
    assert "no entry 'nobody'" in told("verify", "nobody", code=2)
    assert "Nothing to check" in told("verify", "llava-1.5")


def test_verify_looks_at_conversions_too(online, checkpoint, tmp_path, monkeypatch):
    known = purifiers(tmp_path, **in_one_file(checkpoint))
    assert [check.right for check in known.verify()] == [None]
    known.purifier("mine")
    assert [(check.what, check.right) for check in known.verify()] == [("mine", True), ("mine, converted", True)]
    (weights,) = online.glob("*-converted/psm.safetensors")
    weights.write_bytes(corrupted(weights.read_bytes()))
    assert [check.right for check in known.verify()] == [True, False]
    (download,) = online.glob("*/model.pt")
    download.write_bytes(corrupted(download.read_bytes()))
    assert [check.right for check in known.verify("mine")] == [False, False]


def test_list_and_show_tell_everything_of_the_registry_that_ships(online):
    listed = told("list")
    for name, entry in SHIPPED.entries.items():
        assert name in listed
        assert name in told("show", name) or entry.weights.location in told("show", name)
    assert "photo unet any 0.05 to 0.5 shipped photo shipped" in listed
    assert "fare4-clip fare those of clip-vit-large-patch14 shipped" in listed
    assert "diffusion diffusion any 0.01 to 1 url 256x256_diffusion_uncond.pt shipped" in listed
    assert "trained for clip-vit-large-patch14 and are used unchanged" in told("show", "fare4-clip")
    shown = told("show", "diffusion")
    for fact in ("licence MIT", "size 2211383297", SHIPPED.purifiers["diffusion"].sha256):
        assert fact in shown
    assert "The registry has no entry 'nobody'" in told("show", "nobody", code=2)
