"""The paired comparison of two score cards on the same cases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError
from Finetune.evaluation.formats import aligned, fixed, interval_text
from Finetune.evaluation.metrics import METRICS, case_means
from Finetune.evaluation.protocol import differing_keys
from Finetune.evaluation.report import read_card
from Finetune.evaluation.statistics import difference, grouped


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Return the differences b - a of the cards in two folders, paired by case.

    `metrics` has a row for the mean of each metric, `classes` one for the Dice of each class (see `difference`).

    Raises:
        InputError: a card cannot be read, or they differ in cases or classes.
    """
    (scores_a, protocol_a), (scores_b, protocol_b) = read_card(a), read_card(b)
    by_key_a, by_key_b = ({(s.case, s.name): s for s in scores} for scores in (scores_a, scores_b))
    if unpaired := sorted(by_key_a.keys() ^ by_key_b.keys()):
        where, (case, name) = a if unpaired[0] in by_key_a else b, unpaired[0]
        raise InputError(f"{a}, {b}: not the same cases and classes; only {where} has {name} of {case}")
    pairs = [(score, by_key_b[key]) for key, score in by_key_a.items()]
    means = {metric: (case_means(scores_a, metric), case_means(scores_b, metric)) for metric in METRICS}
    dice = {
        name: [(one.values["dice"], other.values["dice"]) for one, other in of_class]
        for name, of_class in grouped(pairs, lambda pair: pair[0].name).items()
    }
    return {
        "a": str(a),
        "b": str(b),
        "cases": len({score.case for score in scores_a}),
        "metrics": {
            metric: difference([(in_a[case], in_b[case]) for case in in_a]) for metric, (in_a, in_b) in means.items()
        },
        "classes": {name: difference(values) for name, values in dice.items()},
        "protocol_differs_in": differing_keys([protocol_a, protocol_b]),
        "labels_differ_in": sorted({one.case for one, other in pairs if one.label_ml != other.label_ml}),
    }


def comparison_table(result: Mapping[str, Any]) -> str:
    """Return the result of `compare` as text."""
    rows = [_cells(f"mean {METRICS[name].label}", row, METRICS[name].better) for name, row in result["metrics"].items()]
    rows += [_cells(f"Dice {name}", row, METRICS["dice"].better) for name, row in result["classes"].items()]
    header = f"b - a over {result['cases']} cases   a: {result['a']}   b: {result['b']}"
    lines = [header, "", *aligned(rows, left=4)]
    if result["protocol_differs_in"]:
        lines.append(f"note: the protocols differ in {', '.join(result['protocol_differs_in'])}")
    if result["labels_differ_in"]:
        lines.append(f"note: the reference labels differ for {', '.join(result['labels_differ_in'][:5])}")
    return "\n".join(lines) + "\n"


def _cells(name: str, row: Mapping[str, Any], better: str) -> list[str]:
    if row["difference"] is None:
        return [name, "-", "no case has a value in both", ""]
    wins = row["b_higher"] if better == "higher" else row["a_higher"]
    unpaired = f", {row['unpaired']} with a value in one only" if row["unpaired"] else ""
    interval = f"95 % interval {interval_text(row['ci95'], sign='+')}"
    return [name, fixed(row["difference"], sign="+"), interval, f"b better in {wins} of {row['pairs']}{unpaired}"]
