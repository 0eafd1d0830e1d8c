"""Losses against MONAI's DiceCELoss and against the formula."""

import pytest
import torch
from monai.losses import DiceCELoss

from Finetune.losses import class_weights, dice_ce, one_hot_regions, region_dice, start_at_prior

REGIONS = {"core": (2, 3), "whole": (1, 2, 3), "enhancing": (3,)}


def test_terms_add_up_to_monais_dice_ce():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 4, 6, 5, 7), torch.randint(0, 4, (2, 1, 6, 5, 7), dtype=torch.uint8)
    reference = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-6)
    terms = dice_ce(logits, label)
    torch.testing.assert_close(terms["dice"] + terms["ce"], reference(logits, label.long()))
    assert all(value.dtype == torch.float32 for value in dice_ce(logits.bfloat16(), label).values())


def test_classes_are_weighted_by_their_share_of_the_voxels():
    counts = torch.tensor([900, 90, 10])
    assert torch.equal(class_weights(counts, 0.0), torch.ones(3))
    # each class has the same part in the loss
    torch.testing.assert_close(class_weights(counts, 1.0) * counts / counts.sum(), torch.full((3,), 1 / 3))
    half = class_weights(counts, 0.5)
    torch.testing.assert_close(half[2] / half[0], torch.tensor(90**0.5))
    assert torch.isfinite(class_weights(torch.tensor([5, 0]), 1.0)).all()


def test_weights_are_those_of_the_cross_entropy():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 1, 4, 4, 4), dtype=torch.uint8)
    weight = torch.tensor([0.5, 1.0, 4.0])
    share = weight[label[:, 0].long()]
    expected = (share * torch.nn.functional.cross_entropy(logits, label[:, 0].long(), reduction="none")).sum()
    plain, weighted = dice_ce(logits, label), dice_ce(logits, label, weight)
    torch.testing.assert_close(weighted["ce"], expected / share.sum())
    assert torch.equal(weighted["dice"], plain["dice"])


@pytest.mark.parametrize("power", [0.0, 0.6, 1.0])
def test_no_constant_prediction_is_better_than_the_prior(power):
    label = torch.tensor([0] * 90 + [1] * 9 + [2]).view(1, 1, 100, 1, 1)
    counts = label.flatten().bincount()
    bias = torch.full((6,), 0.3)
    start_at_prior(bias, counts, power)
    assert torch.equal(bias[:3], bias[3:])
    constant = bias[:3].clone().requires_grad_()
    dice_ce(constant.view(1, 3, 1, 1, 1).expand(1, 3, 100, 1, 1), label, class_weights(counts, power))["ce"].backward()
    assert constant.grad.abs().max() < 1e-6
    if power == 0:
        torch.testing.assert_close(constant.softmax(0), torch.tensor([0.9, 0.09, 0.01]))


def test_classes_without_voxels_have_a_finite_prior():
    bias = torch.zeros(2)
    start_at_prior(bias, torch.tensor([100, 0]))
    assert torch.isfinite(bias).all() and bias[1] < bias[0]


def test_region_dice_is_the_formula_per_region():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 6, 5, 7), torch.randint(0, 4, (2, 1, 6, 5, 7), dtype=torch.uint8)
    target = one_hot_regions(label, REGIONS).float()
    assert torch.equal(target[:, 1], (label[:, 0] > 0).float()) and torch.equal(
        target[:, 2], (label[:, 0] == 3).float()
    )
    assert torch.equal(target[:, :1], torch.isin(label, torch.tensor(REGIONS["core"])).float())
    p = logits.sigmoid()
    overlap = (p * target).sum((2, 3, 4))
    dice = 2 * overlap / ((p**2).sum((2, 3, 4)) + (target**2).sum((2, 3, 4)) + 1e-6)
    torch.testing.assert_close(region_dice(logits, label, REGIONS)["dice"], (1 - dice).mean())
