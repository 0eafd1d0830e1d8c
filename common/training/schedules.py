"""Schedules as functions of the step, counted from 0 in optimiser updates: nothing to save, nothing to replay on
resume."""

import math


def linear(step: int, total: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `total`, constant after."""
    return start + (end - start) * min(step / total, 1.0) if total > 0 else end


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `total`, constant after."""
    share = min(step / total, 1.0) if total > 0 else 1.0
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def warmup_cosine(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine to 0 at `total`.

    The first update already moves (peak/warmup rather than 0, as the published code has it): our choice.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, total - warmup, peak, 0.0)
