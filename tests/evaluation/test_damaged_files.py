"""What a run wrote and a later one reads is refused by name when it is damaged: every kind of file, every damage."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pages import SUITES as ASKED
from pages import make
from support import make_psm, tiny_call

from fs_plugins import Certificate, SettingError, kept
from fs_plugins.attacks.masking import MaskingReport, Strength
from fs_plugins.certificates import PredictionCertificate
from fs_plugins.certificates.bounds import Band
from fs_plugins.certificates.ledger import File, Ledger, Row
from fs_plugins.evaluation.record import Record
from fs_plugins.evaluation.results import Results
from fs_plugins.evaluation.store import Store
from fs_plugins.evaluation.suites import SUITES
from fs_plugins.training import TrainingFolder

SETTINGS = {
    "n": 40, "alpha": 0.001, "method": "best", "angular": False, "target": None, "threshold": 0.5, "sigma": 0.25,
    "seed": 3, "psm": ["mine", "digest", "structure"], "readouts": ["tokens"], "labels": ["cat", "dog"],
}  # fmt: skip
TRAINING = {"name": "t", "config": {"seed": 0, "lambda3": 1.0}}
STAGES = {"purifier": 6, "mapper": 4}
TOLD = {"psm": "mine", "seed": "seed 3", "readouts": ("tokens",)}
FLIPS = 150


class Kind(NamedTuple):
    """A kind of file: where one lies that was just written, and what it is read as."""

    path: Path
    read: Callable[[], Any]


def scores(seed: int):
    return torch.rand(40, generator=torch.Generator().manual_seed(seed)).double().numpy() / 4 + 0.7


def features(seed: int) -> Certificate:
    return Certificate.from_scores(scores(seed), sigma=0.25, **TOLD)


def prediction(seed: int) -> PredictionCertificate:
    return PredictionCertificate.from_draws(38, scores(seed)[:, None], predicted=1, label="dog", sigma=0.25, **TOLD)


def ledger_of(path: Path, of: Callable[[int], Any]) -> Kind:
    ledger = Ledger(path, type(of(0)), SETTINGS, b"key")
    for i in range(3):
        ledger.add(str(i), torch.full((3, 2, 2), i / 4), of(i))

    def read():
        before = File.read(path)
        Ledger(path, type(of(0)), SETTINGS, b"key")
        return before and [before.settings, before.key, *before.rows(type(of(0))).values()]

    return Kind(path, read)


def evaluation(folder: Path) -> dict[str, Kind]:
    results = make(folder, suites=(*ASKED, SUITES["masking"]))
    store = results.store
    store.hold("fs_psm", {"psm": ["mine", "digest"], "sigma": 0.25, "n0": 4})
    strengths = tuple(Strength(name, (0.25, -0.5, 0.125)) for name in ("none", "oblivious", "adaptive"))
    eps = SUITES["masking"].conditions[0].eps
    report = MaskingReport(eps, strengths, 1.0, ("Something speaks for them.",))
    kept.write(store.masking_file(eps), json.loads(json.dumps(report, default=vars)))
    settings = kept.read(store.folder / "settings.json", "an evaluation")
    picture = store.path("attacked/none/foa-16", "images/0.png")
    [certificates] = store.certificates("fs_psm")

    def again(path: Path, hold: Callable[[], object]) -> Kind:
        return Kind(path, lambda: (hold(), path.read_bytes())[1])

    return {
        "settings.json": again(store.folder / "settings.json", lambda: Store.begin(store.folder, settings)),
        "evaluation.json": Kind(store.folder / "evaluation.json", lambda: Record.read(store.folder)),
        "defence.json": again(
            store.folder / "defences" / "fs_psm.json",
            lambda: store.hold("fs_psm", {"psm": ["mine", "digest"], "sigma": 0.25, "n0": 4}),
        ),
        "masking.json": Kind(store.masking_file(eps), lambda: results.tables()[-1].rows),
        "answers.jsonl": Kind(
            store.folder / "answers" / "none" / "clean.0.jsonl", lambda: list(store.rows("none/clean").values())
        ),
        "judged.jsonl": Kind(store.folder / "judged.jsonl", lambda: list(store.scores("exact").items())),
        "certificates.jsonl": Kind(
            certificates, lambda: list(Results(folder).certificates(ASKED[3].defences[0]).get(0.25, {}).items())
        ),
        "picture": Kind(
            picture,
            lambda: None if (found := store.attacked("none/foa-16", "images/0.png")) is None else found.tolist(),
        ),
    }


def training(path: Path, *, finished: bool) -> TrainingFolder:
    folder = TrainingFolder(path)
    folder.begin(TRAINING, STAGES, "purifier", 0)
    for step in (2, 4):
        folder.log("purifier", step, {"l_rb": 0.5 / step, "lr": 1e-05})
    folder.save({"stage": "purifier", "step": 4, "psm": {"weight": torch.arange(30.0)}, "scaler": None})
    if finished:
        (path / "held-out.txt").write_text("a.png\nb.png\n", "utf-8")
        folder.publish(make_psm(tiny_call(torch.nn.Linear(4, 4)), mapper=False), "# card\n")
    return folder


def trainings(root: Path) -> dict[str, Kind]:
    going, done = training(root / "going", finished=False), training(root / "done", finished=True)

    def log():
        state = going.load(TRAINING)
        TrainingFolder(going.path).begin(TRAINING, STAGES, "purifier", 4, state["log"])
        return (going.path / "log.csv").read_bytes().split(b"\n")

    def checkpoint():
        state = going.load(TRAINING)
        return [state["stage"], state["step"], state["psm"]["weight"].tolist(), state["log"]]

    def result():
        return {name: value.tolist() for name, value in done.load(TRAINING)["psm"].items()}

    names = ("psm.safetensors", "config.json", "held-out.txt", "log.csv", "SHA256SUMS")
    return {
        "training.json": Kind(going.path / "training.json", lambda: going.load(TRAINING)["step"]),
        "checkpoint.pt": Kind(going.path / "checkpoint.pt", checkpoint),
        "log.csv": Kind(going.path / "log.csv", log),
        **{f"finished {name}": Kind(done.path / name, result) for name in names},
    }


KINDS = (
    *("features", "predictions"),
    *("settings.json", "evaluation.json", "defence.json", "masking.json", "answers.jsonl", "judged.jsonl"),
    *("certificates.jsonl", "picture", "training.json", "checkpoint.pt", "log.csv"),
    *(f"finished {name}" for name in ("psm.safetensors", "config.json", "held-out.txt", "log.csv", "SHA256SUMS")),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Kind]:
    root = tmp_path_factory.mktemp("written")
    return {
        "features": ledger_of(root / "features.jsonl", features),
        "predictions": ledger_of(root / "predictions.jsonl", prediction),
        **evaluation(root / "evaluation"),
        **trainings(root),
    }


def test_every_kind_is_swept(written):
    assert set(written) == set(KINDS)


ADVICE = ("Remove", "Delete", "Put back", "Give another", "Give the same", "into another folder")


def is_refused(kind: Kind, data: bytes, whole: Any) -> bool:
    """Whether reading a damaged file is an error; if not, what was read is but less than what was written."""
    kind.path.write_bytes(data)
    found, told = None, ""
    try:
        found = kind.read()
    except SettingError as error:
        told = str(error)
    if told:
        assert kind.path.name in told
        assert any(advice in told for advice in ADVICE), told
        return True
    if found is not None:
        assert isinstance(found, list), found
        assert len(found) < len(whole), "nothing damaged is believed"
        assert found in (whole[: len(found)], [*whole[: len(found) - 1], b""]), "what is left is as it was written"
    return False


@pytest.mark.parametrize("name", KINDS)
def test_no_file_with_a_flipped_bit_is_believed(written, name):
    kind = written[name]
    data, whole = kind.path.read_bytes(), kind.read()
    data = kind.path.read_bytes()
    chance = random.Random(name)
    try:
        for _ in range(FLIPS):
            place, bit = chance.randrange(len(data)), chance.randrange(8)
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            if not is_refused(kind, bytes(damaged), whole):
                assert place == len(data) - 1, "only a last line break makes its line a cut one"
    finally:
        kind.path.write_bytes(data)
    assert kind.read() == whole


DEEP = b'{"settings": ' + b"[" * 10_000 + b"]" * 10_000
HUGE = b'{"settings": 1' + b"0" * 5_000
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "blank": lambda data: b"",
    "a blank line": lambda data: b"\n" + data,
    "NUL": lambda data: b"\0" * len(data),
    "a NUL inside": lambda data: data[: len(data) // 2] + b"\0" + data[len(data) // 2 :],
    "no UTF-8": lambda data: b"\xff\xfe" + data,
    "a list": lambda data: b'[{"settings": {}}]\n',
    "a number": lambda data: b"7\n",
    "nested": lambda data: DEEP + b"}\n",
    "huge": lambda data: HUGE + b"}\n",
    "nested and sealed": lambda data: kept.stamped(DEEP + b', "seal": "' + b"0" * 32 + b'"}') + b"\n",
    "huge and sealed": lambda data: kept.stamped(HUGE + b', "seal": "' + b"0" * 32 + b'"}') + b"\n",
    "a list and sealed": lambda data: kept.stamped(b'["seal", {"seal": "' + b"0" * 32 + b'"}]') + b"\n",
    "sealed, of another kind": lambda data: kept.sealed({"settings": {"a": [1]}, "key": "00"}) + b"\n",
    "twice": lambda data: data + data,
    "the last line twice": lambda data: data + data.splitlines(keepends=True)[-1],
    "cut": lambda data: data[: len(data) // 2],
    "without its checksum": lambda data: data.replace(b'"seal"', b'"soul"').replace(b"SHA-256", b"SHA-512")[:-1] + b" ",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", KINDS)
def test_every_damage_is_a_sentence_that_names_the_file_and_what_to_do(written, name, damage):
    kind = written[name]
    data, whole = kind.path.read_bytes(), kind.read()
    data = kind.path.read_bytes()
    try:
        is_refused(kind, DAMAGES[damage](data), whole)
    finally:
        kind.path.write_bytes(data)


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("finished")])
def test_what_is_missing_of_a_finished_training_is_named(written, name):
    kind = written[name]
    data = kind.path.read_bytes()
    kind.path.unlink()
    try:
        with pytest.raises(SettingError, match=rf"finished, but {kind.path.name}.* is missing"):
            kind.read()
    finally:
        kind.path.write_bytes(data)


def test_the_card_of_a_finished_training_may_be_edited(written):
    kind = written["finished config.json"]
    (kind.path.parent / "README.md").write_text("# My own words\n", "utf-8")
    assert kind.read()


def test_a_lost_log_begins_anew(tmp_path):
    folder = training(tmp_path, finished=False)
    (tmp_path / "log.csv").unlink()
    for _ in range(2):  # it may be stopped again before the next checkpoint
        TrainingFolder(tmp_path).begin(TRAINING, STAGES, "purifier", 4, folder.load(TRAINING)["log"])
    assert (tmp_path / "log.csv").read_text("utf-8").count("\n") == 1


FORGED = {
    "sigma": 0.5, "alpha": 0.05, "n": 39, "method": "mean", "lower": 0.99, "mean": 0.5, "share": 0.5, "seed": "seed 4",
    "psm": None, "readouts": ("pooled",), "band": "support", "band ": "survival",
}  # fmt: skip


@pytest.mark.parametrize("field", FORGED)
def test_a_certificate_that_the_settings_cannot_have_given_is_refused(tmp_path, field):
    value, certificate = FORGED[field], features(1)
    if isinstance(certificate.band, Band) and field.startswith("band"):
        forged = [min(1.0, level + 0.1) for level in getattr(certificate.band, value)]
        value = replace(certificate.band, **{value: tuple(forged)})
    told = json.loads(certificate.to_json()) | {field.strip(): value if not isinstance(value, Band) else vars(value)}
    if field == "method":
        told["band"] = None
    refused(tmp_path, told, Certificate)


@pytest.mark.parametrize(
    ("field", "value"),
    [("sigma", 0.5), ("alpha", 0.05), ("n", 50), ("votes", 39), ("vote_radius", 0.9), ("feature_radius", 9.0),
     ("label", "cat"), ("predicted", 0), ("share", 0.5)],
)  # fmt: skip
def test_a_prediction_that_the_settings_cannot_have_given_is_refused(tmp_path, field, value):
    refused(tmp_path, json.loads(prediction(1).to_json()) | {field: value}, PredictionCertificate)


def refused(folder: Path, certificate: dict[str, Any], kind: type[Any]) -> None:
    path, true = folder / "rows.jsonl", {Certificate: features, PredictionCertificate: prediction}[kind](0)
    rows = [Row("0", "", true).line, {"image": "1", "sha256": "", "certificate": certificate}]
    File(path, SETTINGS, b"key", rows).write()
    with pytest.raises(SettingError, match=r"rows\.jsonl .* in line 3: .* Remove the line"):
        Ledger(path, kind, SETTINGS, b"key")


def test_a_store_says_where_a_row_is_told_again(tmp_path):
    store = make(tmp_path).store
    other = Store(store.folder, process=1)
    other.add("none/clean", [{"image": "images/1.png", "task": "classification", "reply": "2", "seconds": 0.5}])
    with pytest.raises(SettingError, match=r"clean\.1\.jsonl says again .* images/1\.png, classification"):
        store.rows("none/clean")
