from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import TinyEncoder, command_line, make_llava, make_psm, tiny_call

import fs_plugins
from fs_plugins import Certificate, FeatureSmoother, ModelError, SettingError
from fs_plugins.certificates.image import certify_image
from fs_plugins.certificates.ledger import Ledger, merge
from fs_plugins.certificates.plan import Plan
from fs_plugins.certificates.sampling import Sampler

SIGMA = 0.25


@pytest.fixture
def smoother(call) -> FeatureSmoother:
    torch.manual_seed(0)  # the purifier's own initialisation
    return FeatureSmoother(call, psm=make_psm(call), sigma=SIGMA)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_scores_are_products_of_unit_features_with_the_plain_clean_feature(smoother, image):
    sampler = Sampler(smoother, image, key=b"key", rows=7)
    sampler.extend(20)
    call = smoother.call
    clean = call.encode(image[None])["tokens"].flatten()
    generator = sampler._stream("bound")
    wanted = []
    for _ in range(20):
        noise = torch.randn(image.shape, generator=generator)
        z = smoother.psm.purify((image + SIGMA * noise)[None], SIGMA)
        z = smoother.psm.map("tokens", call.encode(z)["tokens"], SIGMA).flatten()
        wanted.append(float(torch.cosine_similarity(z, clean, dim=0)))
    assert np.allclose(sampler.scores, wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_neither_rows_nor_steps_change_what_is_drawn(smoother, image, rows):
    whole = Sampler(smoother, image, key=b"key", rows=64)
    whole.t0 = 0.2
    whole.extend(40)
    pieces = Sampler(smoother, image, key=b"key", rows=rows)
    pieces.t0 = 0.2
    for part in (3, 30, 7):
        pieces.extend(part)
    assert np.allclose(whole.scores, pieces.scores, atol=1e-6)
    assert whole.angular.count == pieces.angular.count
    assert whole.angular.norm == pytest.approx(pieces.angular.norm, abs=1e-6)


def test_the_pilot_has_no_part_in_the_bound(smoother, image):
    one, other = (Sampler(smoother, image, key=b"key") for _ in range(2))
    pilot = one.pilot(30)
    one.extend(30)
    other.extend(30)
    assert np.array_equal(one.scores, other.scores)
    assert not np.isin(pilot, one.scores).any()


def test_the_angular_statistics_are_those_of_the_draws(smoother, image):
    sampler = Sampler(smoother, image, key=b"key", rows=8)
    sampler.t0 = t0 = float(np.median(sampler.pilot(50)).clip(0, 1))
    seen = []
    block = sampler._block

    def watched(generator, size):
        seen.append(block(generator, size))
        return seen[-1]

    sampler._block = watched
    sampler.extend(50)
    units = torch.cat([units for units, _, _ in seen]).double()
    scores = torch.cat([products for _, products, _ in seen])
    across = units - scores[:, None] * sampler.reference.double()
    near = scores >= t0
    assert sampler.angular.count == int(near.sum())
    assert sampler.angular.norm == pytest.approx(float(across[near].sum(0).norm()) / 50, abs=1e-6)


def test_another_key_or_image_has_other_draws(smoother, image):
    def scores(key, picture):
        sampler = Sampler(smoother, picture, key=key)
        sampler.extend(10)
        return sampler.scores

    own = scores(b"key", image)
    assert np.array_equal(own, scores(b"key", image))
    assert not np.array_equal(own, scores(b"other", image))
    assert not np.array_equal(own, scores(b"key", image.flip(-1)))


class Fragile(TinyEncoder):
    """Every third image is not finite, or has a zero feature."""

    def forward(self, pixel_values):
        output = super().forward(pixel_values)
        tokens = output["tokens"].clone()
        if len(tokens) > 1:
            tokens[::3] = float("nan")
            tokens[1::3] = 0
        return {**output, "tokens": tokens}


def test_draws_without_a_direction_count_as_minus_one(image):
    sampler = Sampler(FeatureSmoother(tiny_call(Fragile()), psm=None, sigma=SIGMA), image, key=b"key", rows=30)
    sampler.t0 = 0.0
    sampler.extend(30)
    assert sampler.non_finite == 20
    assert (sampler.scores[[0, 1, 3, 4]] == -1).all()
    assert (sampler.scores[2::3] > -1).all()
    assert np.isfinite(sampler.angular.norm)


def test_an_image_without_a_clean_feature_is_an_error(image):
    class Dead(TinyEncoder):
        def forward(self, pixel_values):
            return {"tokens": torch.zeros(len(pixel_values), 4, 6)}

    with pytest.raises(ModelError, match="no direction"):
        Sampler(FeatureSmoother(tiny_call(Dead()), psm=None, sigma=SIGMA), image, key=b"")


def test_sampling_stops_at_a_reached_target_and_where_it_is_out_of_reach(smoother, image):
    def n(target, **plan):
        plan = Plan(n=800, target=target, **plan)
        return certify_image(smoother, image, plan, key=b"key")

    full = n(None)
    assert full.n == 800
    assert full.share == 1
    assert n(full.radius() * 0.2).n < 800
    assert n(full.radius() * 0.2).radius() >= full.radius() * 0.2
    assert n(1e3).n == 100, "not even perfect scores would certify this"
    assert n(full.radius() * 0.2).share == 0.25


def test_certificates_of_a_model_say_what_they_depend_on(images):
    llava = make_llava()
    psm = make_psm(fs_plugins.vision_call(llava))
    one, two, three = fs_plugins.certify(llava, images, n=60, psm=psm, seed=1)
    assert isinstance(one, Certificate)
    assert (one.sigma, one.n, one.alpha, one.method) == (0.25, 60, 1e-3, "best")
    assert one.image_shape == (3, 16, 16)
    assert one.readouts == ("hidden_states[-2][1:]",)
    assert one.psm == "random"
    assert one.encoder == psm.config.fingerprint
    assert one.seed == "seed 1"
    assert -1 <= one.unrelated <= 1
    assert one.angular is not None
    assert len({one.mean, two.mean, three.mean}) == 3
    assert not fs_plugins.status(llava).enabled


def test_smoothing_that_is_enabled_plays_no_part(images):
    llava = make_llava()
    settings = {"n": 40, "psm": None, "sigma": 0.1, "seed": 1}
    before = fs_plugins.certify(llava, images, **settings)
    with fs_plugins.enable(llava, psm=None, sigma=0.5) as handle:
        assert fs_plugins.certify(llava, images, **settings) == before
        assert handle.status().vision[0].calls == 0


def test_an_interrupted_run_goes_on_and_gives_the_same_rows(images, tmp_path):
    llava = make_llava()
    settings = {"n": 40, "psm": None, "sigma": 0.1}
    named = dict(zip("abc", images, strict=True))
    whole = fs_plugins.certify(llava, named, **settings, out=tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line).get("image") for line in lines] == [None, "a", "b", "c"]
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[:2]) + lines[2][:50])
    draws = []
    again = fs_plugins.certify(llava, named, **settings, out=cut, advance=draws.append)
    assert again == whole
    assert cut.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert draws[0] == 40, "the finished image is not drawn again"
    assert sum(draws[1:]) == 2 * (40 + Plan(n=40).pilot)


