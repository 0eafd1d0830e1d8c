"""Losses of fine-tuning. Each returns named terms, which the training loop weights and sums."""

from functools import reduce

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor, nn

# the authors' settings of MONAI's soft Dice
DICE = {"squared_pred": True, "smooth_nr": 0.0, "smooth_dr": 1e-6}
SOFTMAX_DICE = DiceLoss(to_onehot_y=True, softmax=True, **DICE)
SIGMOID_DICE = DiceLoss(sigmoid=True, **DICE)


def dice_ce(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
    """Return {`dice`, `ce`}: soft Dice and cross-entropy over a softmax, in float32 under autocast too.

    Args:
        logits: (B, K, D, H, W).
        label: ids (B, 1, D, H, W).
        weight: (K,) of the classes in the cross-entropy, on the device of the logits; none: equal.
    """
    logits, label = logits.float(), label.long()
    return {"dice": SOFTMAX_DICE(logits, label), "ce": F.cross_entropy(logits, label[:, 0], weight)}


def class_weights(counts: Tensor, power: float) -> Tensor:
    """Return weights (K,) of the cross-entropy, proportional to (share of voxels) ** -power; our choice.

    They are scaled so that their mean over voxels is 1. Classes without voxels count as if they had one.

    Args:
        counts: voxels of each class (K,) in the training volumes.
        power: 0 gives equal weights, 1 gives each class the same part in the loss.
    """
    share = counts.double().clamp(min=1) / counts.sum()
    weight = share**-power
    return (weight / (weight * share).sum()).float()


@torch.no_grad()
def start_at_prior(bias: Tensor, counts: Tensor, power: float = 0.0) -> None:
    """Set the bias of a last layer, in place, so that the constant prediction of least cross-entropy is made at first.

    Without weights of classes that are their shares of the voxels. Where most voxels are background, a network that
    starts at equal probabilities first learns to predict background everywhere, and may stay there for hundreds of
    updates. After Lin et al., Focal Loss for Dense Object Detection, 2017, section 3.3; the measured shares, where they
    have one number for rare classes, are our choice.

    Args:
        bias: (n * K,), the K classes of each of n voxels.
        counts: voxels of each class (K,) in the training volumes. Classes without voxels count as if they had one.
        power: that of `class_weights`.
    """
    share = (counts.double().clamp(min=1) / counts.sum()) ** (1 - power)
    bias.copy_((share / share.sum()).log().repeat(len(bias) // len(share)))


def region_dice(logits: Tensor, label: Tensor, regions: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return {`dice`}: soft Dice of overlapping regions, each with its own sigmoid (MSD01).

    Args:
        logits: (B, R, D, H, W).
        label: ids (B, 1, D, H, W).
        regions: name -> ids whose union it is.
    """
    return {"dice": SIGMOID_DICE(logits.float(), one_hot_regions(label, regions).float())}


def one_hot_regions(label: Tensor, regions: dict[str, tuple[int, ...]]) -> Tensor:
    """Return overlapping regions (B, R, D, H, W) as booleans from ids (B, 1, D, H, W)."""
    # numbers, not a tensor of ids: it would be copied to the device in every step, which waits for it
    return torch.cat([reduce(torch.logical_or, [label == number for number in ids]) for ids in regions.values()], dim=1)


def classification_losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return {`ce`} of a batch with `image` (B, C, *roi) and `target` (B,)."""
    return {"ce": F.cross_entropy(model(batch["image"]).float(), batch["target"])}
