"""Views made where the model is: the loader hands over blocks of stored numbers, the device makes views of them.

Equal to `Pretrain.views.crop` up to rounding, on CPU and CUDA. The boxes of a volume often overlap, and reading a block
decodes it, so that boxes of one level are merged as long as that saves voxels (our choice). Measured for the views of
GL-MAE, 2 x 160^3 and 8 x 96^3, on shapes of CT from 233 x 167 x 191 to 463 x 448 x 200: a volume has 2 to 6 blocks with
56 to 80 % of the voxels of one block per view; one block per level has 1.05 to 1.6 times as many as merging.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from common.cache.volume import CachedVolume
from common.data.loader import to_device
from common.training.method import Batch
from Pretrain.views import Box, ViewSpec

# (position, number) of a block that was read for a sample, or (index of a volume, level) of a resident level
BlockKey = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """A box of a resolution level, [start, stop) in voxels of the level."""

    level: int
    start: tuple[int, int, int]
    stop: tuple[int, int, int]

    @property
    def size(self) -> tuple[int, int, int]:
        return tuple(b - a for a, b in zip(self.start, self.stop))

    @property
    def voxels(self) -> int:
        return math.prod(self.size)

    def union(self, other: "Block") -> "Block":
        """Return the smallest block that contains both."""
        return Block(self.level, tuple(map(min, self.start, other.start)), tuple(map(max, self.stop, other.stop)))


@dataclass(frozen=True)
class BlockView:
    """How a view is made of a block: `box` in voxels of the block, outside of which a volume has the number `zero`.

    Preprocessed intensity = number * scale + offset.
    """

    block: BlockKey
    box: Box
    scale: float
    offset: float
    zero: int


# ---------------------------------------------------------------- in the loader


def merge(blocks: Sequence[Block]) -> list[Block]:
    """Return blocks that contain the given ones, of which two are merged wherever that leaves fewer voxels to read."""
    merged: list[Block] = []
    for block in sorted(blocks, key=lambda block: block.voxels, reverse=True):
        while rivals := [other for other in merged if other.level == block.level]:
            other = max(rivals, key=lambda other: other.voxels - block.union(other).voxels)
            if block.union(other).voxels >= block.voxels + other.voxels:
                break
            merged.remove(other)
            block = block.union(other)
        merged.append(block)
    return merged


def plan_blocks(
    volume: CachedVolume, regions: Sequence[tuple[int, Box]], position: int
) -> tuple[dict[BlockKey, Block], list[BlockView]]:
    """Return the blocks to read of a volume, and how each view is made of them.

    Args:
        regions: (level, box in voxels of that level) of each view.
        position: of the sample in the stream, for the keys of its blocks.
    """
    needed = [inside(volume.levels[level], level, box) for level, box in regions]
    blocks = {(position, number): block for number, block in enumerate(merge(needed))}
    views = []
    for (_, box), part in zip(regions, needed):
        key = next(key for key, block in blocks.items() if block.level == part.level and block.union(part) == block)
        start = tuple(a - b for a, b in zip(box.start, blocks[key].start))
        views.append(block_view(volume, key, Box(start, box.size, box.flips)))
    return blocks, views


def inside(shape: Sequence[int], level: int, box: Box) -> Block:
    """Return the part of a box that lies in a level of this shape."""
    start = tuple(min(max(a, 0), n) for a, n in zip(box.start, shape))
    return Block(level, start, tuple(min(max(a + e, f), n) for a, e, f, n in zip(box.start, box.size, start, shape)))


def block_view(volume: CachedVolume, key: BlockKey, box: Box) -> BlockView:
    """Return how a view is made of a block of this volume; `box` in voxels of the block."""
    return BlockView(key, box, volume.scale, volume.offset, volume.zero)


def read_blocks(volume: CachedVolume, blocks: Sequence[Block]) -> Tensor:
    """Return the stored numbers of blocks one after another, (voxels,), each decoded to its place.

    A loading process returns them in shared memory, in one tensor because each tensor takes an open file there.
    Decoding to a tensor of its own and joining took 1.5 times as long.
    """
    sizes = [volume.channels * block.voxels for block in blocks]
    numbers = torch.empty(sum(sizes), dtype=volume.dtype)
    if get_worker_info() is not None:
        # before it is filled, so that it is not copied
        numbers.share_memory_()
    for block, part in zip(blocks, numbers.split(sizes)):
        volume.read_into(part.view(volume.channels, *block.size), block.start, block.level)
    return numbers


# ---------------------------------------------------------------- in the training process


def collate_blocks(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a micro-batch of samples of `Pretrain.data.BlockDataset`, without a copy of the numbers.

    Returns:
        `numbers`, `blocks`: of each sample; with resident volumes there is no `numbers`. `views`: kind -> `BlockView`
        of each view, sample by sample. Any other entry of a sample, stacked.
    """
    kinds = samples[0]["views"]
    batch = {"views": {kind: [view for sample in samples for view in sample["views"][kind]] for kind in kinds}}
    listed = {name: [sample[name] for sample in samples] for name in ("blocks", "numbers") if name in samples[0]}
    rest = [{k: v for k, v in sample.items() if k not in ("views", *listed)} for sample in samples]
    return batch | listed | default_collate(rest)


