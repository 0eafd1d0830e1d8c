"""Measure this repository beside the usual alternatives, on this machine, in one run.

    python -m benchmarks --list                      the benchmarks
    python -m benchmarks --quick                     smaller sizes: is everything in order?
    python -m benchmarks --json runs/bench.json      all of them
    python -m benchmarks --markdown runs/bench.json  the table of a finished run for docs/performance.md

Both sides do the same work, which is checked first. They take turns, so that other load on the machine affects both.
docs/performance.md explains the table.
"""

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import cache, cache_formats, growth, inference, layout, machine, mim, table, training, views, vit
from benchmarks.harness import Row
from common import distributed
from common.cli import parse, run_program
from common.config import nearest, setting
from common.errors import InputError
from common.files import check_writable, naming_errors, naming_read_errors, save_bytes
from common.runlog import print_main

Measure = Callable[[bool, torch.device], list[dict[str, Any]]]

# A benchmark of your own is one entry: `measure(quick, device)` returns rows as benchmarks/harness.py makes them.
BENCHMARKS: dict[str, tuple[str, Measure]] = {
    "cache": ("crops of cached volumes, and bytes on disk, against MONAI's PersistentDataset", cache.measure),
    "cache_formats": ("the cache's array format against others", cache_formats.measure),
    "views": ("sets of GL-MAE views: the loader's work and bytes against PersistentDataset and Resize", views.measure),
    "sliding_window": ("sliding-window inference with 14 classes against MONAI", inference.measure_window),
    "prediction": ("peak memory of Finetune.predict against the logits of the volume", inference.measure_prediction),
    "vit": ("MAE and GL-MAE against MONAI and plain timm blocks, and their cheaper recipes", vit.measure),
    "mim": ("MiM against the straightforward form of its network, and its cheaper recipe", mim.measure),
    "layout": ("channels last in memory against channels first, in convolutions", layout.measure),
    "training": ("updates end to end against their arithmetic and their loading alone", training.measure),
    "growth": ("time and memory as volumes, tokens and processes grow", growth.measure),
}


@dataclass(kw_only=True)
class BenchmarkSettings:
    """Settings of the benchmarks."""

    only: tuple[str, ...] = setting((), "names of benchmarks; none: all")
    quick: bool = setting(False, "smaller sizes and fewer rounds")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA where available")
    json: Path | None = setting(None, "file for the rows; a plot is written beside it, as .png")
    list: bool = setting(False, "print the names of the benchmarks, and stop")
    markdown: Path | None = setting(None, "print the rows of this file as a Markdown table, and stop")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(BenchmarkSettings, argv, description=__doc__)
    if settings.list:
        print_main("\n".join(f"{name:16} {description}" for name, (description, _) in BENCHMARKS.items()))
    elif settings.markdown:
        print_main(table.markdown(read_rows(settings.markdown)))
    else:
        run(settings)


def run(settings: BenchmarkSettings) -> None:
    """Run the benchmarks, print the table, and write the file after each of them.

    Raises:
        InputError: a name is unknown, the file cannot be written, or there is no such device.
    """
    names = chosen(settings.only)
    if settings.json:
        check_writable(settings.json.parent)
    device = distributed.setup(settings.device).device
    description = machine.describe(device)
    print_main(machine.text(description))
    rows: list[dict[str, Any]] = []
    for name in names:
        began = time.perf_counter()
        measured = BENCHMARKS[name][1](settings.quick, device)
        print_main(f"{name}: {time.perf_counter() - began:.0f} s")
        common = {"benchmark": name, "quick": settings.quick, "device": device.type, "machine": description}
        rows += [row | common for row in measured]
        if settings.json:
            save_bytes(settings.json, json.dumps(rows, indent=1).encode())
        gc.collect()
    print_main("\n" + table.plain(rows))
    if settings.json:
        picture = settings.json.with_suffix(".png")
        with naming_errors(picture):
            table.save(rows, picture)
        print_main(f"\nwritten: {settings.json}, {picture}")


def chosen(only: Sequence[str]) -> list[str]:
    """Return the names of the benchmarks to run, in the order of the registry."""
    for name in only:
        if name not in BENCHMARKS:
            near = nearest(name, list(BENCHMARKS))
            hint = f"did you mean {near}?" if near else f"one of {', '.join(BENCHMARKS)}"
            raise InputError(f"--only {name}: no such benchmark; {hint}")
    return [name for name in BENCHMARKS if not only or name in only]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows that `--json` wrote. InputError if the file holds something else."""
    with naming_read_errors(path):
        content = path.read_text()
    try:
        rows = json.loads(content)
    except ValueError:
        rows = None
    needed = {field.name for field in dataclasses.fields(Row)} | {"machine", "quick"}
    if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= set(row) for row in rows):
        raise InputError(f"{path}: found no rows of `python -m benchmarks --json FILE`, expected a list of them")
    return rows


if __name__ == "__main__":
    sys.exit(run_program(main))
