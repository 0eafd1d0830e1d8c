"""Are two runs the same run? Their last checkpoints, log lines and TensorBoard points, bit for bit."""

from pathlib import Path
from typing import Any

import torch

from common import checkpoint
from tests.common.training.toy import lines, points

OWN = ("out_dir", "resume", "workers", "save_minutes", "config")  # settings in which runs that are compared may differ


def difference(run: Path, reference: Path) -> str:
    """Empty, or the first thing that differs."""
    mine, theirs = (checkpoint.load(folder / checkpoint.LAST) for folder in (run, reference))
    for content in (mine, theirs):
        content["args"] = {k: v for k, v in content["args"].items() if k not in OWN}
    found = _first(mine, theirs, "checkpoint")
    if found:
        return found
    told = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines(folder)] for folder in (run, reference)
    ]
    if str(told[0]) != str(told[1]):
        return "log.jsonl differs"
    return "" if str(points(run)) == str(points(reference)) else "TensorBoard's points differ"


def _first(a: Any, b: Any, where: str) -> str:
    if isinstance(a, torch.Tensor):
        return "" if isinstance(b, torch.Tensor) and torch.equal(a, b) else f"{where} differs"
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return f"{where} has other keys"
        return next((found for k in a if (found := _first(a[k], b[k], f"{where}.{k}"))), "")
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where} has another length"
        return next((found for i, (x, y) in enumerate(zip(a, b)) if (found := _first(x, y, f"{where}[{i}]"))), "")
    return "" if a == b else f"{where}: {a!r} is not {b!r}"
