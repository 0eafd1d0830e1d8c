"""Schedules: ends, middle, and no dependence on history."""

import math

import pytest

from common.training.schedules import cosine, linear, warmup_cosine


def test_linear_and_cosine_meet_their_ends_and_hold():
    for schedule in (linear, cosine):
        assert schedule(0, 10, 2.0, 6.0) == 2.0
        assert schedule(10, 10, 2.0, 6.0) == pytest.approx(6.0) and schedule(99, 10, 2.0, 6.0) == pytest.approx(6.0)
        assert schedule(5, 10, 2.0, 6.0) == pytest.approx(4.0)
        assert schedule(3, 0, 2.0, 6.0) == pytest.approx(6.0)


def test_warmup_cosine():
    values = [warmup_cosine(s, 110, 10, 1.0) for s in range(111)]
    assert values[0] == pytest.approx(0.1)  # the first update moves
    assert values[9] == pytest.approx(1.0) and values[10] == pytest.approx(1.0)
    assert values[60] == pytest.approx(0.5) and values[110] == pytest.approx(0.0, abs=1e-12)
    assert values[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert all(a >= b for a, b in zip(values[10:], values[11:]))
    assert warmup_cosine(0, 10, 0, 1.0) == 1.0
