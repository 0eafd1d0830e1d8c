"""Samples for pretraining: views of cached volumes, drawn from (seed, position in the stream) alone."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.cache.volume import CachedVolume
from common.data.sampler import generator, mix
from Pretrain.views import ViewSpec, content_box, crop, draw_box


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
