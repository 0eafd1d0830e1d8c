"""The rules of the score card, and surface distances against brute force over all pairs of boundary voxels."""

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from Finetune.evaluation.metrics import METRICS, Metric, score_case, score_class, summarise


def blob(shape, centre, radii):
    grid = np.indices(shape)
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii)) <= 1


def brute_force(a, b, spacing, tolerance):
    """Return NSD and HD95 from all pairs of boundary voxels."""
    points = [np.argwhere(m & ~binary_erosion(m)) * np.asarray(spacing) for m in (a, b)]
    pairs = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    there, back = pairs.min(axis=1), pairs.min(axis=0)
    within = (there <= tolerance).sum() + (back <= tolerance).sum()
    return within / (len(there) + len(back)), max(np.percentile(there, 95), np.percentile(back, 95))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 5.0), (3.0, 1.5, 0.7)])
# the second touches the border of the volume
@pytest.mark.parametrize("centre", [(10, 11, 9), (4, 11, 14)])
def test_distances_equal_brute_force(spacing, centre):
    label = blob((20, 22, 18), (10, 10, 9), (5, 6, 4))
    prediction = blob((20, 22, 18), centre, (6, 4, 5))
    found = score_class("c", "organ", prediction, label, spacing, tolerance=2.0)
    nsd, hd95 = brute_force(prediction, label, spacing, 2.0)
    assert 0.05 < nsd < 1 and hd95 > 0.5
    assert found.values["nsd"] == pytest.approx(nsd, abs=1e-6)
    assert found.values["hd95"] == pytest.approx(hd95, rel=1e-5)
    assert found.values["dice"] == pytest.approx(2 * (prediction & label).sum() / (prediction.sum() + label.sum()))
    assert found.label_ml == pytest.approx(label.sum() * np.prod(spacing) / 1000)


def test_perfect_prediction_and_shift_by_one_voxel():
    label = blob((20, 20, 20), (10, 10, 10), (5, 5, 5))
    shifted = np.roll(label, 1, axis=2)
    perfect = score_class("c", "organ", label, label, (1, 1, 2), 2.0).values
    assert perfect == {"dice": 1.0, "nsd": 1.0, "hd95": 0.0}
    values = score_class("c", "organ", shifted, label, (1, 1, 2), 2.0).values
    assert values["hd95"] == pytest.approx(2.0) and values["nsd"] == 1.0 and values["dice"] < 1
    assert score_class("c", "organ", shifted, label, (1, 1, 2), 1.9).values["nsd"] < 1


def test_absent_missed_and_false_positive_classes():
    empty, organ = np.zeros((10, 20, 20), bool), blob((10, 20, 20), (5, 10, 10), (3, 3, 3))
    at_miss = {"dice": 0.0, "nsd": 0.0, "hd95": pytest.approx(np.sqrt(10**2 + 20**2 + 40**2))}
    absent = score_class("c", "x", empty, empty, (1, 1, 2), 2.0)
    assert absent.status == "absent" and absent.values == {"dice": None, "nsd": None, "hd95": None}
    missed = score_class("c", "x", empty, organ, (1, 1, 2), 2.0)
    assert missed.status == "missed" and missed.values == at_miss
    false_positive = score_class("c", "x", organ, empty, (1, 1, 2), 2.0)
    assert false_positive.status == "false positive" and false_positive.values == at_miss
    assert false_positive.label_ml == 0


def test_a_registered_metric_reaches_scores_and_means(monkeypatch):
    overlap = Metric(lambda masks: float((masks.prediction & masks.label).sum()), "Overlap", "higher", at_miss="0")
    monkeypatch.setitem(METRICS, "overlap", overlap)
    label = blob((12, 12, 12), (6, 6, 6), (3, 3, 3)).astype(np.uint8)
    scores = score_case("a", label, label, (1, 1, 1), {"one": (1,)})
    assert scores[0].values["overlap"] == label.sum()
    assert summarise(scores)["mean"]["overlap"]["mean"] == label.sum()


def test_means_are_over_classes_then_over_cases():
    shape = (12, 12, 12)
    organ = blob(shape, (6, 6, 6), (3, 3, 3))
    label = organ.astype(np.uint8)
    classes = {"one": (1,), "two": (2,), "three": (3,)}
    # Dice: 1, no value, no value
    scores = score_case("a", label, label, (1, 1, 1), classes)
    label_b, prediction_b = label.copy(), label.copy()
    label_b[0, 0, 0], prediction_b[11, 11, 11] = 2, 3
    # Dice: 1, missed 0, false positive 0
    scores += score_case("b", prediction_b, label_b, (1, 1, 1), classes)
    card = summarise(scores)
    # not the mean of the four values
    assert card["mean"]["dice"]["mean"] == pytest.approx((1.0 + 1 / 3) / 2)
    assert card["counts"] == {"present": 3, "missed": 1, "false_positives": 1, "absent": 2}
    values = {"dice": 0.0, "nsd": 0.0, "hd95": pytest.approx(np.sqrt(432))}
    assert card["classes"]["two"] == values | {"present": 1, "missed": 1, "false_positives": 0, "absent": 1}
    assert card["classes"]["three"]["false_positives"] == 1 and card["classes"]["three"]["dice"] == 0.0


def test_missing_a_class_worsens_every_mean():
    label = np.zeros((16, 16, 16), np.uint8)
    for number in (1, 2, 3):
        label[blob(label.shape, (4 * number, 8, 8), (1.5, 5, 5))] = number
    classes = {str(number): (number,) for number in (1, 2, 3)}
    prediction = np.roll(label, 1, axis=1)
    before = summarise(score_case("a", prediction, label, (1, 1, 1), classes))["mean"]
    prediction[prediction == 2] = 0
    after = summarise(score_case("a", prediction, label, (1, 1, 1), classes))["mean"]
    assert after["dice"]["mean"] < before["dice"]["mean"] and after["nsd"]["mean"] < before["nsd"]["mean"]
    assert after["hd95"]["mean"] > before["hd95"]["mean"]
