"""The results of a sweep: mean scores with intervals per head, initialisation and number of labels, differences to
training from scratch and to a U-Net, and learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.config import shown
from Finetune.evaluation.formats import aligned, fixed, interval_text
from Finetune.evaluation.report import save_figure
from Finetune.evaluation.statistics import grouped, mean, nested_bootstrap

# seed -> case -> score
Scores = Mapping[int, Mapping[str, float | None]]


def summary(scores: Scores, test: Sequence[str], others: Mapping[str, Scores]) -> dict[str, Any]:
    """Return the results of one row: `score` and `ci95` over seeds and test cases, `seeds` with the mean of each, and
    `minus_NAME`, the difference to each of `others` ({} where there is nothing to compare with)."""
    value, interval = nested_bootstrap(matrix(scores, list(scores), test))
    if interval:
        # few seeds that differ much lead beyond the range of the scores
        interval = [max(0.0, interval[0]), min(1.0, interval[1])]
    return {
        "seeds": {str(seed): mean(of_cases.get(case) for case in test) for seed, of_cases in scores.items()},
        "score": value,
        "ci95": interval,
        **{f"minus_{name}": versus(scores, other, test) for name, other in others.items()},
    }


def matrix(scores: Scores, seeds: Sequence[int], cases: Sequence[str]) -> np.ndarray:
    """Return scores as (seeds, cases), NaN where there is none."""
    rows = [[scores[seed].get(case) for case in cases] for seed in seeds]
    return np.array(rows, dtype=float).reshape(len(seeds), len(cases))


def versus(scores: Scores, other: Scores, cases: Sequence[str]) -> dict[str, Any] | None:
    """Return the mean difference to other scores, paired by case and seed, and its interval; None without a common
    seed."""
    seeds = sorted(scores.keys() & other.keys())
    if not seeds:
        return None
    value, interval = nested_bootstrap(matrix(scores, seeds, cases) - matrix(other, seeds, cases))
    return {"difference": value, "ci95": interval, "seeds": len(seeds)}


# ---------------------------------------------------------------- the table


def sweep_table(result: Mapping[str, Any]) -> str:
    """Return the content of sweep.json as text."""
    score = "Dice" if result["score"] == "mean Dice" else result["score"]
    header = ["head", "initialisation", "labels", score, "interval", "seeds (min..max)", "pretraining seeds"]
    columns = ["scratch"] + (["dynunet"] if result["with_dynunet"] else [])
    header += (["chosen"] if result["tuned"] else []) + [f"minus {name}" for name in columns]
    rows = [_cells(row, columns, result["tuned"]) for row in result["rows"]]
    lines = [*_title(result), "", *aligned([header, *rows], left=2)]
    lines += [f"FAILED: {run}: {reason}" for run, reason in result["failed"].items()]
    return "\n".join(lines) + "\n"


def _title(result: Mapping[str, Any]) -> list[str]:
    test, development = len(result["test_cases"]), len(result["development_cases"])
    lines = [
        f"{result['preset']}, fold {result['fold']}: {result['score']} over {test} test cases after "
        f"{result['updates']} updates (95 % interval by bootstrap over seeds and cases)"
    ]
    if result["tuned"]:
        lines.append(f"chosen: the best of its grid on {development} development cases with the first seed")
    elif development:
        lines.append(f"{development} held-out cases are kept for development and are in no number")
    if len(result["seeds"]) == 1:
        lines.append("one seed: intervals and differences say nothing about other seeds")
    return lines


def _cells(row: Mapping[str, Any], columns: Sequence[str], tuned: bool) -> list[str]:
    seeds = [value for value in row["seeds"].values() if value is not None]
    spread = f"{len(seeds)} ({fixed(min(seeds))}..{fixed(max(seeds))})" if seeds else "none done"
    if row["missing"]:
        spread += f", {row['missing']} missing"
    cells = [row["model"], row["init"], str(row["count"]), fixed(row["score"]), interval_text(row["ci95"], none="-")]
    cells += [spread, str(row["pretraining_seeds"] or "-")]
    if tuned:
        cells.append(", ".join(f"{name} {shown(value)}" for name, value in (row["chosen"] or {}).items()) or "-")
    return cells + [_difference(row[f"minus_{name}"]) for name in columns]


def _difference(delta: Mapping[str, Any] | None) -> str:
    if not delta:
        return ""
    return f"{fixed(delta['difference'], sign='+')} ({interval_text(delta['ci95'], sign='+', none='-')})"


# ---------------------------------------------------------------- the picture


def draw_curves(path: Path, rows: Sequence[Mapping[str, Any]], score: str) -> None:
    """Draw the score against the number of labels: a curve with intervals per head and initialisation, a dot per
    seed."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    done = sorted((row for row in rows if row["score"] is not None), key=lambda row: row["count"])
    curves = grouped(done, lambda row: f"{row['model']} {row['init']}")
    for name, points in curves.items():
        counts = [row["count"] for row in points]
        (line,) = axes.plot(counts, [row["score"] for row in points], "o-", label=name)
        low, high = zip(*(row["ci95"] or [row["score"]] * 2 for row in points))
        axes.fill_between(counts, low, high, alpha=0.2, color=line.get_color())
        dots = [(row["count"], value) for row in points for value in row["seeds"].values()]
        axes.plot(*zip(*dots), ".", markersize=4, color=line.get_color())
    axes.set(xlabel="training cases with labels", ylabel=score)
    if len({row["count"] for row in done}) > 2:
        axes.set_xscale("log")
        ticks = sorted({row["count"] for row in done})
        axes.set_xticks(ticks, list(map(str, ticks)), minor=False)
        axes.minorticks_off()
    if curves:
        axes.legend(fontsize="small")
    save_figure(path, figure)
