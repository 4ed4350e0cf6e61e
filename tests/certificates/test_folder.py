"""Pictures certified in a folder, by one process or by several."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from support import command_line, make_llava

import fs_plugins
from fs_plugins import SettingError
from fs_plugins.certificates import Plan, certify_folder, pictures_of, table
from fs_plugins.certificates.certifiers import Features, Labels
from fs_plugins.certificates.folder import ROWS, FolderRun
from fs_plugins.demo import world
from fs_plugins.files import LOCK, locked

PLAN = Plan(n=30)


@pytest.fixture
def smoother():
    return fs_plugins.smoothers(make_llava(), psm=None, sigma=0.1)[0]


@pytest.fixture
def pictures(images):
    return dict(zip("abc", images, strict=True))


@dataclass
class OneOfTwo:
    """A process that never has to wait: the other one is called before it."""

    rank: int
    size: int = 2

    def wait(self) -> None:
        pass


def test_a_folder_gets_the_rows_of_certify_and_goes_on_from_them(smoother, pictures, tmp_path):
    whole = fs_plugins.certify(smoother, pictures, n=30, seed=0, out=tmp_path / "rows.jsonl")
    some = certify_folder(smoother, {"a": pictures["a"]}, tmp_path / "out", plan=PLAN, seed=0)
    assert list(some) == ["a"]
    (tmp_path / "out" / ROWS).unlink()
    drawn: list[tuple[str, int]] = []

    def track(what, total):
        drawn.append((what, total))
        return lambda draws: drawn.append((what, draws))

    found = certify_folder(smoother, pictures, tmp_path / "out", plan=PLAN, seed=0, track=track)
    assert list(found.values()) == whole
    assert (tmp_path / "out" / ROWS).read_text("utf-8") == (tmp_path / "rows.jsonl").read_text("utf-8")
    assert drawn[0] == ("certificates", 3 * 40)
    assert sum(draws for _, draws in drawn[1:]) == 3 * 40
    drawn.clear()
    assert certify_folder(smoother, pictures, tmp_path / "out", plan=PLAN, seed=0, track=track) == found
    assert drawn[1:] == [("certificates", 30)] * 3, "read, not drawn"


def test_several_processes_share_the_pictures_and_the_first_merges(smoother, pictures, tmp_path):
    alone = certify_folder(smoother, pictures, tmp_path / "one", plan=PLAN, seed=0)
    second = certify_folder(smoother, pictures, tmp_path / "two", plan=PLAN, seed=0, crew=OneOfTwo(1))
    assert list(second) == ["b"]
    assert (tmp_path / "two" / "certificates.2-of-2.jsonl").exists()
    assert certify_folder(smoother, pictures, tmp_path / "two", plan=PLAN, seed=0, crew=OneOfTwo(0)) == alone
    assert (tmp_path / "two" / ROWS).read_text("utf-8") == (tmp_path / "one" / ROWS).read_text("utf-8")
    assert [path.name for path in (tmp_path / "two").glob("[!.]*")] == [ROWS]
    again = FolderRun(
        tmp_path / "two", pictures, {ROWS: Features(smoother, PLAN, list(pictures.values()))}, 0, 0, OneOfTwo(1)
    )
    told: list[int] = []
    again.certify(lambda what, total: told.append)
    assert told == [30], "the other process's rows count for both"


def test_what_cannot_be_certified_is_refused_before_a_draw(smoother, pictures, tmp_path):
    with pytest.raises(SettingError, match="no picture"):
        certify_folder(smoother, {}, tmp_path / "out")
    with pytest.raises(SettingError, match="need a seed"):
        certify_folder(smoother, pictures, tmp_path / "out", crew=OneOfTwo(0))
    with pytest.raises(SettingError, match="Image a must be"):
        certify_folder(smoother, {"a": pictures["a"][:, :8]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    certify_folder(smoother, pictures, tmp_path / "out", plan=PLAN, seed=0)
    with pytest.raises(SettingError, match=r"other settings \(n\)"):
        certify_folder(smoother, pictures, tmp_path / "out", plan=Plan(n=20), seed=0)


def test_one_run_at_a_time_has_the_folder(smoother, pictures, tmp_path):
    with locked(tmp_path / "out", "these certificates"), pytest.raises(SettingError, match=r"in use by process \d+"):
        certify_folder(smoother, pictures, tmp_path / "out", plan=PLAN, seed=0)
    assert len(certify_folder(smoother, pictures, tmp_path / "out", plan=PLAN, seed=0)) == 3


def test_labels_are_certified_alike_and_the_time_is_told(clip, images, tmp_path):
    smoother = fs_plugins.smoothers(clip, psm=None, sigma=0.1)[0]
    pictures = dict(zip("abc", images, strict=True))
    directions = dict(zip(("cat", "dog"), images.flatten(1)[:2, :24], strict=True))
    labels = Labels.among(smoother, PLAN, directions)
    run = FolderRun(tmp_path, pictures, {"predictions.jsonl": labels}, seed=0)
    run.check()
    assert run.draws == 3 * 40
    assert run.seconds() >= 0
    assert not list(tmp_path.iterdir()), "a look at the clock leaves nothing"
    found = run.certify()["predictions.jsonl"]
    assert list(found.values()) == fs_plugins.certify_predictions(smoother, pictures, directions, n=30, seed=0)


def test_pictures_are_files_and_all_below_folders(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("deep/er/b.png", "deep/a.JPG", "c.png"):
        world.scene("heldout", 0).draw().save(tmp_path / name)
    (tmp_path / "deep" / "notes.txt").write_text("no picture", "utf-8")
    found = pictures_of([tmp_path / "c.png", tmp_path / "deep"], (16, 16))
    assert list(found) == [str(tmp_path / name) for name in ("c.png", "deep/a.JPG", "deep/er/b.png")]
    assert {tuple(picture.shape) for picture in found.values()} == {(3, 16, 16)}


def test_averages_count_an_image_without_a_promise_as_0(smoother, pictures, tmp_path):
    jobs = table.certifiers(smoother.call, pictures, PLAN, psm="none", sigmas=(0.1, 0.2))
    assert list(jobs) == ["certificates-sigma0.1-plain.jsonl", "certificates-sigma0.2-plain.jsonl"]
    found = FolderRun(tmp_path, pictures, jobs, seed=0).certify()
    certificates = list(found["certificates-sigma0.2-plain.jsonl"].values())
    rows = table.averages(certificates, threshold=0.3, distances=(0.01, 9.0))
    assert [row.method for row in rows] == ["plugin", "mean", "distribution", "certified"]
    assert {(row.sigma, row.psm) for row in rows} == {(0.2, None)}
    assert rows[-1].cosines == (pytest.approx(sum(one.fcsb(0.01) or 0 for one in certificates) / 3), 0.0)
    assert rows[-1].radius == pytest.approx(sum(one.radius(0.3) or 0 for one in certificates) / 3)
    table.write(tmp_path / "table.csv", rows, distances=(0.01, 9.0))
    written = (tmp_path / "table.csv").read_text("utf-8").splitlines()
    assert written[0] == "sigma,PSM,method,0.01,9,R"
    assert written[1].startswith("0.2,none,plugin,")


@pytest.mark.slow
def test_two_processes_give_the_same_certificates_as_one(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        world.scene("heldout", i).draw().save(tmp_path / "pictures" / f"{i}.png")

    def run(processes, *options):
        return command_line(processes, "certify", tmp_path / "pictures", "--draws", 50, *options)

    one = run(1, "--seed", "0", "--out", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    two = run(2, "--seed", "0", "--out", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    rows = [(tmp_path / out / "certificates.jsonl").read_text("utf-8") for out in ("one", "two")]
    assert rows[0] == rows[1]
    shown = sorted(path.name for path in (tmp_path / "two").iterdir() if path.name != LOCK)
    assert shown == ["certificates.jsonl", "certificates.png"]
    again = run(2, "--seed", "0", "--out", str(tmp_path / "two"))
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "two" / "certificates.jsonl").read_text("utf-8") == rows[1], "a finished run is read again"
    unseeded = run(2, "--out", str(tmp_path / "three"))
    assert unseeded.returncode != 0, "there were not two processes"
    assert "Several processes need --seed" in " ".join((unseeded.stdout + unseeded.stderr).split())
