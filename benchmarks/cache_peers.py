"""Our cache beside MONAI's PersistentDataset: bytes on disk, crops per second, sets of GL-MAE views per second.

    python -m benchmarks.cache_peers                          drawn volumes of 512 x 512 x 200
    python -m benchmarks.cache_peers --volumes A B            NIfTI files or DICOM folders

Same volumes, same preprocessing (RAS, HU -1000..1000 -> [0, 1], foreground box), same boxes, one thread, one run.
The peer's time is the load of the cached item, the crop and, for views, MONAI's Resize (trilinear); random transforms
and collation are left out on both sides. Its float32 item is cached the way both papers' loaders do it.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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

from common import cache, upkeep
from common.config import parse, run_program, setting
from common.datalist import Case, stem
from common.logging import say
from common.sampling import generator
from common.synthetic import affine_of, phantom, write_nifti
from common.volumes import Preprocessing
from Pretrain.views import Box, ViewSpec, cut, draw_box

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
    visits: int = setting(4, "visits of each volume")


def main() -> None:
    settings = parse(PeerSettings, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cache-peers-", dir=os.environ.get("BENCH_DIR")) as folder:
        compare(settings, Path(folder))


def compare(settings: PeerSettings, folder: Path) -> None:
    paths = list(settings.volumes) or draw(settings, folder)
    entries = cache.ensure([Case(stem(path), path) for path in paths], Preprocessing(), folder / "ours")
    peer = persistent_dataset(paths, folder / "peer")
    shapes = [tuple(peer[i]["image"].shape[1:]) for i in range(len(paths))]  # fills its cache
    assert shapes == [entry.shape for entry in entries], "the two sides preprocess differently"
    say(f"torch {torch.__version__}, monai {monai.__version__}, {os.cpu_count()} cores, one thread; volumes {shapes}")
    mine = sum(upkeep.folder_bytes(entry.folder) for entry in entries)
    theirs = upkeep.folder_bytes(folder / "peer")
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
        slow = seconds(lambda v, b=boxes: read_peer(peer[v[0]]["image"], b[v]), visits)
        fast = seconds(lambda v, b=boxes: [cut(entries[v[0]], *box) for box in b[v]], visits)
        row(title, per_visit / slow, per_visit / fast, slow / fast)
    held = [peer[i]["image"] for i in range(len(entries))]  # what remains of the peer's time without its load
    slow = seconds(lambda v: read_peer(held[v[0]], boxes[v]), visits)
    row("the same, peer's volume held in memory", 1 / slow, 1 / fast, slow / fast)


def row(title: str, theirs: float, ours: float, ratio: float) -> None:
    say(f"{title:44s} PersistentDataset {theirs:9.2f}   ours {ours:9.2f}   ratio {ratio:6.1f}")


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
    for mine, other, (_, size) in zip((cut(entries[number], *box) for box in boxes), theirs, boxes):
        assert tuple(mine.shape[1:]) == tuple(size)
        correlation = torch.corrcoef(torch.stack([mine.flatten(), torch.as_tensor(other).flatten()]))[0, 1]
        assert correlation > 0.95, f"views differ: correlation {correlation:.3f}"


def seconds(visit: Callable, visits: Sequence) -> float:
    """Median over visits, the first one left out."""
    times = []
    for item in [visits[0], *visits]:
        start = time.perf_counter()
        visit(item)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


if __name__ == "__main__":
    sys.exit(run_program(main))
