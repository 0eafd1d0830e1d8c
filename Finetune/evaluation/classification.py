"""Scores of a classification: accuracy and AUC, with the files that hold them."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from monai.metrics import compute_roc_auc
from torch import Tensor

from common.cache.volume import CachedVolume
from common.files import save_bytes
from Finetune.evaluation.statistics import bootstrap_interval
from Finetune.presets import Preset


def class_scores(shares: Tensor, targets: Tensor, preset: Preset) -> dict[str, float]:
    """Probabilities (N, K) and classes (N) -> accuracy, AUC per class, and `auc`, their mean. A class that all or none
    of the cases have has no AUC and is left out."""
    scores = {"accuracy": float((shares.argmax(dim=1) == targets).float().mean())}
    for number, name in preset.labels.items():
        positive = (targets == number).float()
        if 0 < positive.sum() < len(positive):
            scores[f"auc {name}"] = float(compute_roc_auc(shares[:, number], positive))
    values = [value for name, value in scores.items() if name.startswith("auc ")]
    return scores | ({"auc": sum(values) / len(values)} if values else {})


def write_scores(
    out: Path,
    entries: Sequence[CachedVolume],
    shares: Tensor,
    targets: Tensor,
    scores: dict[str, float],
    preset: Preset,
) -> None:
    """classification.csv and classification.json in `out`."""
    found = shares.argmax(dim=1)
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["case", "class", "predicted", *(f"probability {name}" for name in preset.labels.values())])
    for entry, target, guess, row in zip(entries, targets.tolist(), found.tolist(), shares.tolist()):
        writer.writerow([entry.name, preset.labels[target], preset.labels[guess], *(f"{value:.4f}" for value in row)])
    interval = bootstrap_interval((found == targets).float().tolist())
    absent = [name for number, name in preset.labels.items() if not (targets == number).any()]
    card = {"preset": preset.name, "cases": len(entries), "scores": scores, "accuracy_ci95": interval, "absent": absent}
    save_bytes(out / "classification.csv", buffer.getvalue().encode())
    save_bytes(out / "classification.json", json.dumps(card, indent=2).encode())
