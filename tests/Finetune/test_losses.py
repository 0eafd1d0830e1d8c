"""Losses against MONAI's DiceCELoss and against the formula."""

import torch
from monai.losses import DiceCELoss

from Finetune.losses import dice_ce, one_hot_regions, region_dice

REGIONS = {"core": (2, 3), "whole": (1, 2, 3), "enhancing": (3,)}


def test_terms_add_up_to_monais_dice_ce():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 4, 6, 5, 7), torch.randint(0, 4, (2, 1, 6, 5, 7), dtype=torch.uint8)
    reference = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-6)
    terms = dice_ce(logits, label)
    torch.testing.assert_close(terms["dice"] + terms["ce"], reference(logits, label.long()))
    assert all(value.dtype == torch.float32 for value in dice_ce(logits.bfloat16(), label).values())


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
