"""Means, bootstrap intervals and paired differences over cases."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return key -> its items, both in the order in which they first occur."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None when all are."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def mean_and_interval(values: Iterable[float | None], seed: int = 0) -> tuple[float | None, list[float] | None]:
    """Return the mean of the values that are not None, and its bootstrap interval."""
    numbers = [value for value in values if value is not None]
    return mean(numbers), bootstrap_interval(numbers, seed)


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> list[float] | None:
    """Return the 95 % interval of the mean by the percentile bootstrap; None for fewer than two values."""
    if len(values) < 2:
        return None
    numbers = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(numbers), size=(draws, len(numbers)))
    low, high = np.percentile(numbers[picks].mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def nested_bootstrap(values: np.ndarray, seed: int = 0, draws: int = 10_000) -> tuple[float | None, list[float] | None]:
    """Return the mean of scores of several runs on the same cases, and its 95 % interval.

    The mean is over cases, of the mean over runs. The interval is by the percentile bootstrap that resamples runs and
    cases independently (Owen 2007, "The pigeonhole bootstrap"). Resampled means of n runs vary less than means of n new
    runs by the factor sqrt((n - 1) / n), so the deviations of the runs from their mean are first divided by it (our
    choice). With one run it is `bootstrap_interval` over the cases, and says nothing about other runs.

    Args:
        values: (runs, cases), NaN where a case has no score. A case without any score is left out.

    Returns:
        mean and interval; None for a mean of nothing, and for the interval of fewer than two cases.
    """
    values = np.asarray(values, dtype=float)
    values = values[:, ~np.isnan(values).all(axis=0)] if values.size else np.empty((0, 0))
    runs, cases = values.shape
    if not cases:
        return None, None
    average = float(np.nanmean(values, axis=0).mean())
    if cases < 2:
        return average, None
    if runs > 1:
        of_runs = np.nanmean(values - np.nanmean(values, axis=0), axis=1, keepdims=True)
        values = values + np.nan_to_num(of_runs) * (np.sqrt(runs / (runs - 1)) - 1)
    rng, scored = np.random.default_rng(seed), ~np.isnan(values)
    # cases first, so that one run draws as `bootstrap_interval`
    times_case, times_run = (_counts(rng.integers(0, n, size=(draws, n)), n) for n in (cases, runs))
    number = times_run @ scored  # (draws, cases)
    means = times_run @ np.nan_to_num(values) / np.maximum(number, 1)
    # a case whose only scores are of runs that were not drawn is in no mean
    weights = times_case * (number > 0)
    total = weights.sum(axis=1)
    resampled = (weights * means).sum(axis=1)[total > 0] / total[total > 0]
    return average, np.percentile(resampled, [2.5, 97.5]).tolist()


def _counts(picks: np.ndarray, size: int) -> np.ndarray:
    """Return how often each of `size` items is in each row of picks: (draws, n) -> (draws, size)."""
    rows = np.arange(len(picks))[:, None] * size
    return np.bincount((picks + rows).ravel(), minlength=len(picks) * size).reshape(-1, size)


def difference(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, Any]:
    """Return the mean of b - a over the pairs (a, b) that have both values, its interval, and counts."""
    deltas = [b - a for a, b in pairs if a is not None and b is not None]
    value, interval = mean_and_interval(deltas)
    return {
        "pairs": len(deltas),
        "unpaired": sum((a is None) != (b is None) for a, b in pairs),
        "difference": value,
        "ci95": interval,
        "b_higher": sum(d > 0 for d in deltas),
        "a_higher": sum(d < 0 for d in deltas),
    }
