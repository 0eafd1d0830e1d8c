"""What the programs of this folder have in common: their options, and how they report."""

import argparse
import os
import platform
import time
from pathlib import Path

import torch


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every program."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--table", type=Path, help="file to write the table to")
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept")
    return parser


def report(table: str, what: str, began: float, target: Path | None) -> None:
    """Print a table with the time since `began` and the machine, and write it to `target`."""
    machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    seconds = f"{time.monotonic() - began:.0f} s on {machine}, torch {torch.__version__}, no GPU"
    text = f"{table}\n\n{what}{seconds}.\n"
    print(text)
    if target:
        target.write_text(text)
