"""Formats of score cards and reports: text tables, CSV and JSON."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.files import replacing, save_bytes


def aligned(rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Return rows of text as lines of aligned columns, the first `left` of them flush left, the others right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def fixed(value: float | None, decimals: int = 4, sign: str = "") -> str:
    """Return a number with fixed decimals, "-" for None. `sign` "+" also writes the sign of positive numbers."""
    return "-" if value is None else f"{value:{sign}.{decimals}f}"


def interval_text(interval: Sequence[float] | None, sign: str = "", none: str = "none, fewer than two cases") -> str:
    """Return `low..high`, or `none` where there is no interval."""
    return "..".join(fixed(end, sign=sign) for end in interval) if interval else none


def write_json(path: Path, content: Any) -> None:
    save_bytes(path, json.dumps(content, indent=2).encode())


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(rows)
