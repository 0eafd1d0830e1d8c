"""Our cache beside MONAI's PersistentDataset: bytes on disk, crops per second, sets of GL-MAE views per second.

    python -m benchmarks.cache_peers                          drawn volumes of 512 x 512 x 200
    python -m benchmarks.cache_peers --volumes A B            NIfTI files or DICOM folders

Same volumes, same preprocessing (RAS, HU -1000..1000 -> [0, 1], foreground box), same boxes, one thread, one run.
The peer's time is the load of the cached item, the crop and, for views, MONAI's Resize (trilinear); random transforms
and collation are left out on both sides. Its float32 item is cached the way both papers' loaders do it.

Measured 2026-11-22 with the defaults (two cores of an AMD EPYC, other work running; torch 2.14.1, monai 1.6.1, blosc2
4.14.1); the second pair of columns with `--volumes` on the chest CT (233 x 167 x 191) and the abdomen series
(512 x 371 x 20) of the sample data:

                                              PersistentDataset      ours   ratio       PersistentDataset   ours   ratio
    MB on disk                                           629.15    142.25     4.4                   50.71  13.97     3.6
    96^3 crops per second, 4 per visit                    26.12    360.24    13.8                  215.22 827.55     3.8
    96^3 crops per second, 1 per visit                     8.75    456.72    52.2                  153.32 706.18     4.6
    sets of GL-MAE views per second                        3.55      7.81     2.2                   12.52  23.93     1.9
    the same, peer's volume held in memory                 7.37      7.81     1.1                   13.15  23.93     1.8

So on volumes as they are scanned the aims of ten times the crops and a quarter of the bytes are met; on small or
resampled ones they are not; and ten times the view sets is missed: a set resizes 15 million voxels, which alone takes
the peer half its time, and decoding half to all of a scan twice takes us about as long as that.
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

GLMAE = (
    ViewSpec(2, (160, 160, 160), (0.5, 1.0), "resize"),
    ViewSpec(8, (96, 96, 96), (0.2, 0.5), "resize"),
)


@dataclass(kw_only=True)
class PeerSettings:
    """Settings of the comparison."""

    volumes: tuple[Path, ...] = setting((), "CT scans; none: drawn ones")
    count: int = setting(3, "drawn volumes")
    shape: tuple[int, int, int] = setting((512, 512, 200), "of a drawn volume")
    crop: tuple[int, int, int] = setting((96, 96, 96), "voxels of a crop")
    crops: int = setting(4, "crops per visit of a volume, as both papers' loaders draw them")
    visits: int = setting(8, "visits of each volume")


def main() -> None:
    settings = parse(PeerSettings, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cache-peers-", dir=os.environ.get("BENCH_DIR")) as folder:
        compare(settings, Path(folder))


def compare(settings: PeerSettings, folder: Path) -> None:
    paths = list(settings.volumes) or draw(settings, folder)
    entries = build.build_cache([Case(stem(path), path) for path in paths], Preprocessing(), folder / "ours")
    peer = persistent_dataset(paths, folder / "peer")
    shapes = [tuple(peer[i]["image"].shape[1:]) for i in range(len(paths))]  # fills its cache
    assert shapes == [entry.shape for entry in entries], "the two sides preprocess differently"
    print_main(
        f"torch {torch.__version__}, monai {monai.__version__}, {os.cpu_count()} cores, one thread; volumes {shapes}"
    )
    mine = sum(maintenance.folder_bytes(entry.folder) for entry in entries)
    theirs = maintenance.folder_bytes(folder / "peer")
    row("MB on disk", theirs / 1e6, mine / 1e6, theirs / mine)
    fixed = ViewSpec(settings.crops, settings.crop, crop_mode="fixed", flip_prob=0.0)
    visits = [(i, v) for v in range(settings.visits) for i in range(len(entries))]
    for title, specs, per_visit in (
        (f"{settings.crop[0]}^3 crops per second, {settings.crops} per visit", (fixed,), settings.crops),
        (f"{settings.crop[0]}^3 crops per second, 1 per visit", (ViewSpec(1, settings.crop, crop_mode="fixed"),), 1),
        ("sets of GL-MAE views per second", GLMAE, 1),
    ):
        boxes = {visit: draw_boxes(entries[visit[0]].shape, specs, sum(visit)) for visit in visits}
        same(entries, peer, boxes[visits[0]], visits[0][0])
        slow, fast, held = seconds(entries, peer, boxes)
        row(title, per_visit / slow, per_visit / fast, slow / fast)
    row("the same, peer's volume held in memory", 1 / held, 1 / fast, held / fast)


def row(title: str, theirs: float, ours: float, ratio: float) -> None:
    print_main(f"{title:44s} PersistentDataset {theirs:9.2f}   ours {ours:9.2f}   ratio {ratio:6.1f}")


def draw(settings: PeerSettings, folder: Path) -> list[Path]:
    paths = [folder / f"volume{seed}.nii" for seed in range(settings.count)]
    for seed, path in enumerate(paths):
        hu, _ = phantom(settings.shape, seed=seed, noise=20.0)
        write_nifti(path, hu, affine_of(settings.shape, (0.8, 0.8, 1.5)))
    return paths


def persistent_dataset(paths: Sequence[Path], folder: Path) -> PersistentDataset:
    """What both papers' loaders cache: the preprocessed float32 volume, whole."""
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


def read_peer(image: Tensor, boxes: Sequence[tuple[Box, tuple[int, ...]]]) -> list[Tensor]:
    views = []
    for box, size in boxes:
        end = [a + n for a, n in zip(box.start, box.size)]
        view = SpatialCrop(roi_start=box.start, roi_end=end)(image)
        if tuple(view.shape[1:]) != tuple(size):
            view = Resize(size, mode="trilinear")(view)
        axes = [axis + 1 for axis, flip in enumerate(box.flips) if flip]
        views.append(view.flip(axes) if axes else view.contiguous())
    return views


def same(entries: Sequence, peer: PersistentDataset, boxes: Sequence, number: int) -> None:
    """Both sides give the same views, as far as reduced levels and rounding allow."""
    theirs = read_peer(peer[number]["image"], boxes)
    for mine, other, (_, size) in zip((crop(entries[number], *box) for box in boxes), theirs, boxes):
        assert tuple(mine.shape[1:]) == tuple(size)
        correlation = torch.corrcoef(torch.stack([mine.flatten(), torch.as_tensor(other).flatten()]))[0, 1]
        assert correlation > 0.95, f"views differ: correlation {correlation:.3f}"


def seconds(entries: Sequence, peer: PersistentDataset, boxes: dict) -> tuple[float, float, float]:
    """Median time of a visit: the peer's, ours, the peer's without its load. They take turns, so that what else the
    machine does falls on all."""
    times: list[list[float]] = [[], [], []]
    for (index, _), wanted in boxes.items():
        start = time.perf_counter()
        image = peer[index]["image"]
        loaded = time.perf_counter()
        read_peer(image, wanted)
        done = time.perf_counter()
        del image
        again = time.perf_counter()
        for box in wanted:
            crop(entries[index], *box)
        for kind, value in zip(times, (done - start, time.perf_counter() - again, done - loaded)):
            kind.append(value)
    return tuple(statistics.median(kind) for kind in times)


if __name__ == "__main__":
    sys.exit(run_program(main))
