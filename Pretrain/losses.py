"""Losses of the pretraining methods, all computed in float32.

B batch   N patches   P voxels of a patch (times channels)   p, s views of teacher, student   K prototypes
R children (mid or down volumes)   n places in their parents   E width
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from Finetune.encoder3d import cut_patches


def patchify(x: Tensor, patch_size: Sequence[int], ids: Tensor | None = None) -> Tensor:
    """Cut volumes (B, C, D, H, W) into patches (B, N, pd*ph*pw*C) in raster order, each laid out as (pd, ph, pw, C).

    Args:
        ids: (B, K), which patches, in which order. Only these are copied.
    """
    return cut_patches(x, patch_size, ids).movedim(2, -1).flatten(2)


def unpatchify(patches: Tensor, patch_size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Invert `patchify`: patches (B, N, pd*ph*pw*C) of a grid (d, h, w) become a volume (B, C, D, H, W)."""
    (pd, ph, pw), (d, h, w) = patch_size, grid
    chans = patches.shape[2] // (pd * ph * pw)
    x = patches.reshape(len(patches), d, h, w, pd, ph, pw, chans)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(patches), chans, d * pd, h * ph, w * pw)


def norm_pix(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Return patches (..., P) normalised to mean 0 and variance 1, in float32. A constant one becomes 0.

    Args:
        eps: added to the unbiased variance; MAE's is 1e-6. Patches of less variance are not blown up to 1.
    """
    patches = patches.float()
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + eps).sqrt()


def undo_norm_pix(prediction: Tensor, patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Give predictions (..., P) of `norm_pix(patches, eps)` the mean and standard deviation of the true patches."""
    variance, mean = torch.var_mean(patches.float(), dim=-1, keepdim=True)
    return prediction.float() * (variance + eps).sqrt() + mean


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the removed patches: prediction and target (B, N, P), mask (B, N) with 1 = removed.

    Each row has the same weight whatever its number of removed patches, and one without any counts as 0. So the mean
    over equal micro-batches is that of the batch.
    """
    error = (prediction.float() - target.float()).square().mean(dim=-1)
    count = mask.sum(dim=1, keepdim=True)  # (B, 1)
    # exactly 1 where all counts are equal; `mean` multiplies by a rounded 1/B on CUDA
    weight = count.sum() / len(count) / count.clamp(min=1)
    return (error * mask * weight).sum() / count.sum().clamp(min=1)


def cross_entropy_pairs(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the cross-entropy of every student view with every teacher view, (p, s), averaged over the batch.

    Args:
        teacher: (p, B, K) probabilities, without gradient.
        student: (s, B, K) log-probabilities.
    """
    return -_pairs(teacher, student)


def cosine_pairs(teacher: Tensor, student: Tensor) -> Tensor:
    """Return 2 - 2 cos of embeddings (p, B, E) and (s, B, E) for all pairs of views, (p, s), as batch means."""
    teacher, student = F.normalize(teacher.float(), dim=-1), F.normalize(student.float(), dim=-1)
    return 2.0 - 2.0 * _pairs(teacher, student)


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (p, B, K) x (s, B, K) -> (p, s), summed over K, averaged over B. Autocast would lower an einsum."""
    return (a.float().unsqueeze(1) * b.float().unsqueeze(0)).sum(dim=-1).mean(dim=-1)


def collapse_monitors(teacher: Tensor, student: Tensor) -> dict[str, Tensor]:
    """Return values that show a collapse of the teacher, as fractions of ln K, over the batch of this process.

    `entropy` near 1 and `kl` near 0: the output is uniform and carries no information. See `entropy_of_mean` too.

    Args:
        teacher: (p, B, K) probabilities.
        student: (s, B, K) log-probabilities.
    """
    scale = math.log(teacher.shape[-1])
    entropy = -(teacher * teacher.clamp_min(1e-12).log()).sum(-1).mean()
    cross = cross_entropy_pairs(teacher, student).mean()
    return {"entropy": entropy / scale, "kl": (cross - entropy) / scale}


def entropy_of_mean(mean: Tensor) -> Tensor:
    """Return the entropy of the mean of many probability vectors, (K,), as a fraction of ln K.

    Near 0: one prototype is assigned to everything.
    """
    return -(mean * mean.clamp_min(1e-12).log()).sum() / math.log(len(mean))


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 2 - 2 cos (...,) of vectors (..., E), in float32."""
    return 2.0 - 2.0 * F.cosine_similarity(a.float(), b.float(), dim=-1)


def align_cosine(child: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    """Mean cosine distance of children (R, E) to their places `labels` (R,) among their parents' features (R, n, E)."""
    own = keys[torch.arange(len(labels), device=labels.device), labels]  # (R, E)
    return cosine_distance(child, own).mean()


def align_infonce(child: Tensor, keys: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of predicting the place `labels` (R,) of children (R, E) among the places (R, n, E) of parents."""
    return F.cross_entropy(_cosines(child, keys) / temperature, labels)


def align_chance(child: Tensor, keys: Tensor, temperature: float | None = None) -> Tensor:
    """Return the mean alignment of children (R, E) with all places (R, n, E): that of guessing the place.

    Args:
        temperature: of `align_infonce`; None for `align_cosine`.
    """
    cosines = _cosines(child, keys)  # (R, n)
    return (2.0 - 2.0 * cosines).mean() if temperature is None else -F.log_softmax(cosines / temperature, 1).mean()


def _cosines(child: Tensor, keys: Tensor) -> Tensor:
    """Return the cosines (R, n) of (R, E) with (R, n, E), in float32."""
    child, keys = F.normalize(child.float(), dim=-1), F.normalize(keys.float(), dim=-1)
    # a sum, because autocast would compute an einsum in bf16
    return (child.unsqueeze(1) * keys).sum(dim=-1)
