"""The patch embedding is initialised for the mean and standard deviation of the data."""

import pytest
import torch

from common.cache.statistics import InputStatistics, input_statistics
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_convvit3d import ConvViT3D
from Pretrain.build import build_task
from tests.Pretrain.test_main_pretrain import pretrain
from tests.Pretrain.test_pretrain_mim import TOY, build

MEAN, STD = (0.5, 0.2), (0.25, 0.1)


class Volume:
    """A cached volume of two channels with a full and a reduced level."""

    levels = [(8, 8, 8), (4, 4, 4)]

    def __init__(self, offset):
        self.values = torch.rand(2, 4, 4, 4) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1) + offset

    def read(self, start, size, level=0, out_size=None):
        assert level == 1 and tuple(size) == self.levels[1]
        return self.values


def vit():
    return VisionTransformer3D(img_size=16, patch_size=8, in_chans=2, embed_dim=24, depth=1, num_heads=2)


def hybrid():
    return ConvViT3D(32, 2, embed_dims=(6, 6, 12, 24), depths=(1, 1, 1, 1), num_heads=2)


@pytest.mark.parametrize("make, size", [(vit, 16), (hybrid, 32)])
def test_the_encoder_sees_standardised_input(make, size):
    """f(x) after folding equals f((x - mean) / std) before it."""
    x = torch.rand(2, 2, size, size, size)
    mean, std = (torch.tensor(values).view(1, 2, 1, 1, 1) for values in (MEAN, STD))
    encoder = make().eval()
    expected = encoder((x - mean) / std)
    encoder.standardize_input(MEAN, STD)
    torch.testing.assert_close(encoder(x), expected, atol=2e-5, rtol=1e-4)


def test_statistics_are_those_of_all_voxels():
    volumes = [Volume(offset) for offset in (0.0, 1.0, 5.0)]
    voxels = torch.cat([volume.values.flatten(1) for volume in volumes], dim=1).double()
    measured = input_statistics(volumes)
    assert measured.mean == pytest.approx(voxels.mean(dim=1).tolist())
    assert measured.std == pytest.approx(voxels.std(dim=1, correction=0).tolist())


def test_mim_is_standardised_too():
    plain, plan, settings = build(TOY)
    torch.manual_seed(0)
    plain = build_task(settings, plan).method.encoder.patch_embed1.proj
    torch.manual_seed(0)
    changed = build_task(settings, plan, InputStatistics((0.5,), (0.25,))).method.encoder.patch_embed1.proj
    torch.testing.assert_close(changed.weight, plain.weight / 0.25)
    torch.testing.assert_close(changed.bias, plain.bias - 0.5 * changed.weight.sum(dim=(1, 2, 3, 4)))


def test_a_run_standardises_teacher_and_student_and_records_it(scans, tmp_path):
    contents = []
    for flag in ("--standardize", "--no-standardize"):
        pretrain(scans, tmp_path / flag, flag, "--lr", "0", "--epochs", "1")
        contents.append(torch.load(tmp_path / flag / "checkpoint-last.pth", weights_only=True))
    on, off = contents
    assert off["args"]["inputs"] is None and len(on["args"]["inputs"]["mean"]) == 1
    (mean,), (std,) = on["args"]["inputs"]["mean"], on["args"]["inputs"]["std"]
    for part, prefix in (("student", "module.backbone."), ("teacher", "backbone.")):
        weight, bias = (f"{prefix}patch_embed.proj.{name}" for name in ("weight", "bias"))
        torch.testing.assert_close(on[part][weight], off[part][weight] / std)
        torch.testing.assert_close(
            on[part][bias], -(on[part][weight] * mean).sum(dim=(1, 2, 3, 4)), atol=1e-5, rtol=1e-4
        )
