"""Segmentation losses, MONAI's. Each returns named terms; their weights are the engine's business."""

from functools import reduce

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor, nn


class DiceCE(nn.Module):
    """Soft Dice and cross-entropy over a softmax, the authors' settings: squared predictions, smooth_nr 0, smooth_dr
    1e-6."""

    def __init__(self):
        super().__init__()
        self.dice = DiceLoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-6)

    def forward(self, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Logits (B, K, D, H, W) and ids (B, 1, D, H, W) -> {`dice`, `ce`}, in full precision whatever autocast
        says."""
        logits, label = logits.float(), label.long()
        return {"dice": self.dice(logits, label), "ce": F.cross_entropy(logits, label[:, 0])}


class RegionDice(nn.Module):
    """Soft Dice of overlapping regions, each with a sigmoid of its own (MSD01)."""

    def __init__(self, regions: dict[str, tuple[int, ...]]):
        super().__init__()
        self.regions = regions
        self.dice = DiceLoss(sigmoid=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-6)

    def forward(self, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Logits (B, R, D, H, W) and ids (B, 1, D, H, W) -> {`dice`}."""
        return {"dice": self.dice(logits.float(), one_hot_regions(label, self.regions).float())}


def one_hot_regions(label: Tensor, regions: dict[str, tuple[int, ...]]) -> Tensor:
    """Ids (B, 1, D, H, W) -> overlapping regions (B, R, D, H, W) of booleans.

    Ids are compared one by one as plain numbers: a tensor of them would be copied to the device, and waited for, in
    every step.
    """
    return torch.cat([reduce(torch.logical_or, [label == number for number in ids]) for ids in regions.values()], dim=1)


def classification_losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """{`ce`} of `image` (B, C, *roi) and `target` (B,)."""
    return {"ce": F.cross_entropy(model(batch["image"]).float(), batch["target"])}