def test_a_ledger_of_another_run_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    Ledger(path, Certificate, {"n": 10, "sigma": 0.25}, b"key")
    assert Ledger(path, Certificate, {"n": 10, "sigma": 0.25}, b"other").key == b"key"
    with pytest.raises(SettingError, match=r"other settings \(n\)"):
        Ledger(path, Certificate, {"n": 20, "sigma": 0.25}, b"key")
    path.write_text("something else\n")
    with pytest.raises(SettingError, match="not a file of certificates"):
        Ledger(path, Certificate, {}, b"key")


def test_rows_of_another_model_or_another_image_are_never_handed_out(images, tmp_path):
    settings = {"n": 20, "psm": None, "sigma": 0.1, "seed": 0, "out": tmp_path / "rows.jsonl"}
    fs_plugins.certify(make_llava(), images[:1], **settings)
    other = make_llava()
    with torch.no_grad():
        next(other.model.vision_tower.parameters()).add_(0.5)
    with pytest.raises(SettingError, match=r"other settings \(encoder\)"):
        fs_plugins.certify(other, images[:1], **settings)
    with pytest.raises(SettingError, match="another image called 0"):
        fs_plugins.certify(make_llava(), images[1:2], **settings)


def test_rows_of_a_whole_psm_are_not_those_of_its_parts(images, tmp_path):
    llava = make_llava()
    psm = make_psm(fs_plugins.vision_call(llava), sigma=0.1)
    settings = {"n": 20, "seed": 0, "out": tmp_path / "rows.jsonl"}
    fs_plugins.certify(llava, images, psm=psm, **settings)
    for other in (psm.only(mapper=False), make_psm(fs_plugins.vision_call(llava), sigma=0.1, purifier=False)):
        with pytest.raises(SettingError, match=r"other settings \(psm"):
            fs_plugins.certify(llava, images, psm=other, **settings)


def test_copies_of_an_image_are_not_unrelated(images):
    settings = {"n": 10, "psm": None, "sigma": 0.1, "seed": 0}
    [whole, *_] = fs_plugins.certify(make_llava(), images, **settings)
    [doubled, *_] = fs_plugins.certify(make_llava(), torch.cat([images, images[:2]]), **settings)
    assert doubled.unrelated == pytest.approx(whole.unrelated)
    assert fs_plugins.certify(make_llava(), images[[0, 0]], **settings)[0].unrelated is None


def test_progress_counts_images_that_were_finished_before(images, tmp_path):
    told: list[int] = []
    settings = {"n": 20, "psm": None, "sigma": 0.1, "seed": 0, "out": tmp_path / "rows.jsonl", "angular": False}
    fs_plugins.certify(make_llava(), images, **settings)
    fs_plugins.certify(make_llava(), images, **settings, advance=told.append)
    assert told == [20, 20, 20]


