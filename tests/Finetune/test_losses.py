"""Losses against MONAI's DiceCELoss and against the formula."""

import torch
from monai.losses import DiceCELoss

from Finetune.losses import class_weights, dice_ce, one_hot_regions, region_dice

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
