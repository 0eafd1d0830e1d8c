"""Samples for pretraining: views of cached volumes, drawn from (seed, position in the stream) alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.cache.volume import CachedVolume
from common.data.sampler import generator, mix
from Pretrain.views import ViewSpec, content_box, crop, draw_box


@dataclass(frozen=True)
class InputStatistics:
    """Mean and standard deviation of the voxels of a data set, one number per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def input_statistics(volumes: Sequence[CachedVolume], limit: int = 32) -> InputStatistics:
    """Measure the voxels of at most `limit` volumes, evenly spaced in the list, at their coarsest level."""
    count, total, squares = 0, 0.0, 0.0
    for volume in volumes[:: max(1, len(volumes) // limit)]:
        level = len(volume.levels) - 1
        voxels = volume.read((0, 0, 0), volume.levels[level], level=level).flatten(1).double()  # (C, voxels)
        count += voxels.shape[1]
        total, squares = total + voxels.sum(dim=1), squares + voxels.square().sum(dim=1)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1e-6).sqrt()
    return InputStatistics(tuple(mean.tolist()), tuple(std.tolist()))


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
        position, index = item
        volume, rng = self.volumes[index], generator(self.seed, position)
        sample = {}
        for kind, spec in self.specs.items():
            boxes = [draw_box(volume.levels[0], spec, rng) for _ in range(spec.count)]
            sample[kind] = torch.stack([crop(volume, box, spec.size) for box in boxes])
            if spec.ignore_padding:
                spans = [content_box(volume.levels[0], box, spec.size) for box in boxes]
                sample[f"{kind}_content"] = torch.tensor(spans)
        return sample | {"key": torch.tensor(mix(self.seed, position, 1))}
