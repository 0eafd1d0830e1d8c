"""Sliding-window inference whose memory does not grow with the depth of the volume.

MONAI's `SlidingWindowInferer` holds the logits of the whole volume; here slabs along the first axis are handed on as
soon as no window to come touches them. Windows, their order, padding and blending are MONAI's, so the logits are, too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor

from common.errors import InputError

ROWS = 8  # handed on at a time: 14 classes of 512 x 600 voxels are 138 MB


@dataclass(frozen=True)
class Window:
    """How the window slides."""

    roi: tuple[int, int, int]
    overlap: float = 0.5
    blending: Literal["gaussian", "constant"] = "gaussian"
    batch: int = 2

    def __post_init__(self):
        if not 0 <= self.overlap < 1:
            raise InputError(f"overlap: found {self.overlap}, needs at least 0 and less than 1")
        if self.batch < 1:
            raise InputError(f"sw_batch_size: found {self.batch}, needs at least 1")


def slabs(
    image: Tensor,
    predictor: Callable[[Tensor], Tensor],
    window: Window,
    device: torch.device,
    tick: Callable[[int], object] = lambda windows: None,
) -> Iterator[tuple[int, Tensor]]:
    """Logits of `image` (C, D, H, W) as (first row, logits (K, rows, H, W)) from row 0 to D-1, without gaps or
    overlaps.

    `predictor` maps (B, C, *roi) on `device` to logits (B, K, *roi). Slabs are float32 on the CPU. `tick` is told the
    number of windows done.
    """
    shape = image.shape[1:]
    size = [max(s, r) for s, r in zip(shape, window.roi)]
    before = [(padded - s) // 2 for padded, s in zip(size, shape)]  # MONAI pads on both sides
    starts = window_starts(shape, window)
    weight = compute_importance_map(window.roi, mode=window.blending, device=device)
    weight_cpu = weight.cpu()
    total: Tensor | None = None  # (K, roi rows, H, W), the first of them is row `base`
    norm = torch.zeros(0)
    base = 0

    def finished(until: int) -> Iterator[tuple[int, Tensor]]:
        """The rows [base, until), without the padding, a few at a time; then what is held moves up."""
        nonlocal base
        inside = tuple(slice(b, b + s) for b, s in zip(before[1:], shape[1:]))
        stop = min(until, before[0] + shape[0])
        for row in range(max(base, before[0]), stop, ROWS):
            rows = slice(row - base, min(row + ROWS, stop) - base)
            yield row - before[0], total[(slice(None), rows, *inside)] / norm[(rows, *inside)]
        shift = until - base
        for row in range(window.roi[0]):
            if row + shift < window.roi[0]:
                total[:, row], norm[row] = total[:, row + shift], norm[row + shift]
            else:
                total[:, row], norm[row] = 0, 0
        base = until

    for first in range(0, len(starts), window.batch):
        group = starts[first : first + window.batch]
        crops = torch.stack([_crop(image, start, window.roi, before) for start in group]).to(device)
        logits = (predictor(crops).float() * weight).cpu()
        tick(len(group))
        if total is None:
            total = torch.zeros(logits.shape[1], window.roi[0], *size[1:])
            norm = torch.zeros(window.roi[0], *size[1:])
        for start, part in zip(group, logits):
            if start[0] > base:
                yield from finished(start[0])
            where = tuple(slice(s, s + r) for s, r in zip((start[0] - base, *start[1:]), window.roi))
            total[(slice(None), *where)] += part
            norm[where] += weight_cpu
    yield from finished(size[0])


def window_starts(shape: Sequence[int], window: Window) -> list[tuple[int, int, int]]:
    """First voxels of the windows in the padded volume, first axis slowest, as MONAI places them."""
    size = [max(s, r) for s, r in zip(shape, window.roi)]
    step = [
        r if r == s else max(int(r * (1 - window.overlap)), 1) for r, s in zip(window.roi, size)
    ]  # MONAI's scan interval
    return [tuple(part.start for part in parts) for parts in dense_patch_slices(size, window.roi, step)]


def _crop(image: Tensor, start: Sequence[int], roi: Sequence[int], before: Sequence[int]) -> Tensor:
    """A window of the padded volume, zeros outside the volume."""
    first = [s - b for s, b in zip(start, before)]
    inside = [(max(f, 0), min(f + r, n)) for f, r, n in zip(first, roi, image.shape[1:])]
    crop = image[(slice(None), *(slice(a, b) for a, b in inside))]
    padding = [n for f, r, (a, b) in zip(first, roi, inside) for n in (a - f, f + r - b)]
    return F.pad(crop, [n for pair in zip(padding[-2::-2], padding[-1::-2]) for n in pair])
