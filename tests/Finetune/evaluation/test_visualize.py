"""Pictures of segmentations: orientation, planes, colours, layout."""

import numpy as np
import pytest

from Finetune.evaluation.visualize import COLUMN, GAP, colour, labelled_box, most_labelled, overlay, panel


def test_axial_plane_is_in_radiological_view():
    image, label = np.zeros((4, 4, 3)), np.zeros((4, 4, 3), np.uint8)
    # RAS: right, posterior
    label[3, 0, 1] = 5
    pixels = panel(image, label, axis=2, index=1, spacing=(1, 1, 1), width=80)
    marked = np.argwhere(pixels.any(axis=-1))
    # at the bottom, on the left
    assert (marked.min(0) == (60, 0)).all()
    assert tuple(pixels[-1, 0]) == pytest.approx(tuple(round(0.45 * c) for c in colour(5)), abs=1)


def test_planes_have_most_labelled_voxels():
    label = np.zeros((6, 6, 6), np.uint8)
    label[1, 2, 2:5] = 1
    assert (most_labelled(label, 0), most_labelled(label, 1)) == (1, 2)
    assert most_labelled(np.zeros((6, 6, 6), np.uint8), 0) == 3


@pytest.mark.parametrize("slices", [4, 60])
def test_planes_of_thin_and_thick_scans_fill_the_frame(slices):
    image, label = np.ones((60, 40, slices)), np.zeros((60, 40, slices), np.uint8)
    label[:, :, :] = 2
    pixels = overlay(image, [label, label], (1, 1, 1), {1: "spleen", 2: "liver"}, ["reference", "prediction"])
    assert pixels.shape[1] == 2 * COLUMN + GAP
    # Without titles and legend, all but the gaps is image.
    planes = pixels[16:-16, :COLUMN]
    assert planes.any(axis=-1).mean() > 0.97


def test_a_picture_is_cropped_to_the_labels_of_both_maps():
    reference, prediction = np.zeros((2, 100, 100, 10), np.uint8)
    reference[50, 50, 5], prediction[90, 50, 5] = 1, 1
    assert labelled_box([reference, prediction], (5, 5, 5)) == (slice(45, 96), slice(45, 56), slice(0, 10))
    assert labelled_box([reference * 0], (5, 5, 5)) == (slice(None),) * 3
