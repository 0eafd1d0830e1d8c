"""The results of a sweep: mean Dice with intervals per initialisation and number of labels, differences to scratch, and
learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from Finetune.evaluation.formats import aligned, fixed, interval_text
from Finetune.evaluation.report import save_figure
from Finetune.evaluation.statistics import grouped, mean, mean_and_interval

# seed -> case -> mean Dice over its classes
Scores = Mapping[int, Mapping[str, float | None]]


def short_name(init: str) -> str:
    """Return a name for folders and tables: run/checkpoint-last.pth -> run-checkpoint-last."""
    path = Path(init)
    return init if init == "scratch" else f"{path.resolve().parent.name}-{path.stem}"


def summary(init: str, count: int, planned: int, scores: Scores, scratch: Scores) -> dict[str, Any]:
    """Return the row of one initialisation with one number of labels.

    Means are over cases, of the mean over seeds; intervals are by bootstrap over cases.

    Args:
        planned: number of seeds of the sweep.
        scores: of the seeds that are done.
        scratch: scores from scratch with as many labels; {} for scratch itself.
    """
    cases = sorted({case for of_cases in scores.values() for case in of_cases})
    dice, interval = mean_and_interval(mean(of_cases.get(case) for of_cases in scores.values()) for case in cases)
    return {
        "init": init,
        "count": count,
        "seeds": {str(seed): mean(of_cases.values()) for seed, of_cases in scores.items()},
        "missing": planned - len(scores),
        "dice": dice,
        "ci95": interval,
        "minus_scratch": versus(scores, scratch),
    }


def versus(scores: Scores, scratch: Scores) -> dict[str, Any] | None:
    """Return the mean difference to scratch, paired by case and seed, and its interval; None without a common seed."""
    seeds = sorted(scores.keys() & scratch.keys())
    if not seeds:
        return None
    deltas = []
    for case in scores[seeds[0]]:
        pairs = [(scores[seed].get(case), scratch[seed].get(case)) for seed in seeds]
        deltas.append(mean(a - b for a, b in pairs if a is not None and b is not None))
    value, interval = mean_and_interval(deltas)
    return {"difference": value, "ci95": interval, "seeds": len(seeds)}


def sweep_table(result: Mapping[str, Any]) -> str:
    """Return the content of sweep.json as text."""
    header = ("initialisation", "labels", "Dice", "interval", "seeds (min..max)", "minus scratch")
    title = f"{result['preset']}, fold {result['fold']}: mean Dice over cases (95 % interval by bootstrap over cases)"
    lines = [title, "", *aligned([header, *map(_cells, result["rows"])])]
    lines += [f"FAILED: {run}: {reason}" for run, reason in result["failed"].items()]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    seeds = [value for value in row["seeds"].values() if value is not None]
    spread = f"{len(seeds)} ({fixed(min(seeds))}..{fixed(max(seeds))})" if seeds else "none done"
    if row["missing"]:
        spread += f", {row['missing']} missing"
    delta = row["minus_scratch"]
    gain = f"{fixed(delta['difference'], sign='+')} ({interval_text(delta['ci95'], none='-')})" if delta else ""
    interval = interval_text(row["ci95"], none="-")
    return [short_name(row["init"]), str(row["count"]), fixed(row["dice"]), interval, spread, gain]


def draw_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the mean Dice against the number of labels: a curve with intervals per initialisation, a dot per seed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    done = sorted((row for row in rows if row["dice"] is not None), key=lambda row: row["count"])
    curves = grouped(done, lambda row: row["init"])
    for init, points in curves.items():
        counts = [row["count"] for row in points]
        (line,) = axes.plot(counts, [row["dice"] for row in points], "o-", label=short_name(init))
        low, high = zip(*(row["ci95"] or [row["dice"]] * 2 for row in points))
        axes.fill_between(counts, low, high, alpha=0.2, color=line.get_color())
        dots = [(row["count"], dice) for row in points for dice in row["seeds"].values()]
        axes.plot(*zip(*dots), ".", markersize=4, color=line.get_color())
    axes.set(xlabel="training cases with labels", ylabel="mean Dice")
    if curves:
        axes.legend()
    save_figure(path, figure)
