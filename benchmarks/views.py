"""Sets of GL-MAE views, 2 x 160^3 and 8 x 96^3, of CTs of 512 x 512 x 200: the loader's work, and the device's.

`measure` compares, in one thread and in turn, on the same volumes and boxes:

    the loader's work    drawing boxes and reading blocks, against MONAI's PersistentDataset, SpatialCrop and Resize;
                         copies into the shared memory of loading processes are left out of both
    bytes                what goes from the loader to the device, against float32 views
    both together        reading blocks and making the views of them, against views that are made in the loader

Measured 2026-11-25 without `quick` (one of two cores of an AMD EPYC, other work running; torch 2.14.1, monai 1.6.1),
per set:

                                                   ours      theirs    ratio
    loader's work, int16 blocks                    0.047 s   0.198 s     4.2
    loader's work, uint8 blocks                    0.028 s   0.198 s     7.0
    loader's work, volumes resident                0.0003 s  0.198 s     657
    loader's work, views made in it                0.142 s   0.198 s     1.4
    bytes, int16                                   46.5 MB   61.1 MB     1.3
    bytes, uint8                                   23.2 MB   61.1 MB     2.6
    blocks, and views of them on the CPU           0.198 s   0.142 s     0.7

The aims of 10 times the speed and a quarter of the bytes are met with resident volumes only. A view is made from the
coarsest level that is at least as fine as the view, so up to 8 voxels are decoded and sent for each voxel of a view;
decoding takes all of the loader's time. A level that may be coarser by up to the square root of 2 would halve the
voxels of these volumes (23 to 11 million), but would change the views.
"""

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.data import PersistentDataset
from monai.transforms import Resize, SpatialCrop
from torch import Tensor

from benchmarks.cache import persistent_dataset
from benchmarks.harness import Row, threads
from benchmarks.harness import alternate as in_turn
from common.cache.build import build_cache
from common.data.datalist import Case
from common.data.loader import tensor_bytes
from common.data.preprocessing import Preprocessing
from Pretrain.blocks import ViewMaker, collate_blocks
from Pretrain.data import BlockDataset, ViewDataset
from Pretrain.loading import load_resident
from Pretrain.views import ViewSpec
from scripts.synthetic_ct import affine_of, phantom, write_nifti

SPECS = {"global": ViewSpec(2, (160,) * 3, (0.5, 1.0)), "local": ViewSpec(8, (96,) * 3, (0.2, 0.5))}
SHAPE, SPACING = (512, 512, 200), (0.8, 0.8, 1.5)


