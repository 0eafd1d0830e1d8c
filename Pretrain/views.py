"""Global and local views of a volume: where a box lies, and how it is cut. Axes (D, H, W), voxels of the cached volume.

`resize`: a box that covers a share of each axis, resized to the view's size, so that a global view shows half to all of
a scan whatever its spacing. `fixed`: the view's size in voxels, at the cached spacing, as the authors' loaders crop.
Scale ranges and `resize` as the default are our choice (spec section 2): the paper prints neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


class Volume(Protocol):
    """What is needed of a cached volume: `common.cache.volume.CachedVolume` is one."""

    levels: Sequence[tuple[int, int, int]]

    def read(
        self, start: Sequence[int], size: Sequence[int], level: int = 0, out_size: Sequence[int] | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Box:
    """A box in a volume (voxels; may stick out of a smaller one) and the axes along which its content is mirrored."""

    start: tuple[int, int, int]
    size: tuple[int, int, int]
    flips: tuple[bool, bool, bool]


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view: how many, how large (voxels), the share of an axis they cover, the odds of a flip per axis."""

    count: int
    size: tuple[int, int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    crop_mode: Literal["resize", "fixed"] = "resize"
    flip_prob: float = 0.2


def draw_box(shape: Sequence[int], spec: ViewSpec, rng: torch.Generator) -> Box:
    """A box for one view. `resize`: a share of all axes uniform in `scale`, each within 10 % of it; any place."""
    noise = torch.rand(10, generator=rng).tolist()
    if spec.crop_mode == "fixed":
        size = tuple(spec.size)
    else:
        low, high = spec.scale
        share = low + (high - low) * noise[0]
        size = tuple(max(1, round(min(share * (0.9 + 0.2 * n), 1.0) * length)) for length, n in zip(shape, noise[1:4]))
    start = tuple(_place(length, extent, n) for length, extent, n in zip(shape, size, noise[4:7]))
    return Box(start, size, tuple(n < spec.flip_prob for n in noise[7:10]))


def _place(length: int, extent: int, noise: float) -> int:
    """Uniform among all places inside; centred (padding on both sides) when the extent is larger than the axis."""
    slack = length - extent
    return int(noise * (slack + 1)) if slack >= 0 else slack // 2


def cut(volume: Volume, box: Box, out_size: Sequence[int]) -> Tensor:
    """The box as a view (C, *out_size), trilinearly resized where its size differs, mirrored along `box.flips`.

    Read from the coarsest level that is still at least as fine as the view along every axis that it reduces.
    """
    full = volume.levels[0]
    level = 0
    for index, shape in enumerate(volume.levels):
        if all(s == f or extent * s >= out * f for extent, s, out, f in zip(box.size, shape, out_size, full)):
            level = index
    start, size = _at_level(box, full, volume.levels[level])
    view = volume.read(start, size, level=level, out_size=out_size if tuple(size) != tuple(out_size) else None)
    axes = [axis + 1 for axis, flip in enumerate(box.flips) if flip]
    return view.flip(axes) if axes else view


def _at_level(box: Box, full: Sequence[int], shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """The box in the voxels of a reduced level."""
    start = [round(a * s / f) for a, s, f in zip(box.start, shape, full)]
    size = [max(1, round(e * s / f)) for e, s, f in zip(box.size, shape, full)]
    return start, size
