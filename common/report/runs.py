"""What the folder of a run holds, read without the programs that wrote it."""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import load_mapping
from common.errors import InputError, one_line

# any of these makes a folder a run
SETTINGS, LOG, SWEEP, CARD, CLASSES = "settings.yaml", "log.jsonl", "sweep.json", "scores.json", "classification.json"
RECORD, WARNINGS, SKIPPED = "run.json", "warnings.jsonl", "anomalies.jsonl"
# written beside them
ROWS, CLASS_ROWS = "scores.csv", "classification.csv"
# endings of files whose change makes a new page
WATCHED = (".json", ".jsonl", ".yaml", ".csv", ".png")

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """A score card: `card` is scores.json or classification.json, `rows` its table of cases, `worst` the pictures."""

    folder: Path
    card: Mapping[str, Any]
    rows: list[dict[str, str]]
    worst: list[Path]

    @property
    def of_classes(self) -> bool:
        """Whether it scores a classification."""
        return "accuracy_ci95" in self.card


@dataclass(frozen=True)
class RunFolder:
    """The content of a run's folder. What a file would have given is empty, and `problems` says so in one line each.

    Attributes:
        log: lines of log.jsonl, one per epoch.
        record: run.json, see common/training/record.py.
        reconstructions: (epoch, picture), in the order of epochs.
        sweep: sweep.json; {} for other runs, and until a sweep has results.
        parts: name -> run, of a sweep.
    """

    path: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    log: list[Line] = field(default_factory=list)
    warnings: list[Line] = field(default_factory=list)
    skipped: list[Line] = field(default_factory=list)
    reconstructions: list[tuple[int, Path]] = field(default_factory=list)
    scores: Scores | None = None
    sweep: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, "RunFolder"] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """sweep, pretraining, fine-tuning, or scores for a score card alone."""
        if self.sweep or self.parts:
            return "sweep"
        if not self.settings and not self.log:
            return "scores"
        return self.about.get("program") or ("fine-tuning" if "preset" in self.settings else "pretraining")

    @property
    def about(self) -> Mapping[str, Any]:
        """What the program has recorded about the run."""
        return self.record.get("about", {})

    @property
    def epochs(self) -> tuple[int, int | None]:
        """The number of epochs that are logged, and that of the run."""
        return (self.log[-1]["epoch"] + 1 if self.log else 0), self.settings.get("epochs")

    @property
    def steps(self) -> int:
        """The number of updates that are logged."""
        return self.log[-1].get("step", 0) if self.log else 0


def read_run(folder: Path) -> RunFolder:
    """Return the content of a run's folder.

    Raises:
        InputError: it does not exist, or holds nothing that a run writes.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / SWEEP).is_file() or any(folder.glob("runs/*/training")):
        return read_sweep(folder)
    if not any((folder / name).is_file() for name in (SETTINGS, LOG, CARD)):
        inner = sorted({path.parent.name for name in (SETTINGS, SWEEP) for path in folder.glob(f"*/{name}")})
        hint = f"; did you mean {' or '.join(str(folder / name) for name in inner[:4])}?" if inner else ""
        raise InputError(f"{folder}: not the folder of a run (found none of {SETTINGS}, {LOG}, {SWEEP}, {CARD}){hint}")
    return read_training(folder)


def read_training(folder: Path) -> RunFolder:
    """Return the content of the folder of a training run, or of a score card alone."""
    problems: list[str] = []
    scores = find_scores(folder, problems)
    if not any((folder / name).is_file() for name in (SETTINGS, LOG)):
        return RunFolder(folder, scores=scores, problems=problems)
    pictures = {path: re.fullmatch(r"reconstruction-(\d+)\.png", path.name) for path in folder.glob("*.png")}
    return RunFolder(
        folder,
        settings=read_settings(folder / SETTINGS, problems),
        record=read_json(folder / RECORD, problems, "defaults, machine and versions are not known"),
        log=read_lines(folder / LOG, problems, "no epoch is done") or [],
        warnings=read_lines(folder / WARNINGS, problems),
        skipped=read_lines(folder / SKIPPED, problems),
        reconstructions=sorted((int(match[1]), path) for path, match in pictures.items() if match),
        scores=scores,
        problems=problems,
    )


def read_sweep(folder: Path) -> RunFolder:
    """Return the content of the folder of a sweep, which has results when it has ended."""
    problems: list[str] = []
    sweep = read_json(folder / SWEEP, problems, "the sweep has no results yet")
    parts = {path.name: read_training(path / "training") for path in sorted(folder.glob("runs/*"))}
    record = next((part.record for part in parts.values() if part.record), {})
    return RunFolder(folder, record=record, sweep=sweep, parts=parts, problems=problems)


# ---------------------------------------------------------------- files


def read_settings(path: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        return load_mapping(path)
    except InputError as error:
        problems.append(str(error))
        return {}


def read_json(path: Path, problems: list[str], without: str) -> Mapping[str, Any]:
    """Return the mapping in a JSON file, {} where there is none; `without` is what is then missing."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
        problems.append(f"{path.name}: found {type(content).__name__}, expected a mapping")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing: {without}")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({one_line(error, 100)})")
    return {}


def read_lines(path: Path, problems: list[str], without: str | None = None) -> list[Line]:
    """Return the mappings in a file of JSON lines. A last line that is being written is left out.

    Args:
        without: what is missing where there is no file; None: nothing.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        problems += [f"{path.name} is missing: {without}"] if without else []
        return []
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({one_line(error, 100)})")
        return []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict) and ("epoch" in content or "step" in content):
            found.append(content)
        elif number < len(lines):
            problems.append(f"{path.name}: line {number} cannot be read and is left out")
    return found


# ---------------------------------------------------------------- scores


def find_scores(folder: Path, problems: list[str]) -> Scores | None:
    """Return the score card in the folder, in its `scores`, or in `scores` beside it if that is of this run."""
    for place in (folder, folder / "scores"):
        for name, rows in ((CARD, ROWS), (CLASSES, CLASS_ROWS)):
            if (place / name).is_file():
                return read_scores(place / name, place / rows, problems)
    beside = folder.parent / "scores"
    if (beside / CARD).is_file():
        found = read_scores(beside / CARD, beside / ROWS, problems)
        members = found.card.get("protocol", {}).get("checkpoints", [])
        # by the name of the folder, because both may have been moved together
        if any(Path(member["checkpoint"]).parent.name == folder.resolve().name for member in members):
            return found
    return None


def read_scores(card: Path, rows: Path, problems: list[str]) -> Scores:
    content = read_json(card, problems, "")
    cases: list[dict[str, str]] = []
    try:
        with open(rows, newline="") as file:
            cases = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        problems.append(f"{rows.name} cannot be read ({one_line(error, 100)})")
    return Scores(card.parent, content, cases, sorted((card.parent / "worst").glob("[0-9]*-*.png")))


# ---------------------------------------------------------------- changes


def signature(folder: Path, page: Path) -> dict[Path, tuple[int, int]]:
    """Return time and size of every file that a page can show. They change when the page has to be made again.

    Args:
        page: the page itself, which does not count.
    """
    return {path: stat for path, stat in _stats(folder) if path != page}


def _stats(folder: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    for place in (folder, folder.parent / "scores"):
        for path in place.rglob("*"):
            if path.suffix in WATCHED:
                try:
                    status = path.stat()
                except FileNotFoundError:
                    # replaced while we look
                    continue
                yield path, (status.st_mtime_ns, status.st_size)