def measure(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows, in seconds or bytes per set.

    Args:
        quick: one volume and three sets instead of two and eight.
        device: where views are made.
    """
    count, sets = (1, 3) if quick else (2, 8)
    with threads(1), tempfile.TemporaryDirectory(prefix="views-", dir=os.environ.get("BENCH_DIR")) as folder:
        return compare(Path(folder), count, sets, device)


def compare(folder: Path, count: int, sets: int, device: torch.device) -> list[dict[str, Any]]:
    cases = [Case(str(seed), write_ct(folder / f"{seed}.nii", seed)) for seed in range(count)]
    cached = {dtype: build_cache(cases, Preprocessing(dtype=dtype), folder / "cache") for dtype in ("int16", "uint8")}
    items = [(position, position % count) for position in range(sets)]
    monai, monai_name = persistent_dataset([case.image for case in cases], folder / "monai"), "MONAI PersistentDataset"
    samples = {dtype: ViewDataset(volumes, SPECS) for dtype, volumes in cached.items()}
    whole = load_resident(cached["int16"], device)
    makers = {"blocks": ViewMaker(SPECS), "resident": ViewMaker(SPECS, whole)}
    batches = {dtype: [loaded(BlockDataset(views), item) for item in items] for dtype, views in samples.items()}
    resident = BlockDataset(samples["int16"], resident=True)
    check(makers["blocks"](dict(batches["int16"][0]), device), samples["int16"][items[0]])
    check(makers["resident"](loaded(resident, items[0]), device), samples["int16"][items[0]])

    seconds = alternate(
        {
            "monai": lambda n: monai_views(monai, samples["int16"], items[n]),
            "int16": lambda n: loaded(BlockDataset(samples["int16"]), items[n]),
            "uint8": lambda n: loaded(BlockDataset(samples["uint8"]), items[n]),
            "resident": lambda n: loaded(resident, items[n]),
            "loader": lambda n: samples["int16"][items[n]],
            "device": lambda n: finished(makers["blocks"](dict(batches["int16"][n]), device)),
        },
        sets,
    )
    floats = tensor_bytes([torch.empty(spec.count, *spec.size) for spec in SPECS.values()])
    size = {dtype: statistics.mean(map(tensor_bytes, made)) for dtype, made in batches.items()}
    rest = tensor_bytes(loaded(resident, items[0]))
    ours_made = seconds["int16"] + seconds["device"]
    work, resized = "loader's work per set of GL-MAE views", f"{monai_name} and Resize"
    return [
        row(f"{work}, int16 blocks", resized, seconds["int16"], seconds["monai"], "s", 10),
        row(f"{work}, uint8 blocks", resized, seconds["uint8"], seconds["monai"], "s", 10),
        row(f"{work}, volumes resident", resized, seconds["resident"], seconds["monai"], "s", 20),
        row(f"{work}, views made in it", resized, seconds["loader"], seconds["monai"], "s"),
        row("bytes from loader to device per set, int16", "float32 views", size["int16"], floats, "bytes", 4),
        row("bytes from loader to device per set, uint8", "float32 views", size["uint8"], floats, "bytes", 4),
        row("bytes from loader to device per set, resident", "float32 views", rest, floats, "bytes", 4),
        row(f"blocks, and views of them on {device}", "views made in the loader", ours_made, seconds["loader"], "s"),
    ]


def row(name: str, against: str, ours: float, theirs: float, unit: str, aim: float | None = None) -> dict[str, Any]:
    return Row(name=name, against=against, ours=ours, theirs=theirs, unit=unit, aim=aim).as_dict()


def write_ct(path: Path, seed: int) -> Path:
    hu, _ = phantom(SHAPE, seed=seed, noise=20.0)
    write_nifti(path, hu, affine_of(SHAPE, SPACING))
    return path


def loaded(dataset: BlockDataset, item: tuple[int, int]) -> dict[str, Any]:
    return collate_blocks([dataset[item]])


def finished(batch: dict[str, Tensor]) -> None:
    """Wait until a batch is complete."""
    if batch["key"].is_cuda:
        torch.cuda.synchronize()


def monai_views(monai: PersistentDataset, samples: ViewDataset, item: tuple[int, int]) -> list[Tensor]:
    """Return the views of a sample as MONAI makes them of its cached float32 volume."""
    image, views = monai[item[1]]["image"], []
    for kind, boxes in samples.boxes(item).items():
        resize = Resize(samples.specs[kind].size, mode="trilinear")
        for box in boxes:
            stop = [a + e for a, e in zip(box.start, box.size)]
            view = resize(SpatialCrop(roi_start=box.start, roi_end=stop)(image))
            axes = [axis + 1 for axis, flip in enumerate(box.flips) if flip]
            views.append(view.flip(axes) if axes else view)
    return views


def check(made: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Check that views are those of the loader, to 1e-3 of the window."""
    for kind in SPECS:
        assert (made[kind][0].cpu() - wanted[kind]).abs().max() <= 1e-3, f"{kind} views differ"


def alternate(functions: dict[str, Callable[[int], Any]], calls: int) -> dict[str, float]:
    """Return the median seconds of a call of each function. Each is called with 0, 1, ... in turn."""

    def numbered(function: Callable[[int], Any]) -> Callable[[], Any]:
        numbers = itertools.cycle(range(calls))
        return lambda: function(next(numbers))

    return in_turn({name: numbered(function) for name, function in functions.items()}, calls)
