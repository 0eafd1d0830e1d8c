"""The score card: one CSV row per case and class, one JSON with numbers, rules and protocol, one table for reading,
and pictures."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from common.files import save_bytes
from Finetune.evaluation.metrics import METRICS, RULES, Score, case_means, summarise
from Finetune.evaluation.statistics import difference

CSV, JSON, TABLE = "scores.csv", "scores.json", "scores.txt"


def write_card(folder: Path, scores: Sequence[Score], protocol: Mapping[str, Any], notes: Sequence[str]) -> str:
    """Write scores.csv, scores.json and scores.txt; returns the table."""
    card = {"protocol": dict(protocol), "notes": list(notes), "rules": list(RULES)} | summarise(scores)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [field.name for field in fields(Score)])
    writer.writeheader()
    writer.writerows(score.row() for score in scores)
    table = as_table(card)
    save_bytes(folder / CSV, buffer.getvalue().encode())
    save_bytes(folder / JSON, json.dumps(card, indent=2).encode())
    save_bytes(folder / TABLE, table.encode())
    return table


def read_scores(folder: Path) -> tuple[list[Score], dict[str, Any]]:
    """What `write_card` wrote. InputError when the folder holds no card."""
    try:
        with open(folder / CSV, newline="") as file:
            rows = list(csv.DictReader(file))
        card = json.loads((folder / JSON).read_text())
        _ = card["protocol"].keys()
        return [_score(row) for row in rows], card
    except FileNotFoundError as error:
        raise InputError(f"{folder}: holds no score card ({Path(error.filename).name} is missing)") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: its score card cannot be read ({error})") from None


def _score(row: dict[str, str]) -> Score:
    text = {"case", "name", "status"}
    return Score(**{f.name: row[f.name] if f.name in text else _number(row[f.name]) for f in fields(Score)})


def _number(text: str) -> float | None:
    return float(text) if text else None


# ---------------------------------------------------------------- the table


def as_table(card: Mapping[str, Any]) -> str:
    """The card for reading: per class and in all, with counts, protocol, notes and rules."""
    width = max(len(name) for name in ["mean of cases", *card["classes"]])
    head = f"{'':{width}}    Dice     NSD   HD95 mm  present  missed  false pos.  absent"
    lines = [head, "-" * len(head)]
    for name, row in card["classes"].items():
        lines.append(f"{name:{width}}  {_values(row)}  {_counts(row)}")
    overall = {metric: card["mean"][metric]["mean"] for metric in METRICS}
    lines += ["-" * len(head), f"{'mean of cases':{width}}  {_values(overall)}  {_counts(card['counts'])}"]
    interval = card["mean"]["dice"]["ci95"]
    shown = f"{interval[0]:.4f}..{interval[1]:.4f}" if interval else "none, fewer than two cases"
    lines += ["", f"{card['cases']} cases; 95 % interval of the mean Dice (bootstrap over cases): {shown}"]
    lines += [f"note: {note}" for note in card["notes"]]
    lines += [f"rule: {rule}" for rule in card["rules"]]
    lines += [
        f"{key}: {_plain(value)}" for key, value in card["protocol"].items() if key not in ("cases", "checkpoints")
    ]
    for member in card["protocol"].get("checkpoints", []):
        origin = f"fold {member['fold']}, init {member['init']}"
        lines.append(f"checkpoint: {member['checkpoint']} (sha256 {member['sha256'][:12]}), {origin}")
    return "\n".join(lines) + "\n"


def _values(row: Mapping[str, float | None]) -> str:
    dice, nsd, hd95 = (row[metric] for metric in METRICS)
    return "  ".join((_fixed(dice, "6.4f", 6), _fixed(nsd, "6.4f", 6), _fixed(hd95, "8.2f", 8)))


def _fixed(value: float | None, form: str, width: int) -> str:
    return "-".rjust(width) if value is None else format(value, form)


def _counts(row: Mapping[str, int]) -> str:
    return f"{row['present']:7}  {row['missed']:6}  {row['false_positives']:10}  {row['absent']:6}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- two runs


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Paired differences b - a of two score cards on the same cases: mean, 95 % interval by bootstrap over cases,
    wins, per class.

    InputError unless both cards hold the same cases and classes.
    """
    (scores_a, card_a), (scores_b, card_b) = read_scores(a), read_scores(b)
    pairs_a, pairs_b = ({(s.case, s.name): s for s in scores} for scores in (scores_a, scores_b))
    if pairs_a.keys() != pairs_b.keys():
        other = sorted(pairs_a.keys() ^ pairs_b.keys())[0]
        where = a if other in pairs_a else b
        raise InputError(f"{a}, {b}: not the same cases and classes; only {where} has {other[1]} of {other[0]}")
    result: dict[str, Any] = {
        "a": str(a),
        "b": str(b),
        "cases": len({s.case for s in scores_a}),
        "metrics": {},
        "classes": {},
    }
    result["protocol_differs_in"] = differing(card_a["protocol"], card_b["protocol"])
    result["labels_differ_in"] = sorted(
        {case for case, name in pairs_a if pairs_a[case, name].label_ml != pairs_b[case, name].label_ml}
    )
    for metric in METRICS:
        means_a, means_b = case_means(scores_a, metric), case_means(scores_b, metric)
        result["metrics"][metric] = difference([(means_a[case], means_b[case]) for case in means_a])
    for name in dict.fromkeys(score.name for score in scores_a):
        pairs = [(pairs_a[key].dice, pairs_b[key].dice) for key in pairs_a if key[1] == name]
        result["classes"][name] = difference(pairs)
    return result


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Settings of the protocol in which two cards differ; checkpoints and cases are meant to."""
    return sorted(k for k in a.keys() | b.keys() if k not in ("checkpoints", "cases") and a.get(k) != b.get(k))


def compare_table(result: Mapping[str, Any]) -> str:
    lines = [f"b - a over {result['cases']} cases   a: {result['a']}   b: {result['b']}", ""]
    named = {f"mean {m}": d for m, d in result["metrics"].items()} | {
        f"Dice {n}": d for n, d in result["classes"].items()
    }
    width = max(map(len, named))
    for name, row in named.items():
        if row["difference"] is None:
            lines.append(f"{name:{width}}  no case has a value in both")
            continue
        interval = row["ci95"]
        shown = f"95 % {interval[0]:+.4f}..{interval[1]:+.4f}" if interval else "no interval, fewer than two cases"
        alone = f", {row['one_sided']} with a value in one only" if row["one_sided"] else ""
        lines.append(
            f"{name:{width}}  {row['difference']:+.4f}  {shown}  b higher in {row['b_higher']} of {row['pairs']}{alone}"
        )
    if result["protocol_differs_in"]:
        lines.append(f"note: the protocols differ in {', '.join(result['protocol_differs_in'])}")
    if result["labels_differ_in"]:
        lines.append(
            f"note: the reference labels are not the same ones for {', '.join(result['labels_differ_in'][:5])}"
        )
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- pictures


def box_plots(path: Path, scores: Sequence[Score]) -> None:
    """Dice per class over cases; missed organs and false positives are its zeros."""
    import matplotlib  # slow to import; only a card with pictures pays

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(score.name for score in scores))
    values = [[s.dice for s in scores if s.name == name and s.dice is not None] for name in names]
    figure, axes = pyplot.subplots(figsize=(max(4, 0.6 * len(names) + 2), 4), layout="constrained")
    axes.boxplot(values, showfliers=False)
    for position, column in enumerate(values, start=1):
        spread = np.linspace(-0.15, 0.15, len(column)) if len(column) > 1 else np.zeros(len(column))
        axes.plot(position + spread, column, "o", markersize=3, alpha=0.6)
    axes.set_xticks(
        range(1, len(names) + 1), [f"{n} ({len(v)})" for n, v in zip(names, values)], rotation=60, ha="right"
    )
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("Dice per case")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    save_bytes(path, buffer.getvalue())
