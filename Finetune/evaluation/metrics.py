"""Metrics of label maps per case and class, and their means.

`METRICS` is the one registry: a metric in it is computed, averaged, printed, written to the score card and compared.

MONAI computes the surface distances. The rules for absent and missed classes, and all means, are this repository's:
MONAI's HD95 is NaN for a missed class, so a mean without NaNs improves as classes are missed, and its Dice ignores
false positives of an absent class.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from monai.transforms import generate_spatial_bounding_box

from Finetune.evaluation.statistics import grouped, mean, mean_and_interval

# a warning of MONAI about its own code
warnings.filterwarnings("ignore", message=".*always_return_as_numpy.*")


# ---------------------------------------------------------------- the registry


@dataclass(frozen=True)
class Masks:
    """One class in one case: two boolean masks (D, H, W), neither empty, with spacing and NSD tolerance in mm."""

    prediction: np.ndarray
    label: np.ndarray
    spacing: list[float]
    tolerance: float


@dataclass(frozen=True)
class Metric:
    """A metric, how to read it, and its value for a missed class or a false positive."""

    compute: Callable[[Masks], float]
    label: str
    better: Literal["higher", "lower"]
    at_miss: Literal["0", "the image's diagonal"]
    unit: str = ""
    decimals: int = 4

    @property
    def heading(self) -> str:
        return f"{self.label} {self.unit}".rstrip()


def dice_of(prediction: np.ndarray, label: np.ndarray) -> float | None:
    """Return the Dice of two boolean masks of one shape (D, H, W): None when both are empty, 0 when one is."""
    total = int(prediction.sum()) + int(label.sum())
    return 2 * int((prediction & label).sum()) / total if total else None


def nsd(masks: Masks) -> float:
    """Return the normalized surface distance: the fraction of boundary voxels within the tolerance."""
    return surface_metric(compute_surface_dice, masks, class_thresholds=[masks.tolerance])


def hd95(masks: Masks) -> float:
    """Return the 95th percentile of the Hausdorff distance in mm."""
    return surface_metric(compute_hausdorff_distance, masks, percentile=95)


def surface_metric(metric: Callable[..., torch.Tensor], masks: Masks, **options: Any) -> float:
    """Return a surface metric of MONAI, which expects masks (1, 1, D, H, W)."""
    pair = [torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (masks.prediction, masks.label)]
    return float(metric(*pair, include_background=True, spacing=masks.spacing, **options))


METRICS = {
    "dice": Metric(lambda masks: dice_of(masks.prediction, masks.label), "Dice", "higher", at_miss="0"),
    "nsd": Metric(nsd, "NSD", "higher", at_miss="0"),
    "hd95": Metric(hd95, "HD95", "lower", at_miss="the image's diagonal", unit="mm", decimals=2),
}
_AT_MISS = ", ".join(f"{metric.label} is {metric.at_miss}" for metric in METRICS.values())
RULES = (
    "class absent in the label and in the prediction: no value, counted as absent",
    f"class absent in the label but predicted: {_AT_MISS}; counted as false positive "
    "(for surface metrics our choice: as for a missed class)",
    f"class present in the label but missed: {_AT_MISS}; counted as missed",
    "means: over the classes of a case that have a value, then over cases; per class over cases; no miss is skipped",
    "background excluded; scored in the space of the label file; NSD counts voxels of the boundary",
)


# ---------------------------------------------------------------- one case


@dataclass(frozen=True)
class Score:
    """The metrics of one class in one case, None where the class is absent from label and prediction."""

    case: str
    name: str
    status: Literal["scored", "absent", "missed", "false positive"]
    values: Mapping[str, float | None]
    label_ml: float
    prediction_ml: float


def score_case(
    case: str,
    prediction: np.ndarray,
    label: np.ndarray,
    spacing: Sequence[float],
    classes: Mapping[str, Sequence[int]],
    tolerance: float = 2.0,
) -> list[Score]:
    """Return the scores of all classes of one case.

    Args:
        prediction, label: label maps (D, H, W) in the same space.
        spacing: mm along D, H, W.
        classes: name -> ids; the class is the union of its ids.
        tolerance: of NSD, in mm.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"{case}: prediction {prediction.shape} and label {label.shape} differ in shape")
    return [
        score_class(case, name, np.isin(prediction, ids), np.isin(label, ids), spacing, tolerance)
        for name, ids in classes.items()
    ]


def score_class(
    case: str, name: str, prediction: np.ndarray, label: np.ndarray, spacing: Sequence[float], tolerance: float
) -> Score:
    """Return the scores of one class from two boolean masks (D, H, W). `spacing` and `tolerance` are in mm."""
    voxels = int(label.sum()), int(prediction.sum())
    volumes = [count * (math.prod(spacing) / 1000) for count in voxels]
    if not any(voxels):
        return Score(case, name, "absent", dict.fromkeys(METRICS), *volumes)
    if not all(voxels):
        diagonal = math.hypot(*(n * s for n, s in zip(label.shape, spacing)))
        at_miss = {"0": 0.0, "the image's diagonal": diagonal}
        values = {key: at_miss[metric.at_miss] for key, metric in METRICS.items()}
        return Score(case, name, "missed" if voxels[0] else "false positive", values, *volumes)
    box = _bounding_box(prediction | label)
    masks = Masks(prediction[box], label[box], [float(s) for s in spacing], tolerance)
    return Score(case, name, "scored", {key: metric.compute(masks) for key, metric in METRICS.items()}, *volumes)


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Return slices around the true voxels, one voxel wider, so that boundaries in the box are those of the mask."""
    return tuple(map(slice, *generate_spatial_bounding_box(mask[None], margin=1, allow_smaller=True)))


# ---------------------------------------------------------------- many cases


def case_means(scores: Iterable[Score], metric: str) -> dict[str, float | None]:
    """Return case -> mean over its classes that have a value, None where none has."""
    by_case = grouped(scores, lambda score: score.case)
    return {case: mean(score.values[metric] for score in rows) for case, rows in by_case.items()}


def summarise(scores: Sequence[Score], seed: int = 0) -> dict[str, Any]:
    """Return the numbers of a score card: means with intervals, means per class, and counts.

    `seed` is the seed of the bootstrap.
    """
    by_case = {metric: case_means(scores, metric) for metric in METRICS}
    overall = {metric: mean_and_interval(means.values(), seed) for metric, means in by_case.items()}
    return {
        "cases": len(by_case["dice"]),
        "cases_with_a_score": sum(value is not None for value in by_case["dice"].values()),
        "mean": {metric: {"mean": value, "ci95": interval} for metric, (value, interval) in overall.items()},
        "counts": _counts(scores),
        "classes": {
            name: {metric: mean(score.values[metric] for score in rows) for metric in METRICS} | _counts(rows)
            for name, rows in grouped(scores, lambda score: score.name).items()
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
