"""Random masks of patches and of units.   B batch   N patches (T tokens)   K kept.   In a mask 1 means removed.

A patch without content holds nothing but padding. Where `content` is given, such patches are kept only if
there are too few others. If they are removed, the mask is 0 for them: there is nothing to reconstruct.

Randomness comes from a key per sample (int64, in the batch) instead of a generator per process. The mask of a sample is
then the same on any number of ranks, in any micro-batch, on CPU and CUDA, and after a restart. Our choice.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def checked_ratio(mask_ratio: float) -> float:
    """Return the ratio. ValueError unless 0 <= ratio < 1."""
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio {mask_ratio}: must be at least 0 and less than 1")
    return mask_ratio


def num_keep(num_patches: int, mask_ratio: float) -> int:
    """Return the number of kept patches, N*(1-ratio) rounded down; 1e-6 because `int(1000*(1-0.9))` is 99."""
    return max(1, int(num_patches * (1.0 - mask_ratio) + 1e-6))


def derive(keys: Tensor, stream: int) -> Tensor:
    """Return keys (B,) int64 of the same samples for another purpose (a view, a level), independent of `keys`."""
    return _splitmix64(_splitmix64(keys) + _signed((stream + 1) * _GOLDEN))


def uniform(keys: Tensor, count: int) -> Tensor:
    """Return noise (B, count) in [0, 1), a function of the keys (B,): splitmix64 (Steele et al. 2014) of a counter."""
    counter = torch.arange(1, count + 1, device=keys.device) * _GOLDEN
    bits = _splitmix64(keys.unsqueeze(1) + counter)  # (B, count)
    # the top 24 bits are exact in float32
    return _shift(bits, 40).float() / (1 << 24)


class Masking(NamedTuple):
    """Kept patches in the order of their noise, and what sorts [kept, removed] back into raster order."""

    # (B, K)
    ids_keep: Tensor
    # (B, N)
    ids_restore: Tensor
    # (B, N) float, 1 = removed (and with content)
    mask: Tensor
    # (B, N-K), in the order of their noise; those without content come last
    ids_removed: Tensor


def content_patches(content: Tensor, patch_size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Return which patches of a grid (d, h, w) hold content, (B, N) bool in raster order.

    Args:
        content: (B, 3, 2), the box [start, stop) of voxels that are not padding. It may be empty at an end of an axis.
        patch_size: voxels (D, H, W).
    """
    axes = []
    for axis, (size, count) in enumerate(zip(patch_size, grid)):
        start = torch.arange(count, device=content.device) * size  # (n,)
        axes.append((content[:, axis, :1] < start + size) & (content[:, axis, 1:] > start))  # (B, n)
    d, h, w = axes
    return (d[:, :, None, None] & h[:, None, :, None] & w[:, None, None, :]).flatten(1)


def random_masking(noise: Tensor, keep: int, content: Tensor | None = None) -> Masking:
    """Keep the `keep` patches of lowest noise (B, N) in [0, 1).

    Args:
        content: (B, N) bool. Patches without content come last in the order.
    """
    if content is not None:
        noise = torch.where(content, noise, 1.0 + noise)
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= keep).float()
    mask = mask if content is None else mask * content
    return Masking(ids_shuffle[:, :keep], ids_restore, mask, ids_shuffle[:, keep:])


def unit_masking(
    noise: Tensor,
    keep: int,
    grid: Sequence[int],
    unit_content: Tensor | None = None,
    content: Tensor | None = None,
) -> tuple[Masking, Tensor]:
    """Keep the `keep` units of lowest noise (B, g^3), of the g^3 cubic units of a token grid (d, h, w).

    Returns the masking of tokens, and the mask of units (B, g^3) with 1 = removed.

    Args:
        unit_content: (B, g^3) bool. Units without content come last in the order.
        content: (B, T) bool, of the tokens. A unit is kept or removed as a whole, so the tokens of a kept unit are
            visible with and without content; otherwise removed units would be visible in part. Our choice.
    """
    units = noise.shape[1]
    group = round(units ** (1 / 3))
    # ranks are never equal, noise may be
    _, rank, unit_mask, _ = random_masking(noise, keep, unit_content)
    blocks = rank.float().view(-1, 1, group, group, group)
    tokens = F.interpolate(blocks, size=grid, mode="nearest-exact").flatten(1)  # (B, T)
    masking = random_masking(tokens, keep * tokens.shape[1] // units)
    return masking if content is None else masking._replace(mask=masking.mask * content), unit_mask


def choose_removed(noise: Tensor, mask: Tensor, count: int, content: Tensor | None = None) -> Tensor:
    """Return (B, count) places of highest noise among the removed ones of (B, n).

    Visible places are used only when fewer than `count` are removed, and those without content (B, n) bool last.
    """
    return (mask + noise if content is None else mask + content + noise).topk(count, dim=1).indices


def _signed(number: int) -> int:
    """Return a number modulo 2^64 as a signed one. int64 tensors wrap around as splitmix64 requires."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift. The shift of an int64 tensor would copy the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)
