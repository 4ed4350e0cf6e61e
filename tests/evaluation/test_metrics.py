from __future__ import annotations

import math

import pytest

from fs_plugins.evaluation import mean, proportion


def test_proportion_is_wilsons_interval():
    got = proportion([True] * 90 + [False] * 10)
    # Wilson's interval for 90 of 100 by hand: (p + z^2/2n -+ z sqrt(p q/n + z^2/4n^2)) / (1 + z^2/n), z = 1.959964
    assert got.value == 0.9
    assert got.low == pytest.approx(0.82563, abs=1e-5)
    assert got.high == pytest.approx(0.94477, abs=1e-5)
    assert proportion([True] * 20).high == 1
    assert proportion([True] * 20).low < 0.9


def test_mean_is_students_interval():
    got = mean([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653, standard error 1 / sqrt(3)
    assert got.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert got.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert mean([0.5, 0.5]).low == 0.5


def test_one_value_has_a_mean_and_no_interval():
    got = mean([0.5])
    assert got.value == 0.5
    assert math.isnan(got.low)
    assert math.isnan(got.high)


def test_nothing_measured_is_nan_not_zero():
    assert math.isnan(proportion([]).value)
    assert math.isnan(mean([]).value)
