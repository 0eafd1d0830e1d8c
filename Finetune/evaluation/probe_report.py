"""The results of probes: means over seeds and cases with intervals, and differences to random encoders."""

from collections.abc import Mapping, Sequence
from typing import Any

from Finetune.evaluation.formats import aligned, fixed, interval_text
from Finetune.evaluation.statistics import grouped, mean, mean_and_interval

# seed -> case -> value
Scores = Mapping[int, Mapping[str, float | None]]


def summaries(rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a summary per probe, metric, number of labels and initialisation.

    Args:
        rows: one per probe, metric, number of labels, initialisation and seed, as in probe.json.
        baselines: initialisation -> the random one that it is compared with.
    """
    groups = grouped(rows, lambda row: (row["probe"], row["metric"], row["labels"], row["init"]))
    found = []
    for (probe, metric, labels, init), of_seeds in groups.items():
        baseline = groups.get((probe, metric, labels, baselines.get(init)), [])
        scores, of_baseline = by_seed(of_seeds), by_seed(baseline)
        value, interval = over_cases(scores)
        found.append(
            {
                "probe": probe,
                "metric": metric,
                "labels": labels,
                "init": init,
                "test": value,
                "ci95": interval,
                "seeds": [mean(of_cases.values()) for of_cases in scores.values()],
                "development": mean(row["development"] for row in of_seeds),
                "learning_rates": [row["learning_rate"] for row in of_seeds],
                "minus_random": minus(scores, of_baseline) if baseline else None,
            }
        )
    return found


def by_seed(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float | None]]:
    """Return seed -> test case -> value."""
    return {row["seed"]: row["test_cases"] for row in rows}


def over_cases(scores: Scores) -> tuple[float | None, list[float] | None]:
    """Return the mean over cases of the mean over seeds, and its interval by bootstrap over cases."""
    cases = next(iter(scores.values()))
    return mean_and_interval(mean(of_cases[case] for of_cases in scores.values()) for case in cases)


def minus(scores: Scores, baseline: Scores) -> dict[str, Any]:
    """Return the mean difference, paired by seed and case, and its interval."""
    deltas: dict[int, dict[str, float | None]] = {}
    for seed, of_cases in scores.items():
        pairs = {case: (value, baseline[seed][case]) for case, value in of_cases.items()}
        deltas[seed] = {case: None if None in pair else pair[0] - pair[1] for case, pair in pairs.items()}
    value, interval = over_cases(deltas)
    return {"difference": value, "ci95": interval}


def probe_table(result: Mapping[str, Any]) -> str:
    """Return the content of probe.json as text."""
    development, test = (len(result[f"{part}_cases"]) for part in ("development", "test"))
    lines = [
        f"{result['preset']}, fold {result['fold']}: probes of frozen features",
        f"test: mean over {test} cases of the mean over seeds, with its 95 % interval by bootstrap over cases",
        f"range: lowest and highest seed; development: the {development} cases that chose the learning rate",
        "minus random: to random encoders of the same architecture, paired by seed and case",
        "",
    ]
    header = ("probe", "metric", "initialisation", "labels", "test", "interval", "range", "minus random")
    lines += aligned([(*header, "development", "learning rates"), *map(_cells, result["summaries"])], left=3)
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])]) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    seeds = [value for value in row["seeds"] if value is not None]
    spread = f"{fixed(min(seeds))}..{fixed(max(seeds))}" if len(seeds) > 1 else "-"
    delta, interval = row["minus_random"], interval_text(row["ci95"], none="-")
    gain = f"{fixed(delta['difference'], sign='+')} ({interval_text(delta['ci95'], '+', none='-')})" if delta else ""
    rates = " ".join(f"{rate:g}" for rate in row["learning_rates"] if rate is not None)
    head = [row["probe"], row["metric"], row["init"], str(row["labels"])]
    return [*head, fixed(row["test"]), interval, spread, gain, fixed(row["development"]), rates]
