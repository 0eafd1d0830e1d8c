"""Mean and standard deviation of the voxels of cached volumes, for which an encoder is initialised."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.cache.volume import CachedVolume


@dataclass(frozen=True)
class InputStatistics:
    """Mean and standard deviation of the preprocessed voxels of a data set (usually 0 to 1), one number per channel."""

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
