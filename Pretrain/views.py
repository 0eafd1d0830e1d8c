"""Global and local views of a volume: drawing boxes and cropping them. Axes (D, H, W), in voxels of the cached volume.

With `resize` a box covers a share of each axis and is resized to the view's size, so that a global view shows half to
all of a scan whatever its spacing. With `fixed` it has the view's size in voxels, at the cached spacing, as in the
authors' loaders. The scale ranges, and `resize` as the default, are our choice: the paper prints neither.

A fixed view may be larger than the volume. It is then padded with 0, and its content is the box that the volume fills.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.cache.volume import CachedVolume
from common.config import setting

Placement = Literal["center", "random"]


@dataclass(frozen=True)
class Box:
    """A box (D, H, W) in voxels of the full level, and the axes along which its content is flipped.

    It may be larger than the volume: then `start` is negative.
    """

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
    placement: Placement = setting("center", "where a volume that is smaller than a fixed view lies in it, per axis")
    ignore_padding: bool = setting(
        False, "fixed views: leave patches of nothing but padding out of the masks and of the reconstruction losses"
    )
    flip_prob: float = setting(0.2, "probability of a flip, per axis", least=0, most=1)
    views_on: Literal["auto", "device", "loader"] = setting(
        "auto", "where views are resized: on the model's device or in the loading processes; auto: device on CUDA"
    )
    resident: Literal["auto", "on", "off"] = setting(
        "auto", "keep all training volumes in the device's memory; auto: on CUDA, where they fit into half of it"
    )

    def spec(self, count: int, size: tuple[int, int, int], scale: tuple[float, float]) -> "ViewSpec":
        """Return one kind of view with these settings."""
        return ViewSpec(count, size, scale, self.crop_mode, self.flip_prob, self.placement, self.ignore_padding)


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view: number, size (voxels), range of the share of an axis, and probability of a flip per axis.

    With `ignore_padding` a sample also has the content box of each view.
    """

    count: int
    size: tuple[int, int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    crop_mode: Literal["resize", "fixed"] = "resize"
    flip_prob: float = 0.2
    placement: Placement = "center"
    ignore_padding: bool = False


def draw_box(shape: Sequence[int], spec: ViewSpec, rng: torch.Generator) -> Box:
    """Draw the box of one view of a volume of this shape (D, H, W), at a uniform position.

    With `resize` its share of the axes is uniform in `scale`, and that of each axis within 10 % of it. Along an axis
    that is shorter than a fixed box, the volume lies in the middle of the box or, with random `placement`, anywhere.
    """
    noise = torch.rand(10, generator=rng).tolist()
    if spec.crop_mode == "fixed":
        size = tuple(spec.size)
    else:
        low, high = spec.scale
        share = low + (high - low) * noise[0]
        size = tuple(max(1, round(min(share * (0.9 + 0.2 * n), 1.0) * length)) for length, n in zip(shape, noise[1:4]))
    start = tuple(_place(length, extent, n, spec.placement) for length, extent, n in zip(shape, size, noise[4:7]))
    return Box(start, size, tuple(n < spec.flip_prob for n in noise[7:10]))


def _place(length: int, extent: int, noise: float, placement: Placement) -> int:
    """Return a uniform start inside the axis. When the extent is larger it is in [length - extent, 0]: the middle
    (padding on both sides), or uniform with random placement."""
    slack = length - extent
    if slack < 0 and placement == "center":
        return slack // 2
    return min(slack, 0) + int(noise * (abs(slack) + 1))


def content_box(shape: Sequence[int], box: Box, out_size: Sequence[int]) -> list[list[int]]:
    """Return [start, stop) of the volume along each axis of the view that `crop` reads, in voxels of the view.

    Args:
        shape: (D, H, W) of the volume.
        out_size: size of the view. A voxel that resizing mixes from volume and padding is content.
    """
    spans = []
    for length, start, extent, flip, out in zip(shape, box.start, box.size, box.flips, out_size):
        low, high = max(0, -start), min(extent, length - start)
        # in voxels of the view, rounded outwards
        low, high = low * out // extent, -(-high * out // extent)
        spans.append([out - high, out - low] if flip else [low, high])
    return spans


def level_box(levels: Sequence[Sequence[int]], box: Box, out_size: Sequence[int]) -> tuple[int, Box]:
    """Return the resolution level that a view is made from, and its box in voxels of that level.

    It is the coarsest level that is at least as fine as the view along every axis that the level reduces.

    Args:
        levels: shape (D, H, W) of each level, the full one first.
        out_size: size of the view.
    """
    full, level = levels[0], 0
    for index, shape in enumerate(levels):
        if all(s == f or extent * s >= out * f for extent, s, out, f in zip(box.size, shape, out_size, full)):
            level = index
    start = tuple(round(a * s / f) for a, s, f in zip(box.start, levels[level], full))
    size = tuple(max(1, round(e * s / f)) for e, s, f in zip(box.size, levels[level], full))
    return level, Box(start, size, box.flips)


def crop(volume: CachedVolume, box: Box, out_size: Sequence[int]) -> Tensor:
    """Read a box as a view (C, *out_size), trilinearly resized if its size differs, and flipped along `box.flips`.

    It is read from the level that `level_box` chooses. Many views at once, on any device: Pretrain/blocks.py.
    """
    level, region = level_box(volume.levels, box, out_size)
    resized = tuple(region.size) != tuple(out_size)
    view = volume.read(region.start, region.size, level=level, out_size=out_size if resized else None)
    axes = [axis + 1 for axis, flip in enumerate(box.flips) if flip]
    return view.flip(axes) if axes else view
