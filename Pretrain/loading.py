"""Where views are made, and where the volumes are kept: `--views_on` and `--resident`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.cache.volume import CachedVolume
from common.data.loader import Loading
from common.errors import InputError
from common.resources import unused_memory
from common.runlog import print_main, progress
from Pretrain.blocks import BlockKey, ViewMaker, collate_blocks
from Pretrain.data import BlockDataset, ViewDataset
from Pretrain.views import ViewSettings

# largest share of the device's free memory for resident volumes with auto, our choice: the rest is for the training
RESIDENT_SHARE = 0.5


def choose_loading(samples: ViewDataset, views: ViewSettings, device: torch.device) -> Loading:
    """Return how the views of `samples` are loaded and made, print what was chosen, and load resident volumes.

    auto makes views on the device on CUDA, and in the loading processes on a CPU: resizing takes a core about as long
    in either place, and the loading processes are others than those that train.

    Raises:
        InputError: resident volumes were asked for and do not fit, or views are to be made in the loader.
    """
    if views.views_on == "loader" and views.resident == "on":
        raise InputError("--resident on: needs --views_on device or auto, found loader")
    if views.views_on == "loader" or (views.views_on == "auto" and device.type == "cpu" and views.resident != "on"):
        print_main("views: made in the loading processes")
        return Loading(samples)
    resident = None
    if becomes_resident(samples.volumes, views, device):
        resident = load_resident(samples.volumes, device)
    else:
        print_main(f"views: made on {device}, of blocks from the loading processes")
    dataset = BlockDataset(samples, resident is not None)
    return Loading(dataset, collate_blocks, ViewMaker(samples.specs, resident), by_sample=True)


def becomes_resident(volumes: Sequence[CachedVolume], views: ViewSettings, device: torch.device) -> bool:
    """Return whether all volumes are to be kept on the device. InputError when they must be and do not fit."""
    if views.resident == "off" or (views.resident == "auto" and device.type == "cpu"):
        return False
    needed, free = stored_bytes(volumes), free_memory(device)
    if views.resident == "on" and needed > free:
        raise InputError(
            f"--resident on: {len(volumes)} volumes take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on "
            f"{device}; use --resident auto, or --dtype uint8 for half of that"
        )
    if views.resident == "auto" and needed > RESIDENT_SHARE * free:
        print_main(
            f"views: {len(volumes)} volumes take {needed / 1e9:.1f} GB, more than {RESIDENT_SHARE:.0%} of the "
            f"{free / 1e9:.1f} GB that are free on {device}: not kept there"
        )
        return False
    print_main(
        f"views: made on {device}, where all {len(volumes)} volumes are kept in {needed / 1e9:.1f} of the "
        f"{free / 1e9:.1f} GB that are free (each process has its own copy)"
    )
    return True


def stored_bytes(volumes: Sequence[CachedVolume]) -> int:
    """Return the bytes of all levels of the volumes, as stored but not compressed. All have the number type of the
    first: it is a setting of the cache."""
    numbers = sum(volume.channels * math.prod(shape) for volume in volumes for shape in volume.levels)
    return numbers * volumes[0].dtype.itemsize


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on a device; infinite where the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    unused = unused_memory()
    return math.inf if unused is None else unused


def load_resident(volumes: Sequence[CachedVolume], device: torch.device) -> dict[BlockKey, Tensor]:
    """Return all levels of all volumes on the device: (index of the volume, level) -> (C, D, H, W), as stored."""
    return {
        (index, level): volume.read_numbers((0, 0, 0), shape, level).to(device)
        for index, volume in enumerate(progress(volumes, desc="volumes to the device", unit="volume"))
        for level, shape in enumerate(volume.levels)
    }
