"""The table of methods: one entry is all that a new method needs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fs_plugins import SettingError
from fs_plugins.certificates import Angular, Certificate, Plan, plot, table
from fs_plugins.certificates.bounds import hoeffding_lower, mean_bound
from fs_plugins.certificates.methods import DISTRIBUTION, METHODS, Method, Part

SCORES = np.clip(1 - np.random.default_rng(0).exponential(0.05, 500), -1, 1)
HOEFFDING = Part("lower", hoeffding_lower, mean_bound, "Hoeffding's bound of the mean score")


@pytest.fixture
def hoeffding(monkeypatch):
    for method in (
        Method("hoeffding", "mean (Hoeffding)", (HOEFFDING,)),
        Method("old and new", "both", (HOEFFDING, DISTRIBUTION)),
    ):
        monkeypatch.setitem(METHODS, method.name, method)


@pytest.mark.usefixtures("hoeffding")
def test_an_entry_is_a_method_everywhere(tmp_path):
    angular = Angular(t0=0.5, count=500, norm=0.01, n=500)
    alone = Certificate.from_scores(SCORES, sigma=0.25, method="hoeffding")
    assert alone.lower == pytest.approx(hoeffding_lower(SCORES, 1e-3))
    assert Certificate.from_json(alone.to_json()) == alone
    both = Certificate.from_scores(SCORES, sigma=0.25, method="old and new", angular=angular)
    assert both.lower == pytest.approx(hoeffding_lower(SCORES, 1e-3 / 4)), "half for the angle, and half of the rest"
    assert both.by("hoeffding").share == 0.25
    assert list(both.curves([0.0, 0.1])) == ["plugin", "distribution", "hoeffding", "certified"]
    with pytest.raises(SettingError, match="no bound 'mean'"):
        both.by("mean")
    with pytest.raises(SettingError, match="has no bound 'hoeffding'"):
        Certificate.from_scores(SCORES, sigma=0.25).by("hoeffding")
    assert Plan(method="hoeffding").pilot == 100
    assert [row.title for row in table.averages([both])] == [
        "paper's estimate",
        "distribution",
        "mean (Hoeffding)",
        "certified",
    ]
    plot.draw([both], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


@pytest.mark.usefixtures("hoeffding")
def test_a_certificate_has_the_statistics_of_its_method_and_no_others():
    best = Certificate.from_scores(SCORES, sigma=0.25)
    for name, field in (("hoeffding", "band"), ("distribution", "lower")):
        own = Certificate.from_scores(SCORES, sigma=0.25, method=name)
        assert getattr(own, field) is None
        with pytest.raises(SettingError, match="do not go together"):
            Certificate(**{**vars(own), field: getattr(best, field)})


def test_an_unknown_method_is_told_the_known_ones():
    for make in (lambda: Plan(method="hope"), lambda: Certificate.from_scores(SCORES, sigma=1, method=["best"])):
        with pytest.raises(SettingError, match=r"one of .*'plugin', 'mean', 'distribution', 'best'"):
            make()


def test_values_and_plans_need_neither_torch_nor_a_statistics_package():
    code = (
        "import sys; from fs_plugins.certificates import Certificate, PredictionCertificate, Plan; "
        "import fs_plugins.certificates.ledger, fs_plugins.cli.certify; "
        "Certificate.from_scores([0.9] * 100, sigma=0.25).radius(); "
        "print([name for name in ('torch', 'scipy.stats', 'diffusers') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
