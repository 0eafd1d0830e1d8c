"""The rows of the benchmarks as text, Markdown and a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import machine
from Finetune.evaluation.formats import aligned

Rows = Sequence[dict[str, Any]]
HEADER = ("work", "compared with", "ours", "theirs", "ratio", "memory", "share of rate", "note")
LEGEND = (
    "ratio: theirs / ours, more than 1 is better. memory: peak of ours / theirs, less than 1 is better. share of rate: "
    "operations per second / those of a large matrix product, measured in turn."
)
# characters of the longest bar
WIDTH = 40
TIMES = ((1.0, "s"), (1e-3, "ms"), (0.0, "µs"))
SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0.0, "B"))
SMALLEST = {"µs": 1e-6, "B": 1.0}


def cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row, in the order of `HEADER`."""
    values = [quantity(row[name], row["unit"]) for name in ("ours", "theirs")]
    ratios = [with_aim(row["ratio"], row["aim"]), with_aim(row["peak_memory_ratio"], row["memory_aim"])]
    return [row["name"], row["against"], *values, *ratios, shares(row), row["note"]]


def quantity(value: float | None, unit: str) -> str:
    """Return a value with its unit: seconds and bytes in a fitting multiple. `unit` may go on, as in `s per update`."""
    if value is None:
        return "-"
    base, _, rest = unit.partition(" ")
    multiples = {"s": TIMES, "bytes": SIZES}.get(base)
    if multiples is None:
        return f"{value:.3g} {unit}"
    factor, name = next((factor, name) for factor, name in multiples if value >= factor)
    return f"{value / (factor or SMALLEST[name]):.3g} {name} {rest}".rstrip()


def with_aim(value: float | None, aim: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if aim is None else f"{value:.2f} (aim {aim:.2g})"


def shares(row: dict[str, Any]) -> str:
    if row["share_of_rate"] is None:
        return "-"
    theirs = row["their_share_of_rate"]
    return f"{row['share_of_rate']:.0%}" if theirs is None else f"{row['share_of_rate']:.0%} (theirs {theirs:.0%})"


def plain(rows: Rows) -> str:
    """Return the table for a terminal, and a bar for each ratio."""
    lines = aligned([list(HEADER), *map(cells, rows)])
    return "\n".join([*lines, "", LEGEND, "", *bars(rows)])


def bars(rows: Rows) -> list[str]:
    """Return a line for each ratio: its name and a bar of the ratio's logarithm, with `-` for ratios below 1."""
    found = [(row["name"], row["ratio"]) for row in rows if row["ratio"]]
    longest = max((abs(math.log(ratio)) for _, ratio in found), default=0.0) or 1.0
    width = max((len(name) for name, _ in found), default=0)
    lengths = [round(WIDTH * abs(math.log(ratio)) / longest) for _, ratio in found]
    signs = ["+" if ratio >= 1 else "-" for _, ratio in found]
    return [f"{name:{width}} {ratio:7.2f} {sign * n}" for (name, ratio), sign, n in zip(found, signs, lengths)]


def markdown(rows: Rows) -> str:
    """Return the table of docs/performance.md, below a line that names each machine."""
    lines = list(dict.fromkeys(f"{machine.text(row['machine'])}{'; --quick' * row['quick']}." for row in rows))
    table = [list(HEADER), ["---"] * len(HEADER), *map(cells, rows)]
    return "\n".join([*lines, "", *(f"| {' | '.join(line)} |" for line in table), "", LEGEND])


def draw(rows: Rows) -> Figure:
    """Return a picture of the ratios: a bar from 1 to each, and a mark at each aim."""
    found = [row for row in reversed(rows) if row["ratio"]]
    figure = Figure(figsize=(12, 1.2 + 0.3 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log")
    widths = [row["ratio"] - 1.0 for row in found]
    bars = axes.barh([row["name"] for row in found], widths, left=1.0, color="tab:blue")
    axes.bar_label(bars, [f"{row['ratio']:.2f}" for row in found], padding=3)
    axes.margins(x=0.15)
    aims = [(number, row["aim"]) for number, row in enumerate(found) if row["aim"]]
    axes.scatter([aim for _, aim in aims], [number for number, _ in aims], marker="|", s=150, color="black", zorder=3)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("theirs / ours (more than 1 is better); black mark: aim")
    return figure


def save(rows: Rows, path: Path) -> None:
    """Write the picture of `draw` as PNG."""
    draw(rows).savefig(path, dpi=100)
