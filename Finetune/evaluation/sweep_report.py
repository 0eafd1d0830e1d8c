"""What a grid of runs says: means and intervals per initialisation and number of labels, differences to scratch, one
curve."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import save_bytes
from Finetune.evaluation.statistics import bootstrap_interval, mean


def short_name(init: str) -> str:
    """Short and fit for a folder: run/checkpoint-last.pth -> run-checkpoint-last."""
    path = Path(init)
    return init if init == "scratch" else f"{path.resolve().parent.name}-{path.stem}"


def summary(init: str, count: int, wanted: int, done: dict[int, dict[str, float | None]]) -> dict[str, Any]:
    """One initialisation with one number of labels: mean Dice over cases and seeds, its interval by bootstrap over
    cases (each the mean over seeds), and the mean of each seed. `done`: seed -> case -> mean Dice."""
    names = sorted({case for cases in done.values() for case in cases})
    cases = {name: mean(scores.get(name) for scores in done.values()) for name in names}
    values = [value for value in cases.values() if value is not None]
    return {
        "init": init,
        "count": count,
        "seeds": {str(seed): mean(scores.values()) for seed, scores in done.items()},
        "missing": wanted - len(done),
        "dice": mean(values),
        "ci95": bootstrap_interval(values),
        "cases": {str(seed): scores for seed, scores in done.items()},
    }


def versus(row: dict[str, Any], scratch: dict[str, Any] | None) -> dict[str, Any] | None:
    """Paired by case and seed: the mean difference to scratch over cases, and its interval. None without a seed in
    common."""
    seeds = sorted(row["cases"].keys() & scratch["cases"].keys()) if scratch else []
    if not seeds:
        return None
    deltas = []
    for name in row["cases"][seeds[0]]:
        pairs = [(row["cases"][seed].get(name), scratch["cases"][seed].get(name)) for seed in seeds]
        deltas.append(mean(a - b for a, b in pairs if a is not None and b is not None))
    deltas = [delta for delta in deltas if delta is not None]
    return {"difference": mean(deltas), "ci95": bootstrap_interval(deltas), "seeds": len(seeds)}


def as_table(result: dict[str, Any]) -> str:
    width = max(len("initialisation"), *(len(short_name(row["init"])) for row in result["rows"]))
    lines = [
        f"{result['preset']}, fold {result['fold']}: mean Dice over cases (95 % interval by bootstrap over cases)",
        "",
    ]
    lines.append(
        f"{'initialisation':{width}}  labels    Dice  interval          seeds (min..max)          minus scratch"
    )
    for row in result["rows"]:
        seeds = [value for value in row["seeds"].values() if value is not None]
        spread = f"{len(seeds)} ({min(seeds):.4f}..{max(seeds):.4f})" if seeds else "none done"
        dice = f"{row['dice']:.4f}" if row["dice"] is not None else "     -"
        delta = row["minus_scratch"]
        gain = f"{delta['difference']:+.4f} {_interval(delta['ci95'])}" if delta else ""
        name = short_name(row["init"])
        lines.append(
            f"{name:{width}}  {row['count']:6}  {dice}  {_interval(row['ci95']):16}  {spread:24}  {gain}".rstrip()
        )
        if row["missing"]:
            lines.append(f"{'':{width}}  {row['missing']} of {row['missing'] + len(row['seeds'])} cells are missing")
    lines += [f"FAILED: {title}: {reason}" for title, reason in result["failed"].items()]
    return "\n".join(lines) + "\n"


def _interval(interval: list[float] | None) -> str:
    return f"{interval[0]:.4f}..{interval[1]:.4f}" if interval else "(one case)"


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Mean Dice against the number of labels, one curve per initialisation, with intervals and the single seeds."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for init in dict.fromkeys(row["init"] for row in rows):
        mine = sorted((r for r in rows if r["init"] == init and r["dice"] is not None), key=lambda r: r["count"])
        if not mine:
            continue
        x, y = [r["count"] for r in mine], [r["dice"] for r in mine]
        (line,) = axes.plot(x, y, "o-", label=short_name(init))
        bounds = [(r["ci95"] or [r["dice"]] * 2) for r in mine]
        axes.fill_between(x, [b[0] for b in bounds], [b[1] for b in bounds], alpha=0.2, color=line.get_color())
        for r in mine:
            axes.plot(
                [r["count"]] * len(r["seeds"]), list(r["seeds"].values()), ".", markersize=4, color=line.get_color()
            )
    axes.set_xlabel("training cases with labels")
    axes.set_ylabel("mean Dice")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    save_bytes(path, buffer.getvalue())
