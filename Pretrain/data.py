"""Samples for pretraining: views of cached volumes, drawn from (seed, position in the stream) alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.cache.volume import CachedVolume
from common.data.sampler import generator, mix
from Pretrain.blocks import block_view, plan_blocks, read_blocks
from Pretrain.views import Box, ViewSpec, content_box, crop, draw_box, level_box


class ViewDataset(Dataset):
    """Views of each volume: {kind: (count, C, D, H, W) float32} for every kind of `specs`, and `key`, the masks' seed.

    With `ignore_padding` also {kind}_content (count, 3, 2) int64: of each view the box [start, stop) without padding.

    Indexed by (position, index) from `common.data.sampler.StreamSampler`. Views are drawn independently: a local view
    need not lie in a global one, as in the paper's figure. Crop and flip are drawn once per view, so that teacher and
    student see the same voxels.
    """

    def __init__(self, volumes: Sequence[CachedVolume], specs: dict[str, ViewSpec], seed: int = 0):
        self.volumes, self.specs, self.seed = volumes, {k: s for k, s in specs.items() if s.count}, seed

    def __len__(self) -> int:
        return len(self.volumes)

    def name(self, index: int) -> str:
        return self.volumes[index].name

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Tensor]:
        volume, boxes = self.volumes[item[1]], self.boxes(item)
        views = {kind: [crop(volume, box, self.specs[kind].size) for box in drawn] for kind, drawn in boxes.items()}
        return {kind: torch.stack(made) for kind, made in views.items()} | self.without_voxels(item, boxes)

    def boxes(self, item: tuple[int, int]) -> dict[str, list[Box]]:
        """Return the boxes of the views of a sample, in voxels of the full level."""
        position, index = item
        rng, shape = generator(self.seed, position), self.volumes[index].levels[0]
        return {kind: [draw_box(shape, spec, rng) for _ in range(spec.count)] for kind, spec in self.specs.items()}

    def without_voxels(self, item: tuple[int, int], boxes: dict[str, list[Box]]) -> dict[str, Tensor]:
        """Return what a sample holds besides its views: content boxes and the seed of its masks."""
        position, index = item
        shape, sample = self.volumes[index].levels[0], {}
        for kind, spec in self.specs.items():
            if spec.ignore_padding:
                sample[f"{kind}_content"] = torch.tensor([content_box(shape, box, spec.size) for box in boxes[kind]])
        return sample | {"key": torch.tensor(mix(self.seed, position, 1))}


@dataclass(frozen=True)
class BlockDataset(Dataset):
    """The samples of a `ViewDataset` as blocks of stored numbers, of which `Pretrain.blocks.ViewMaker` makes the views.

    A sample has `numbers`: all its blocks in one tensor, (voxels,) int16 or uint8; `blocks`: key -> shape (C, d, h, w),
    in the order of `numbers`; `views`: kind -> `BlockView` of each view; and what a sample of `ViewDataset` holds
    besides its views. `Pretrain.blocks.collate_blocks` makes a micro-batch of samples.

    Attributes:
        resident: all volumes are kept on the device. Then views refer to whole levels, and there are no `numbers`.

    Raises:
        InputError: a cached volume is missing or damaged.
    """

    samples: ViewDataset
    resident: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        volume, boxes = self.samples.volumes[index], self.samples.boxes(item)
        sizes = {kind: spec.size for kind, spec in self.samples.specs.items()}
        regions = [level_box(volume.levels, box, sizes[kind]) for kind, drawn in boxes.items() for box in drawn]
        if self.resident:
            stored, views = {"blocks": {}}, [block_view(volume, (index, level), box) for level, box in regions]
        else:
            planned, views = plan_blocks(volume, regions, position)
            shapes = {key: (volume.channels, *block.size) for key, block in planned.items()}
            stored = {"blocks": shapes, "numbers": read_blocks(volume, list(planned.values()))}
        remaining = iter(views)
        by_kind = {kind: [next(remaining) for _ in drawn] for kind, drawn in boxes.items()}
        # as tensors each would take an open file on the way from the loading process
        rest = {name: value.numpy() for name, value in self.samples.without_voxels(item, boxes).items()}
        return stored | {"views": by_kind} | rest
