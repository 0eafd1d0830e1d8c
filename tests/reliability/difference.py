"""Check that two runs are the same: their last checkpoints, log lines and TensorBoard points, bit for bit."""

from pathlib import Path
from typing import Any

import torch

from common import checkpoint
from common.runlog import TIMES
from tests.common.training.toy import points
from tests.helpers import read_log

# Settings that may differ.
OWN = ("out_dir", "resume", "workers", "save_minutes", "config")


def difference(run: Path, reference: Path) -> str:
    """Return the first difference between two runs, "" if there is none."""
    contents = [checkpoint.load(folder / checkpoint.LAST) for folder in (run, reference)]
    for content in contents:
        content["args"] = {k: v for k, v in content["args"].items() if k not in OWN}
    found = _first_difference(*contents, "checkpoint")
    if found:
        return found
    logs = [read_log(folder) for folder in (run, reference)]
    for line in [*logs[0], *logs[1]]:
        for name in TIMES:
            line.pop(name, None)
    # As text, NaN equals NaN.
    if str(logs[0]) != str(logs[1]):
        return "log.jsonl differs"
    return "" if str(points(run)) == str(points(reference)) else "TensorBoard's points differ"


def _first_difference(a: Any, b: Any, where: str) -> str:
    if isinstance(a, torch.Tensor):
        return "" if isinstance(b, torch.Tensor) and torch.equal(a, b) else f"{where} differs"
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return f"{where} has other keys"
        pairs = [(a[key], b[key], f"{where}.{key}") for key in a]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where} has another length"
        pairs = [(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b))]
    else:
        return "" if a == b else f"{where}: {a!r} is not {b!r}"
    return next((found for pair in pairs if (found := _first_difference(*pair))), "")
