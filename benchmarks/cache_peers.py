"""Compare the cache with MONAI's PersistentDataset: bytes on disk, crops and sets of GL-MAE views per second.

    python -m benchmarks.cache_peers                          synthetic volumes of 512 x 512 x 200
    python -m benchmarks.cache_peers --volumes A B            NIfTI files or DICOM folders

Both use the same volumes, preprocessing (RAS, HU -1000..1000 -> [0, 1], foreground crop) and boxes, in one thread and
one run. The time of PersistentDataset is that for loading the cached item, the crop and, for views, MONAI's Resize
(trilinear), without random transforms and collation. Its item is float32, as in the loaders of both papers.

Measured 2026-11-22 with the defaults (two cores of an AMD EPYC, other work running; torch 2.14.1, monai 1.6.1, blosc2
4.14.1); the second pair of columns with `--volumes` on the chest CT (233 x 167 x 191) and the abdomen series
(512 x 371 x 20) of the sample data:

                                              PersistentDataset     cache   ratio       PersistentDataset  cache   ratio
    MB on disk                                           629.15    142.25     4.4                   50.71  13.97     3.6
    96^3 crops per second, 4 per visit                    26.12    360.24    13.8                  215.22 827.55     3.8
    96^3 crops per second, 1 per visit                     8.75    456.72    52.2                  153.32 706.18     4.6
    sets of GL-MAE views per second                        3.55      7.81     2.2                   12.52  23.93     1.9
    the same, MONAI's volume in memory                     7.37      7.81     1.1                   13.15  23.93     1.8

On volumes as scanned the cache gives more than ten times the crops for less than a quarter of the bytes, on small or
resampled ones less than that. It gives twice the sets of views: a set resizes 15 million voxels, which takes half of
MONAI's time, and decoding half to all of a scan twice takes the cache about as long.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import monai
import torch
from monai.data import PersistentDataset
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    Resize,
    ScaleIntensityRanged,
    SpatialCrop,
)
from torch import Tensor

from common.cache import build, maintenance
from common.cli import parse, run_program
from common.config import setting
from common.data.datalist import Case, stem
from common.data.preprocessing import Preprocessing
from common.data.sampler import generator
from common.runlog import print_main
from Pretrain.views import Box, ViewSpec, crop, draw_box
from scripts.synthetic_ct import affine_of, phantom, write_nifti

GLMAE = (ViewSpec(2, (160,) * 3, (0.5, 1.0), "resize"), ViewSpec(8, (96,) * 3, (0.2, 0.5), "resize"))


@dataclass(kw_only=True)
class MonaiSettings:
    """Settings of the comparison."""

    volumes: tuple[Path, ...] = setting((), "CT scans; none: synthetic ones")
    count: int = setting(3, "number of synthetic volumes")
    shape: tuple[int, int, int] = setting((512, 512, 200), "shape of a synthetic volume")
    crop: tuple[int, int, int] = setting((96, 96, 96), "voxels of a crop")
    crops: int = setting(4, "crops per visit of a volume, as in the loaders of both papers")
    visits: int = setting(8, "visits of each volume")


def main() -> None:
    settings = parse(MonaiSettings, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cache-monai-", dir=os.environ.get("BENCH_DIR")) as folder:
        measure(settings, Path(folder))


def measure(settings: MonaiSettings, folder: Path) -> None:
    paths = list(settings.volumes) or write_volumes(settings, folder)
    volumes = build.build_cache([Case(stem(path), path) for path in paths], Preprocessing(), folder / "cache")
    monai_items = persistent_dataset(paths, folder / "monai")
    shapes = [tuple(monai_items[i]["image"].shape[1:]) for i in range(len(paths))]
    assert shapes == [volume.shape for volume in volumes], "the two preprocess differently"
    versions = f"torch {torch.__version__}, monai {monai.__version__}"
    print_main(f"{versions}, {os.cpu_count()} cores, one thread; volumes {shapes}")
    cache_bytes = sum(maintenance.folder_bytes(volume.folder) for volume in volumes)
    monai_bytes = maintenance.folder_bytes(folder / "monai")
    row("MB on disk", monai_bytes / 1e6, cache_bytes / 1e6, monai_bytes / cache_bytes)
    fixed = ViewSpec(settings.crops, settings.crop, crop_mode="fixed", flip_prob=0.0)
    visits = [(i, v) for v in range(settings.visits) for i in range(len(volumes))]
    for title, specs, per_visit in (
        (f"{settings.crop[0]}^3 crops per second, {settings.crops} per visit", (fixed,), settings.crops),
        (f"{settings.crop[0]}^3 crops per second, 1 per visit", (ViewSpec(1, settings.crop, crop_mode="fixed"),), 1),
        ("sets of GL-MAE views per second", GLMAE, 1),
    ):
        boxes = {visit: draw_boxes(volumes[visit[0]].shape, specs, sum(visit)) for visit in visits}
        check_views(volumes, monai_items, boxes[visits[0]], visits[0][0])
        slow, fast, in_memory = seconds(volumes, monai_items, boxes)
        row(title, per_visit / slow, per_visit / fast, slow / fast)
    row("the same, MONAI's volume in memory", 1 / in_memory, 1 / fast, in_memory / fast)


def row(title: str, monai_value: float, cache_value: float, ratio: float) -> None:
    print_main(f"{title:44s} PersistentDataset {monai_value:9.2f}   cache {cache_value:9.2f}   ratio {ratio:6.1f}")


def write_volumes(settings: MonaiSettings, folder: Path) -> list[Path]:
    paths = [folder / f"volume{seed}.nii" for seed in range(settings.count)]
    for seed, path in enumerate(paths):
        hu, _ = phantom(settings.shape, seed=seed, noise=20.0)
        write_nifti(path, hu, affine_of(settings.shape, (0.8, 0.8, 1.5)))
    return paths


def persistent_dataset(paths: Sequence[Path], folder: Path) -> PersistentDataset:
    """Return a dataset that caches the preprocessed volume as float32, as the loaders of both papers do."""
    steps = [
        LoadImaged("image", image_only=True),
        EnsureChannelFirstd("image"),
        Orientationd("image", axcodes="RAS", labels=None),
        ScaleIntensityRanged("image", -1000, 1000, 0, 1, clip=True),
        CropForegroundd("image", "image", select_fn=lambda x: x > 0.05, margin=8, allow_smaller=True),
    ]
    return PersistentDataset([{"image": str(path)} for path in paths], Compose(steps), folder)


def draw_boxes(shape: Sequence[int], specs: Sequence[ViewSpec], seed: int) -> list[tuple[Box, tuple[int, ...]]]:
    rng = generator(0, seed)
    return [(draw_box(shape, spec, rng), spec.size) for spec in specs for _ in range(spec.count)]


def monai_views(image: Tensor, boxes: Sequence[tuple[Box, tuple[int, ...]]]) -> list[Tensor]:
    views = []
    for box, size in boxes:
        end = [a + n for a, n in zip(box.start, box.size)]
        view = SpatialCrop(roi_start=box.start, roi_end=end)(image)
        if tuple(view.shape[1:]) != tuple(size):
            view = Resize(size, mode="trilinear")(view)
        axes = [axis + 1 for axis, flip in enumerate(box.flips) if flip]
        views.append(view.flip(axes) if axes else view.contiguous())
    return views


def check_views(volumes: Sequence, monai_items: PersistentDataset, boxes: Sequence, number: int) -> None:
    """Check that both give the same views, except for reduced levels and rounding."""
    wanted = monai_views(monai_items[number]["image"], boxes)
    for view, other, (_, size) in zip((crop(volumes[number], *box) for box in boxes), wanted, boxes):
        assert tuple(view.shape[1:]) == tuple(size)
        correlation = torch.corrcoef(torch.stack([view.flatten(), torch.as_tensor(other).flatten()]))[0, 1]
        assert correlation > 0.95, f"views differ: correlation {correlation:.3f}"


def seconds(volumes: Sequence, monai_items: PersistentDataset, boxes: dict) -> tuple[float, float, float]:
    """Return the median time of a visit: of MONAI, of the cache, and of MONAI without loading the volume.

    They take turns, so that other load on the machine affects all of them.
    """
    times: list[list[float]] = [[], [], []]
    for (index, _), wanted in boxes.items():
        start = time.perf_counter()
        image = monai_items[index]["image"]
        loaded = time.perf_counter()
        monai_views(image, wanted)
        done = time.perf_counter()
        del image
        again = time.perf_counter()
        for box in wanted:
            crop(volumes[index], *box)
        for kind, value in zip(times, (done - start, time.perf_counter() - again, done - loaded)):
            kind.append(value)
    return tuple(statistics.median(kind) for kind in times)


if __name__ == "__main__":
    sys.exit(run_program(main))
