"""The score card: scores.csv with a row per case and class, scores.json with numbers, rules and protocol, scores.txt
with a table to read, and a box plot."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.errors import InputError, one_line
from common.files import replacing, save_bytes
from Finetune.evaluation.formats import aligned, fixed, interval_text, write_csv, write_json
from Finetune.evaluation.metrics import METRICS, RULES, Score, summarise
from Finetune.evaluation.statistics import grouped

CSV, JSON, TABLE = "scores.csv", "scores.json", "scores.txt"
COUNTS = {"present": "present", "missed": "missed", "false_positives": "false pos.", "absent": "absent"}


def write_card(folder: Path, scores: Sequence[Score], protocol: Mapping[str, Any], notes: Sequence[str]) -> str:
    """Write scores.csv, scores.json and scores.txt to `folder`. Return the table."""
    card = {"protocol": dict(protocol), "notes": list(notes), "rules": list(RULES)} | summarise(scores)
    table = card_table(card)
    header = ["case", "name", "status", *METRICS, "label_ml", "prediction_ml"]
    rows = [[s.case, s.name, s.status, *s.values.values(), s.label_ml, s.prediction_ml] for s in scores]
    write_csv(folder / CSV, [header, *rows])
    write_json(folder / JSON, card)
    save_bytes(folder / TABLE, table.encode())
    return table


def read_card(folder: Path) -> tuple[list[Score], dict[str, Any]]:
    """Return the scores of a card, and its protocol.

    A metric that the card lacks, because it was registered later, has no values.

    Raises:
        InputError: the folder holds no card, or one that cannot be read.
    """
    try:
        with open(folder / CSV, newline="") as file:
            scores = [_score(row) for row in csv.DictReader(file)]
        return scores, dict(json.loads((folder / JSON).read_text())["protocol"])
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no score card ({Path(error.filename).name} is missing)") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: not a readable score card ({one_line(error)})") from None


def _score(row: Mapping[str, str]) -> Score:
    values = {metric: float(row[metric]) if row.get(metric) else None for metric in METRICS}
    volumes = float(row["label_ml"]), float(row["prediction_ml"])
    return Score(row["case"], row["name"], row["status"], values, *volumes)


# ---------------------------------------------------------------- the table


def card_table(card: Mapping[str, Any]) -> str:
    """Return the card as text: values and counts per class and overall, notes, rules and protocol."""
    overall = {metric: card["mean"][metric]["mean"] for metric in METRICS} | card["counts"]
    rows = [("mean of cases", overall), *card["classes"].items()]
    header = ["", *(metric.heading for metric in METRICS.values()), *COUNTS.values()]
    head, mean_line, *lines = aligned([header, *([name, *_cells(row)] for name, row in rows)])
    ruler = "-" * len(head)
    interval = interval_text(card["mean"]["dice"]["ci95"])
    lines = [head, ruler, *lines, ruler, mean_line, ""]
    lines.append(f"{card['cases']} cases; 95 % interval of the mean Dice (bootstrap over cases): {interval}")
    lines += [f"note: {note}" for note in card["notes"]]
    lines += [f"rule: {rule}" for rule in card["rules"]]
    return "\n".join([*lines, *_protocol_lines(card["protocol"])]) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    values = [fixed(row[name], metric.decimals) for name, metric in METRICS.items()]
    return values + [str(row[name]) for name in COUNTS]


def _protocol_lines(protocol: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{key}: {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in protocol.items()
        if key not in ("cases", "checkpoints")
    ]
    for member in protocol.get("checkpoints", []):
        origin = f"fold {member['fold']}, init {member['init']}"
        lines.append(f"checkpoint: {member['checkpoint']} (sha256 {member['sha256'][:12]}), {origin}")
    return lines


# ---------------------------------------------------------------- the picture


def box_plots(path: Path, scores: Sequence[Score]) -> None:
    """Draw the Dice per class over cases. Missed classes and false positives are its zeros."""
    columns = {
        name: [score.values["dice"] for score in rows if score.values["dice"] is not None]
        for name, rows in grouped(scores, lambda score: score.name).items()
    }
    figure = Figure(figsize=(max(4, 0.6 * len(columns) + 2), 4), layout="constrained")
    axes = figure.subplots()
    axes.boxplot(list(columns.values()), showfliers=False)
    for position, values in enumerate(columns.values(), start=1):
        spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(len(values))
        axes.plot(position + spread, values, "o", markersize=3, alpha=0.6)
    labels = [f"{name} ({len(values)})" for name, values in columns.items()]
    axes.set_xticks(range(1, len(columns) + 1), labels, rotation=60, ha="right")
    axes.set(ylim=(-0.02, 1.02), ylabel="Dice per case")
    save_figure(path, figure)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
