"""Bootstrap intervals and paired differences."""

import numpy as np

from Finetune.evaluation.statistics import bootstrap_interval, difference, mean


def test_interval_covers_the_true_mean_in_95_percent():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        low, high = bootstrap_interval(rng.normal(0.7, 0.1, size=30), seed=trial, draws=500)
        hits += low <= 0.7 <= high
    assert 85 <= hits <= 99
    assert bootstrap_interval([0.5]) is None and mean([None]) is None


def test_pairing_removes_differences_between_cases():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.3, 0.9, 20)
    row = difference([(h, h + 0.02 + rng.normal(0, 0.005)) for h in hard])
    # without pairs the spread of the cases would hide the difference
    assert row["ci95"][0] > 0.01 and row["ci95"][1] < 0.03
