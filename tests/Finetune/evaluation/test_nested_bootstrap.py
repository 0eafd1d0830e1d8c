"""The bootstrap over runs and cases."""

import numpy as np
import pytest

from Finetune.evaluation.statistics import bootstrap_interval, nested_bootstrap


def simulated(rng: np.random.Generator, runs: int, cases: int, of_runs: float) -> np.ndarray:
    """Return scores (runs, cases) around 0.5: an effect per run, one per case, and noise."""
    effects = rng.normal(0, of_runs, (runs, 1)) + rng.normal(0, 0.1, (1, cases))
    return 0.5 + effects + rng.normal(0, 0.02, (runs, cases))


def width(interval: list[float]) -> float:
    return interval[1] - interval[0]


def test_one_run_is_the_bootstrap_over_cases():
    values = simulated(np.random.default_rng(0), 1, 30, 0.05)
    mean, interval = nested_bootstrap(values)
    assert mean == pytest.approx(values.mean()) and interval == pytest.approx(bootstrap_interval(values[0]))
    # a case without a score is left out
    gap = np.insert(values, 3, np.nan, axis=1)
    assert nested_bootstrap(gap)[1] == pytest.approx(interval)


def test_runs_that_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    equal, different = (np.repeat(simulated(rng, 1, 30, 0), 3, axis=0) for _ in range(2))
    different += [[-0.1], [0.0], [0.1]]
    over_cases = bootstrap_interval(equal[0])
    assert nested_bootstrap(equal)[1] == pytest.approx(over_cases)
    assert width(nested_bootstrap(different)[1]) > 1.3 * width(bootstrap_interval(different.mean(axis=0)))


@pytest.mark.parametrize("runs, of_runs, least", [(12, 0.03, 0.9), (12, 0.0, 0.9), (3, 0.01, 0.85)])
def test_the_interval_covers_the_mean_about_95_times_in_100(runs, of_runs, least):
    rng = np.random.default_rng(1)
    intervals = [nested_bootstrap(simulated(rng, runs, 40, of_runs), draws=500)[1] for _ in range(400)]
    covered = np.mean([low <= 0.5 <= high for low, high in intervals])
    assert least <= covered <= 0.99


def test_missing_scores_are_in_no_mean():
    values = np.array([[0.2, np.nan, 0.6], [0.4, 0.5, np.nan]])
    mean, interval = nested_bootstrap(values)
    assert mean == pytest.approx((0.3 + 0.5 + 0.6) / 3) and 0.1 < interval[0] < mean < interval[1] < 0.8
    assert nested_bootstrap(np.full((2, 2), np.nan)) == (None, None) == nested_bootstrap(np.empty((0, 4)))
    assert nested_bootstrap(np.array([[0.5]])) == (0.5, None)