def test_a_foreign_file_is_never_overwritten(images, tmp_path):
    for text in ("precious single line", "precious\nlines\n"):
        (tmp_path / "notes.txt").write_text(text)
        with pytest.raises(SettingError, match="not a file of certificates"):
            fs_plugins.certify(make_llava(), images, n=10, psm=None, sigma=0.1, out=tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text() == text


@pytest.mark.parametrize(
    "wrong", [{"alpha": 2.0}, {"method": "bogus"}, {"threshold": 7.0, "target": 0.1}, {"sigma": 0}]
)
def test_bad_settings_cost_no_draw_and_leave_no_file(images, tmp_path, wrong):
    drawn = []
    settings = {"n": 10, "psm": None, "sigma": 0.1, **wrong}
    with pytest.raises(SettingError):
        fs_plugins.certify(make_llava(), images, **settings, out=tmp_path / "rows.jsonl", advance=drawn.append)
    assert not drawn
    assert not (tmp_path / "rows.jsonl").exists()


def test_an_encoder_in_training_mode_is_refused(images):
    llava = make_llava()
    llava.model.vision_tower.train()
    with pytest.raises(ModelError, match="vision encoder is in training mode"):
        fs_plugins.certify(llava, images, psm=None, sigma=0.25)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n .*whole number"),
        ({"target": -1}, "target"),
        ({"alpha": 1.5}, "alpha"),
        ({"method": "hope"}, "method"),
        ({"sigma": 0}, "sigma"),
        ({"encoder": 1}, "1 vision encoders"),
    ],
)
def test_bad_settings_are_refused(images, wrong, message):
    settings = {"n": 10, "psm": None, "sigma": 0.25, **wrong}
    with pytest.raises(SettingError, match=message):
        fs_plugins.certify(make_llava(), images, **settings)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x * 255, r"floating point in \[0, 1\]"),
        (lambda x: x[..., :8], r"must be \(3, 16, 16\)"),
        (lambda x: x[:1], r"must be \(3, 16, 16\)"),
        (lambda x: (x * 255).byte(), "floating point"),
    ],
)
def test_bad_images_are_refused_by_name(images, spoil, message):
    with pytest.raises(SettingError, match="Image dog " + message if "must" in message else "Image dog must be"):
        fs_plugins.certify(make_llava(), {"dog": spoil(images[0])}, n=10, psm=None, sigma=0.25)


def test_a_model_in_training_mode_is_refused(images):
    with pytest.raises(ModelError, match="training mode"):
        fs_plugins.certify(make_llava().train(), images, psm=None, sigma=0.25)


@pytest.mark.slow
def test_two_processes_give_the_same_certificates_as_one(tmp_path):
    from fs_plugins.demo import world

    (tmp_path / "pictures").mkdir()
    for i in range(3):
        world.scene("heldout", i).draw().save(tmp_path / "pictures" / f"{i}.png")

    def run(processes, *options):
        return command_line(processes, "certify", tmp_path / "pictures", "--draws", 50, *options)

    one = run(1, "--seed", "0", "--out", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    two = run(2, "--seed", "0", "--out", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    rows = [(tmp_path / out / "certificates.jsonl").read_text() for out in ("one", "two")]
    assert rows[0] == rows[1]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["certificates.jsonl", "certificates.png"]
    again = run(2, "--seed", "0", "--out", str(tmp_path / "two"))
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "two" / "certificates.jsonl").read_text() == rows[1], "a finished run is read again"
    unseeded = run(2, "--out", str(tmp_path / "three"))
    assert unseeded.returncode != 0, "there were not two processes"
    assert "Several processes need --seed" in " ".join((unseeded.stdout + unseeded.stderr).split())


def test_rows_of_several_processes_are_merged_in_order_or_refused(images, tmp_path):
    llava = make_llava()
    named = dict(zip("abc", images, strict=True))
    settings = {"n": 20, "psm": None, "sigma": 0.1, "seed": 3, "background": list(images)}
    whole = fs_plugins.certify(llava, named, **settings, out=tmp_path / "whole.jsonl")
    parts = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    fs_plugins.certify(llava, {"a": images[0], "c": images[2]}, **settings, out=parts[0])
    fs_plugins.certify(llava, {}, **settings, out=parts[1])
    with pytest.raises(SettingError, match="No process certified b"):
        merge(parts, tmp_path / "merged.jsonl", list(named), Certificate)
    fs_plugins.certify(llava, {"b": images[1]}, **settings, out=parts[1])
    assert list(merge(parts, tmp_path / "merged.jsonl", list(named), Certificate).values()) == whole
    assert (tmp_path / "merged.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not any(part.exists() for part in parts)
    again = tmp_path / "again.jsonl"
    again.write_text((tmp_path / "merged.jsonl").read_text())
    assert list(merge([again], tmp_path / "merged.jsonl", ["b"], Certificate)) == ["b"]
    assert (tmp_path / "merged.jsonl").read_text().count("\n") == 4, (
        "rows of images that are not asked for now are kept"
    )
