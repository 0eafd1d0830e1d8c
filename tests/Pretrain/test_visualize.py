"""Pictures of reconstructions show what they say."""

import numpy as np
import pytest
import torch

from common.training.method import Reconstruction
from Pretrain.losses import norm_pix, patchify
from Pretrain.visualize import middle, panels, picture


def made(norm_pix_loss):
    view = torch.rand(1, 1, 16, 16, 8)
    patches = patchify(view, (8, 8, 8))
    mask = torch.tensor([[1.0, 0, 0, 1]])
    return Reconstruction(view, mask, norm_pix(patches) if norm_pix_loss else patches)


def test_a_perfect_prediction_gives_the_view_back():
    for norm_pix_loss in (False, True):
        view, shown, filled = panels(made(norm_pix_loss), (8, 8, 8), norm_pix_loss)
        torch.testing.assert_close(filled, view, atol=1e-5, rtol=1e-5)


def test_visible_patches_are_shown_and_removed_ones_black():
    view, shown, _ = panels(made(False), (8, 8, 8), False)
    assert shown[:, :, :8, :8].abs().max() == 0 and shown[:, :, 8:, 8:].abs().max() == 0
    assert torch.equal(shown[:, :, :8, 8:], view[:, :, :8, 8:]) and torch.equal(shown[:, :, 8:, :8], view[:, :, 8:, :8])


@pytest.mark.parametrize("axis, place", [(2, (3, 0, 1)), (1, (3, 3, 0)), (0, (2, 0, 0))])
def test_slices_are_shown_as_a_radiologist_sees_them(axis, place):
    """The most right, posterior and inferior voxel of a middle slice: the right is on the left, the rest at the bottom.
    In the sagittal plane the posterior is on the right."""
    volume = np.zeros((4, 6, 3))
    volume[place] = 1
    shown = middle(volume, axis)
    rows, columns = [size for index, size in enumerate(volume.shape) if index != axis][::-1]
    column = columns - 1 if axis == 0 else 0
    assert shown.shape == (rows, columns) and shown[rows - 1, column] == 1


def test_a_picture_has_four_panels_in_three_planes_per_kind():
    one = picture({"local": made(True)}, (8, 8, 8), True, width=32)
    two = picture({"local": made(True), "global": made(True)}, (8, 8, 8), True, width=32)
    # a view of 16 x 16 x 8 voxels, enlarged to twice its size; titles of 18 pixels
    heights = (18 + 32) + (18 + 16) + (18 + 16)
    assert one.shape == (heights, 4 * 32 + 3 * 4, 3) and two.shape == (2 * heights, 4 * 32 + 3 * 4, 3)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_error_has_the_scale_of_the_view(norm_pix_loss):
    perfect = made(norm_pix_loss)
    wrong = perfect._replace(prediction=perfect.prediction + 1)

    def errors(reconstruction):
        """The last panel of the axial plane, without its title."""
        return picture({"local": reconstruction}, (8, 8, 8), norm_pix_loss, width=16)[18:34, -16:]

    black = errors(perfect)
    assert (black == black[0, 0]).all()
    # the middle slice shows two visible and two removed patches
    changed = (errors(wrong) != black).any(axis=-1)
    assert changed[:8, :8].all() == changed[8:, 8:].all() and changed.mean() == 0.5
