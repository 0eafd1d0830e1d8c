"""Crops of cached volumes against MONAI's PersistentDataset: time per crop from the page cache, and bytes on disk.

Both use the same volumes, preprocessing (RAS, HU -1000..1000 -> [0, 1], foreground crop) and boxes, in one thread. The
time of PersistentDataset is that for loading the cached item and cropping it, without random transforms and collation.
Its item is float32, as in the loaders of both papers.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import PersistentDataset
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    SpatialCrop,
)
from torch import Tensor

from benchmarks.harness import Row, alternate, threads
from common.cache.build import build_cache
from common.cache.maintenance import folder_bytes
from common.cache.volume import CachedVolume
from common.data.datalist import Case, stem
from common.data.preprocessing import Preprocessing
from common.data.sampler import generator
from Pretrain.views import Box, ViewSpec, crop, draw_box
from scripts.synthetic_ct import affine_of, phantom, write_nifti

# a CT scan as it comes from the scanner
SHAPE = (512, 512, 200)
CROP = (96, 96, 96)
AGAINST = "MONAI PersistentDataset"


def measure(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows: bytes on disk, and seconds per crop with four crops of a volume per visit, and with one."""
    count, visits = (1, 4) if quick else (3, 8)
    with tempfile.TemporaryDirectory(prefix="benchmark-cache-") as name, threads(1):
        folder = Path(name)
        paths = write_volumes(folder, count, SHAPE)
        volumes = build_cache([Case(stem(path), path) for path in paths], Preprocessing(), folder / "cache")
        items = persistent_dataset(paths, folder / "monai")
        shapes = [tuple(items[i]["image"].shape[1:]) for i in range(count)]
        assert shapes == [volume.shape for volume in volumes], "the two preprocess differently"
        title = "x".join(map(str, SHAPE))
        sizes = [folder_bytes(path) / count for path in (folder / "cache", folder / "monai")]
        size = Row(name=f"a volume of {title} on disk", against=AGAINST, ours=sizes[0], theirs=sizes[1], unit="bytes")
        return [size.as_dict(), *(crop_row(volumes, items, number, visits, title) for number in (4, 1))]


def crop_row(
    volumes: Sequence[CachedVolume], items: PersistentDataset, crops: int, visits: int, title: str
) -> dict[str, Any]:
    """Return the row of `crops` crops per visit. The volumes are visited in turn."""
    spec, spent = ViewSpec(1, CROP, crop_mode="fixed"), []
    for visit in range(visits * len(volumes)):
        volume, index = volumes[visit % len(volumes)], visit % len(volumes)
        rng = generator(0, visit)
        boxes = [draw_box(volume.shape, spec, rng) for _ in range(crops)]
        pair = {
            "ours": lambda v=volume, b=boxes: [crop(v, box, CROP) for box in b],
            "theirs": lambda i=index, b=boxes: monai_crops(items[i]["image"], b),
        }
        if visit < len(volumes):
            check(pair["ours"](), pair["theirs"]())
        spent.append(alternate(pair, 1))
    ours, theirs = (sum(seconds[name] for seconds in spent) / (crops * len(spent)) for name in ("ours", "theirs"))
    name = f"crops of 96^3 from the page cache, {crops} per visit of {title}"
    return Row(name=name, against=AGAINST, ours=ours, theirs=theirs, unit="s per crop", aim=10.0).as_dict()


def check(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Check that both give the same voxels, up to the cache's rounding to half a step of 1 HU."""
    for view, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(view, torch.as_tensor(other), rtol=0, atol=5e-4)


def monai_crops(image: Tensor, boxes: Sequence[Box]) -> list[Tensor]:
    """Return the crops (C, D, H, W) of a volume, flipped as their boxes say."""
    crops = []
    for box in boxes:
        end = [a + n for a, n in zip(box.start, box.size)]
        view = SpatialCrop(roi_start=box.start, roi_end=end)(image)
        axes = [axis + 1 for axis, flip in enumerate(box.flips) if flip]
        crops.append(view.flip(axes) if axes else view.contiguous())
    return crops


def write_volumes(folder: Path, count: int, shape: tuple[int, int, int]) -> list[Path]:
    """Write synthetic CT volumes with noise of 20 HU as NIfTI files, and return their paths."""
    paths = [folder / f"volume{seed}.nii" for seed in range(count)]
    for seed, path in enumerate(paths):
        hu, _ = phantom(shape, seed=seed, noise=20.0)
        write_nifti(path, hu, affine_of(shape, (0.8, 0.8, 1.5)))
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
