"""Global and local views of a volume: drawing boxes and cropping them. Axes (D, H, W), in voxels of the cached volume.

With `resize` a box covers a share of each axis and is resized to the view's size, so that a global view shows half to
all of a scan whatever its spacing. With `fixed` it has the view's size in voxels, at the cached spacing, as in the
authors' loaders. The scale ranges, and `resize` as the default, are our choice: the paper prints neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.cache.volume import CachedVolume
from common.config import setting


@dataclass(frozen=True)
class Box:
    """A box in voxels, which may be larger than the volume, and the axes along which its content is flipped."""

    start: tuple[int, int, int]
    size: tuple[int, int, int]
    flips: tuple[bool, bool, bool]


@dataclass(kw_only=True)
class ViewSettings:
    """Settings of the views that a method trains on."""

    local_views: int = setting(8, "q: local views per volume", least=0, most=1024)
    local_size: tuple[int, int, int] = setting(
        (96, 96, 96), "voxels of a local view, or MiM's inputs", least=1, most=1024
    )
    local_scale: tuple[float, float] = setting((0.2, 0.5), "share of an axis in a local view", above=0, most=1)
    global_scale: tuple[float, float] = setting((0.5, 1.0), "share in a global view, or MiM's volume", above=0, most=1)
    crop_mode: Literal["resize", "fixed"] = setting("resize", "resize: a share of the scan; fixed: the size in voxels")
    flip_prob: float = setting(0.2, "probability of a flip, per axis", least=0, most=1)


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view: number, size (voxels), range of the share of an axis, and probability of a flip per axis."""

    count: int
    size: tuple[int, int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    crop_mode: Literal["resize", "fixed"] = "resize"
    flip_prob: float = 0.2


def draw_box(shape: Sequence[int], spec: ViewSpec, rng: torch.Generator) -> Box:
    """Draw the box of one view at a uniform position.

    With `resize` its share of the axes is uniform in `scale`, and that of each axis within 10 % of it.
    """
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
    """Return a uniform start inside the axis, or a centred one (padding on both sides) when the extent is larger."""
    slack = length - extent
    return int(noise * (slack + 1)) if slack >= 0 else slack // 2


def crop(volume: CachedVolume, box: Box, out_size: Sequence[int]) -> Tensor:
    """Read a box as a view (C, *out_size), trilinearly resized if its size differs, and flipped along `box.flips`.

    It is read from the coarsest level that is at least as fine as the view along every axis that the level reduces.
    """
    full, level = volume.levels[0], 0
    for index, shape in enumerate(volume.levels):
        if all(s == f or extent * s >= out * f for extent, s, out, f in zip(box.size, shape, out_size, full)):
            level = index
    # in voxels of that level
    start = [round(a * s / f) for a, s, f in zip(box.start, volume.levels[level], full)]
    size = [max(1, round(e * s / f)) for e, s, f in zip(box.size, volume.levels[level], full)]
    view = volume.read(start, size, level=level, out_size=out_size if tuple(size) != tuple(out_size) else None)
    axes = [axis + 1 for axis, flip in enumerate(box.flips) if flip]
    return view.flip(axes) if axes else view
