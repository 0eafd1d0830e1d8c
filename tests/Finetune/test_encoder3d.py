"""Positions of the encoders: the table against the closed form and MONAI's, and how it is resampled."""

import math

import pytest
import torch
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding

from Finetune.encoder3d import fit_pos_embed, get_3d_sincos_pos_embed, resample_pos_embed


@pytest.mark.parametrize("width", [48, 576, 768, 512, 1024])
def test_sincos_is_the_closed_form(width):
    table, n = get_3d_sincos_pos_embed(width, (2, 3, 4), cls_token=True), width // 6
    assert table.shape == (1, 25, width) and table[0, 0].abs().max() == 0
    for d, h, w in [(0, 0, 0), (1, 2, 3), (1, 0, 2)]:
        row = table[0, 1 + d * 12 + h * 4 + w]
        for axis, p in enumerate((d, h, w)):
            for k in (0, 1, n - 1):
                angle = p / 10000 ** (k / n)
                assert abs(row[2 * n * axis + k] - math.sin(angle)) < 1e-6
                assert abs(row[2 * n * axis + n + k] - math.cos(angle)) < 1e-6
    assert table[0, :, 6 * n :].abs().sum() == 0


def test_sincos_equals_monai_with_its_axes_swapped():
    """MONAI has the thirds of the width in the order h, d, w. This repository follows the authors: d, h, w."""
    ours = get_3d_sincos_pos_embed(96, (3, 3, 3)).reshape(1, 27, 3, 32)
    theirs = build_sincos_position_embedding([3, 3, 3], 96, 3).reshape(1, 27, 3, 32)
    torch.testing.assert_close(ours, theirs[:, :, [1, 0, 2]])


def test_resampling_keeps_the_axes_of_an_anisotropic_grid():
    """A table that varies along one axis is interpolated along that axis and stays constant along the others."""
    source, target = (4, 2, 3), (8, 2, 6)
    for axis in range(3):
        ramp = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in source), indexing="ij")[axis]
        table = torch.cat([torch.full((1, 1, 2), 7.0), ramp.reshape(1, -1, 1).expand(-1, -1, 2)], 1)
        out = resample_pos_embed(table, source, target)
        assert torch.equal(out[:, 0], table[:, 0])
        volume = out[0, 1:, 0].reshape(target)
        profile = volume.movedim(axis, 0).reshape(target[axis], -1)
        assert (profile - profile[:, :1]).abs().max() < 1e-6
        expected = torch.nn.functional.interpolate(
            torch.arange(source[axis], dtype=torch.float32).reshape(1, 1, -1), size=target[axis], mode="linear"
        )
        torch.testing.assert_close(profile[:, 0], expected.flatten())


def test_fit_pos_embed_never_guesses_an_anisotropic_grid():
    table = get_3d_sincos_pos_embed(48, (6, 6, 4), cls_token=True)
    assert torch.equal(fit_pos_embed(table, (6, 6, 4)), table)
    with pytest.raises(ValueError, match="source_grid"):
        fit_pos_embed(table, (6, 6, 6))
    given = fit_pos_embed(table, (12, 6, 4), source_grid=(6, 6, 4))
    torch.testing.assert_close(given, resample_pos_embed(table, (6, 6, 4), (12, 6, 4)))
    # no CLS row in the file
    assert fit_pos_embed(table[:, 1:], (6, 6, 4)).shape == table.shape
    assert fit_pos_embed(table, (6, 6, 4), num_prefix_tokens=0).shape == (1, 144, 48)
    # int(15**3 ** (1/3)) is 14
    cube = get_3d_sincos_pos_embed(48, (15, 15, 15), cls_token=True)
    assert fit_pos_embed(cube, (6, 6, 6)).shape == (1, 217, 48)
    with pytest.raises(ValueError, match="resampling is off"):
        fit_pos_embed(cube, (6, 6, 6), resample=False)
