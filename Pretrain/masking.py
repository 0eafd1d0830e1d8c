"""Random masks of patches and of units.   B batch   N patches (T tokens)   K kept.   In a mask 1 means removed.

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
    # (B, N) float, 1 = removed
    mask: Tensor


def random_masking(noise: Tensor, keep: int) -> Masking:
    """Keep the `keep` patches of lowest noise (B, N)."""
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :keep], ids_restore, (ids_restore >= keep).float())


def unit_masking(noise: Tensor, keep: int, grid: Sequence[int]) -> tuple[Masking, Tensor]:
    """Keep the `keep` units of lowest noise (B, g^3), of the g^3 cubic units of a token grid (d, h, w).

    Returns the masking of tokens, and the mask of units (B, g^3) with 1 = removed.
    """
    units = noise.shape[1]
    group = round(units ** (1 / 3))
    # ranks are never equal, noise may be
    _, rank, unit_mask = random_masking(noise, keep)
    blocks = rank.float().view(-1, 1, group, group, group)
    tokens = F.interpolate(blocks, size=grid, mode="nearest-exact").flatten(1)  # (B, T)
    return random_masking(tokens, keep * tokens.shape[1] // units), unit_mask


def choose_removed(noise: Tensor, mask: Tensor, count: int) -> Tensor:
    """Return (B, count) places of highest noise among the removed ones of (B, n).

    Visible places are used only when fewer than `count` are removed.
    """
    return (mask + noise).topk(count, dim=1).indices


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
