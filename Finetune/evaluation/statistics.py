"""Means, bootstrap intervals and paired differences over cases."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what has a value; None when nothing has."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> list[float] | None:
    """95 % interval of the mean by the percentile bootstrap over cases; None for fewer than two cases, where there is
    none."""
    if len(values) < 2:
        return None
    numbers = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(numbers), size=(draws, len(numbers)))
    low, high = np.percentile(numbers[picks].mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def difference(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, Any]:
    """Of values (a, b): the mean of b - a over the pairs that have both, its interval, and in how many b is higher."""
    deltas = [b - a for a, b in pairs if a is not None and b is not None]
    return {
        "pairs": len(deltas),
        "one_sided": sum((a is None) != (b is None) for a, b in pairs),
        "difference": mean(deltas),
        "ci95": bootstrap_interval(deltas),
        "b_higher": sum(d > 0 for d in deltas),
        "a_higher": sum(d < 0 for d in deltas),
    }
