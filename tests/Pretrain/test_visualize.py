"""Pictures of reconstructions show what they say."""

import numpy as np
import torch

from common.training.method import Reconstruction
from Pretrain.losses import norm_pix, patchify
from Pretrain.visualize import axial, panels, picture


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


def test_slices_are_shown_as_a_radiologist_sees_them():
    volume = np.zeros((4, 6, 3))
    volume[3, 0, 1] = 1  # RAS: the most right, the most posterior voxel of the middle slice
    shown = axial(volume)
    assert shown.shape == (6, 4) and shown[5, 0] == 1  # posterior at the bottom, the patient's right on the left


def test_a_picture_has_a_row_per_kind():
    one = picture({"local": made(True)}, (8, 8, 8), True, zoom=2)
    two = picture({"local": made(True), "global": made(True)}, (8, 8, 8), True, zoom=2)
    assert one.shape == (18 + 32, 3 * 32 + 8, 3) and two.shape == (2 * 50, 3 * 32 + 8, 3)
