"""Values of log.jsonl over the epochs of a run."""

import math

from common.report.curves import Series
from common.report.runs import RunFolder
from common.runlog import TIMES

HEALTH, VALIDATION, MONITOR = "health/", "val/", "monitor/"
NOT_LOSSES = {"epoch", "step", "lr", "grad_norm", "skipped", *TIMES}


def names(run: RunFolder, *prefixes: str) -> list[str]:
    """Return the names in the log that start with any of `prefixes`, in their order."""
    found = dict.fromkeys(name for line in run.log for name in line)
    return [name for name in found if name.startswith(prefixes)]


def losses(run: RunFolder) -> list[str]:
    """Return the names of the losses in the log."""
    others = (HEALTH, VALIDATION, MONITOR)
    return [name for name in names(run, "") if name not in NOT_LOSSES and not name.startswith(others)]


def series(run: RunFolder, name: str, label: str, colour: int = 0, dashed: bool = False) -> Series:
    """Return the values of the log over the epochs, counted from 1."""
    points = [(line["epoch"] + 1, as_float(line.get(name))) for line in run.log]
    return Series(label, [point for point in points if not math.isnan(point[1])], colour, dashed)


def as_float(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def last(run: RunFolder, name: str) -> float | None:
    """Return the last value of the log, None where there is none."""
    return next((line[name] for line in reversed(run.log) if isinstance(line.get(name), (int, float))), None)


def other_volumes(run: RunFolder) -> str:
    """Return what the measures of health were measured on."""
    held_out = run.about.get("held_out_volumes")
    return "fixed batch" if held_out is None else "held-out" if held_out else "training volumes"


def views(run: RunFolder) -> list[str]:
    """Return the kinds of views whose reconstruction was measured."""
    return [name.split("/")[1] for name in names(run, HEALTH) if name.endswith("/over_mean")]
