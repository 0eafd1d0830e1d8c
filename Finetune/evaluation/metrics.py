"""Scores of label maps: Dice, NSD, HD95 and volumes per case and class, and means that never skip a miss.

Distances and Dice are MONAI's; the rules for organs that are absent or missed, and all averaging, are here, because
MONAI's HD95 is NaN for a missed organ (so that a mean over non-NaN values improves as organs are missed) and its Dice
ignores a false positive of an absent organ.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from Finetune.evaluation.statistics import bootstrap_interval, mean

warnings.filterwarnings("ignore", message=".*always_return_as_numpy.*")  # MONAI about itself

METRICS = ("dice", "nsd", "hd95")
RULES = (
    "class absent in the label and in the prediction: no value, counted as absent",
    "class absent in the label but predicted: Dice 0, NSD 0, HD95 is the image's diagonal, counted as false positive "
    "(NSD and HD95 our choice: an empty set is as far from a prediction as a prediction from an empty set)",
    "class present in the label but missed: Dice 0, NSD 0, HD95 is the image's diagonal, counted as missed",
    "means: over the classes of a case that have a value, then over cases; per class over cases; no miss is skipped",
    "background excluded; scored on the grid of the label file; NSD counts voxels of the boundary",
)


@dataclass(frozen=True)
class Score:
    """One class in one case. Values are None where a rule says that there is none."""

    case: str
    name: str
    status: str  # "scored", "absent", "missed" or "false positive"
    dice: float | None
    nsd: float | None
    hd95: float | None  # mm
    label_ml: float
    prediction_ml: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


def score_class(
    case: str, name: str, prediction: np.ndarray, label: np.ndarray, spacing: Sequence[float], tolerance: float
) -> Score:
    """One class from two boolean arrays (D, H, W) on one grid; `spacing` and `tolerance` in mm."""
    millilitres = math.prod(spacing) / 1000
    volumes = {"label_ml": int(label.sum()) * millilitres, "prediction_ml": int(prediction.sum()) * millilitres}
    diagonal = math.hypot(*(n * s for n, s in zip(label.shape, spacing)))
    in_label, in_prediction = volumes["label_ml"] > 0, volumes["prediction_ml"] > 0
    if not in_label and not in_prediction:
        return Score(case, name, "absent", None, None, None, **volumes)
    if not (in_label and in_prediction):
        return Score(case, name, "missed" if in_label else "false positive", 0.0, 0.0, diagonal, **volumes)
    box = _bounding_box(prediction | label)
    pair = [torch.from_numpy(np.ascontiguousarray(mask[box]))[None, None] for mask in (prediction, label)]
    dice = dice_of(prediction[box], label[box])
    spacing = [float(s) for s in spacing]
    nsd = compute_surface_dice(*pair, class_thresholds=[tolerance], include_background=True, spacing=spacing)
    hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
    return Score(case, name, "scored", dice, float(nsd), float(hd95), **volumes)


def score_case(
    case: str,
    prediction: np.ndarray,
    label: np.ndarray,
    spacing: Sequence[float],
    classes: Mapping[str, Sequence[int]],
    tolerance: float = 2.0,
) -> list[Score]:
    """All classes of one case from two label maps (D, H, W) on one grid. `classes`: name -> the ids whose union it
    is."""
    if prediction.shape != label.shape:
        raise ValueError(f"{case}: prediction {prediction.shape} and label {label.shape} differ in shape")
    return [
        score_class(case, name, np.isin(prediction, ids), np.isin(label, ids), spacing, tolerance)
        for name, ids in classes.items()
    ]


def dice_of(prediction: np.ndarray, label: np.ndarray) -> float | None:
    """Dice of two boolean arrays by the rules: None when both are empty, 0 when one is."""
    total = int(prediction.sum()) + int(label.sum())
    return 2 * int((prediction & label).sum()) / total if total else None


def case_means(scores: Sequence[Score], metric: str) -> dict[str, float | None]:
    """case -> mean over its classes that have a value."""
    cases: dict[str, list[float | None]] = {}
    for score in scores:
        cases.setdefault(score.case, []).append(getattr(score, metric))
    return {case: mean(values) for case, values in cases.items()}


def summarise(scores: Sequence[Score], seed: int = 0) -> dict[str, Any]:
    """The score card's numbers: overall means with intervals, means per class, counts of absent, missed and false
    positives."""
    names = list(dict.fromkeys(score.name for score in scores))
    by_name = {name: [score for score in scores if score.name == name] for name in names}
    overall = {}
    for metric in METRICS:
        values = [value for value in case_means(scores, metric).values() if value is not None]
        overall[metric] = {"mean": mean(values), "ci95": bootstrap_interval(values, seed)}
    return {
        "cases": len({score.case for score in scores}),
        "cases_with_a_score": sum(value is not None for value in case_means(scores, "dice").values()),
        "mean": overall,
        "counts": _counts(scores),
        "classes": {
            name: {metric: mean(getattr(s, metric) for s in rows) for metric in METRICS} | _counts(rows)
            for name, rows in by_name.items()
        },
    }


def _counts(scores: Sequence[Score]) -> dict[str, int]:
    status = [score.status for score in scores]
    return {
        "present": status.count("scored") + status.count("missed"),
        "missed": status.count("missed"),
        "false_positives": status.count("false positive"),
        "absent": status.count("absent"),
    }


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Slices around the true voxels, one voxel wider where the array allows: distances inside are those of the
    whole."""
    box = []
    for axis in range(mask.ndim):
        hits = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(max(0, hits[0] - 1), hits[-1] + 2))
    return tuple(box)
