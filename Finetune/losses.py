"""Losses of fine-tuning. Each returns named terms, which the training loop weights and sums."""

from functools import reduce

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor, nn


class DiceCE(nn.Module):
    """Soft Dice and cross-entropy over a softmax, with the authors' settings of MONAI's Dice."""

    def __init__(self):
        super().__init__()
        self.dice = DiceLoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-6)

    def forward(self, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Return {`dice`, `ce`} of logits (B, K, D, H, W) and ids (B, 1, D, H, W), in float32 under autocast too."""
        logits, label = logits.float(), label.long()
        return {"dice": self.dice(logits, label), "ce": F.cross_entropy(logits, label[:, 0])}


class RegionDice(nn.Module):
    """Soft Dice of overlapping regions, each with its own sigmoid (MSD01)."""

    def __init__(self, regions: dict[str, tuple[int, ...]]):
        super().__init__()
        self.regions = regions
        self.dice = DiceLoss(sigmoid=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-6)

    def forward(self, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Return {`dice`} of logits (B, R, D, H, W) and ids (B, 1, D, H, W)."""
        return {"dice": self.dice(logits.float(), one_hot_regions(label, self.regions).float())}


def one_hot_regions(label: Tensor, regions: dict[str, tuple[int, ...]]) -> Tensor:
    """Return overlapping regions (B, R, D, H, W) as booleans from ids (B, 1, D, H, W)."""
    # numbers, not a tensor of ids: it would be copied to the device in every step, which waits for it
    return torch.cat([reduce(torch.logical_or, [label == number for number in ids]) for ids in regions.values()], dim=1)


def classification_losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return {`ce`} of a batch with `image` (B, C, *roi) and `target` (B,)."""
    return {"ce": F.cross_entropy(model(batch["image"]).float(), batch["target"])}
