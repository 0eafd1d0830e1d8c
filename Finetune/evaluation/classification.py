"""Accuracy and AUC of a classification, and the files that hold them."""

from collections.abc import Sequence
from pathlib import Path

from monai.metrics import compute_roc_auc
from torch import Tensor

from Finetune.evaluation.formats import write_csv, write_json
from Finetune.evaluation.statistics import bootstrap_interval
from Finetune.presets import Preset

CLASSES_CSV, CLASSES_JSON = "classification.csv", "classification.json"


def class_scores(probabilities: Tensor, targets: Tensor, preset: Preset) -> dict[str, float]:
    """Return `accuracy`, `auc NAME` per class (one class against the others), and `auc`, their mean.

    A class that all or none of the cases have has no AUC and is left out.

    Args:
        probabilities: (N, K).
        targets: class numbers (N,).
    """
    scores = {"accuracy": float((probabilities.argmax(dim=1) == targets).float().mean())}
    aucs = []
    for number, name in preset.labels.items():
        positive = (targets == number).float()
        if 0 < positive.sum() < len(positive):
            aucs.append(float(compute_roc_auc(probabilities[:, number], positive)))
            scores[f"auc {name}"] = aucs[-1]
    return scores | ({"auc": sum(aucs) / len(aucs)} if aucs else {})


def write_scores(
    out: Path, cases: Sequence[str], probabilities: Tensor, targets: Tensor, scores: dict[str, float], preset: Preset
) -> None:
    """Write classification.csv (a row per case) and classification.json to `out`."""
    names, predicted = preset.labels, probabilities.argmax(dim=1)
    rows = [["case", "class", "predicted", *(f"probability {name}" for name in names.values())]]
    for case, target, guess, row in zip(cases, targets.tolist(), predicted.tolist(), probabilities.tolist()):
        rows.append([case, names[target], names[guess], *(f"{value:.4f}" for value in row)])
    interval = bootstrap_interval((predicted == targets).float().tolist())
    absent = [name for number, name in names.items() if not (targets == number).any()]
    card = {"preset": preset.name, "cases": len(cases), "scores": scores, "accuracy_ci95": interval, "absent": absent}
    write_csv(out / CLASSES_CSV, rows)
    write_json(out / CLASSES_JSON, card)
