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


def difference(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, Any]:
    """Return the mean of b - a over the pairs (a, b) that have both values, its interval, and counts."""
    deltas = [b - a for a, b in pairs if a is not None and b is not None]
    value, interval = mean_and_interval(deltas)
    return {
        "pairs": len(deltas),
        "one_sided": sum((a is None) != (b is None) for a, b in pairs),
        "difference": value,
        "ci95": interval,
        "b_higher": sum(d > 0 for d in deltas),
        "a_higher": sum(d < 0 for d in deltas),
    }
