"""Pictures of segmentations: orientation, planes, colours, layout."""

import numpy as np
import pytest

from Finetune.evaluation.visualize import PANEL, colour, most_labelled, overlay, panel


def test_axial_plane_is_in_radiological_view():
    image, label = np.zeros((4, 4, 3)), np.zeros((4, 4, 3), np.uint8)
    # RAS: right, posterior
    label[3, 0, 1] = 5
    pixels = panel(image, label, axis=2, index=1, spacing=(1, 1, 1))
    marked = np.argwhere(pixels.any(axis=-1))
    # at the bottom, on the left
    assert (marked.min(0) == (3 * PANEL // 4, 0)).all()
    assert tuple(pixels[-1, 0]) == pytest.approx(tuple(round(0.45 * c) for c in colour(5)), abs=1)


def test_planes_have_most_labelled_voxels():
    label = np.zeros((6, 6, 6), np.uint8)
    label[1, 2, 2:5] = 1
    assert (most_labelled(label, 0), most_labelled(label, 1)) == (1, 2)
    assert most_labelled(np.zeros((6, 6, 6), np.uint8), 0) == 3


@pytest.mark.parametrize("depth, beside", [(4, PANEL), (40, PANEL // 2)])
def test_thin_and_thick_scans_fit_beside_the_axial_plane(depth, beside):
    image, label = np.random.default_rng(0).random((40, 40, depth)), np.zeros((40, 40, depth), np.uint8)
    label[10:20, 10:20] = 2
    pixels = overlay(image, [label], (1, 1, 1), {1: "spleen", 2: "liver"}, ["scan"])
    assert pixels.shape[1] == PANEL + 4 + beside + 4 and PANEL <= pixels.shape[0] <= PANEL + 60