# ---------------------------------------------------------------- on the device


@dataclass(frozen=True)
class ViewMaker:
    """Makes the batch that a method takes, {kind: (B, count, C, D, H, W) float32, ...}, of one of `collate_blocks`.

    Attributes:
        specs: kinds of views.
        resident: (index of a volume, level) -> its stored numbers (C, D, H, W), where they are kept on the device.
    """

    specs: Mapping[str, ViewSpec]
    resident: Mapping[BlockKey, Tensor] | None = None

    def __call__(self, batch: dict[str, Any], device: torch.device) -> Batch:
        rest = to_device(batch, device)
        views, shapes, blocks = rest.pop("views"), rest.pop("blocks"), self.resident
        if blocks is None:
            blocks = {key: block for parts in map(cut, rest.pop("numbers"), shapes) for key, block in parts.items()}
        made = {kind: make_views(blocks, views[kind], spec.size) for kind, spec in self.specs.items()}
        return {kind: x.unflatten(0, (-1, self.specs[kind].count)) for kind, x in made.items()} | rest


def cut(numbers: Tensor, shapes: Mapping[BlockKey, Sequence[int]]) -> dict[BlockKey, Tensor]:
    """Return the blocks (C, d, h, w) that lie one after another in `numbers` (voxels,), without a copy."""
    parts = numbers.split([math.prod(shape) for shape in shapes.values()])
    return {key: part.view(shape) for (key, shape), part in zip(shapes.items(), parts)}


def make_views(blocks: Mapping[BlockKey, Tensor], views: Sequence[BlockView], size: Sequence[int]) -> Tensor:
    """Return views of one size as (views, C, *size) float32, on the device of the blocks, without waiting for it.

    Three or four operations a view: convert and scale the box, resize, flip if asked for, write. Sampling all views of
    a block at once (`grid_sample`) is fewer, but takes 5 times as long on a CPU and a grid of three times the memory of
    the views.
    """
    first = blocks[views[0].block]
    made = torch.empty(len(views), first.shape[0], *size, device=first.device)
    for target, view in zip(made, views):
        target.copy_(make_view(blocks[view.block], view, size))
    return made


def make_view(block: Tensor, view: BlockView, size: Sequence[int]) -> Tensor:
    """Return one view (C, *size) float32 of a block (C, d, h, w)."""
    box, shape = view.box, block.shape[1:]
    places = [slice(max(a, 0), min(a + e, n)) for a, e, n in zip(box.start, box.size, shape)]
    numbers = block[(slice(None), *places)]
    if tuple(numbers.shape[1:]) != tuple(box.size):
        before = [max(0, -a) for a in box.start]
        after = [e - b - n for e, b, n in zip(box.size, before, numbers.shape[1:])]
        # F.pad starts with the last axis
        numbers = F.pad(numbers, [n for pair in zip(before[::-1], after[::-1]) for n in pair], value=view.zero)
    values = numbers * view.scale
    if view.offset:
        values += view.offset
    if tuple(box.size) != tuple(size):
        values = F.interpolate(values[None], size=tuple(size), mode="trilinear", align_corners=False)[0]
    axes = [axis + 1 for axis, flip in enumerate(box.flips) if flip]
    return values.flip(axes) if axes else values
