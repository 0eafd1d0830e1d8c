"""One cached volume as its readers see it. The folder's layout is told in common/cache/build.py."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from common.cache import storage
from common.data.datalist import Case
from common.data.preprocessing import Preprocessing
from common.errors import InputError

FORMAT = 2


@dataclass(frozen=True)
class CachedVolume:
    """One cached volume. Cheap to make and to pickle; arrays are opened where they are read, once per process."""

    name: str
    source: Path  # image file or DICOM folder of the case
    folder: Path
    content_hash: str  # of the voxels as scanned, whatever the file's name, format or compression
    channels: int
    levels: tuple[tuple[int, int, int], ...]  # shape (D, H, W) of each level, the full one first
    affine: np.ndarray = field(compare=False, repr=False)  # (4, 4): voxel of the cached grid -> mm, RAS
    spacing: tuple[float, float, float]  # mm
    has_label: bool
    scale: float  # stored number * scale + offset = preprocessed intensity
    offset: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.levels[0]

    def read(
        self, start: Sequence[int], size: Sequence[int], level: int = 0, out_size: Sequence[int] | None = None
    ) -> torch.Tensor:
        """The box [start, start + size) of a level as (C, d, h, w) float32; outside the volume 0, the scale's minimum.

        With `out_size` resized to that (trilinear). Only the chunks that the box touches are read. InputError when the
        entry is gone or damaged.
        """
        box = storage.read_box(self.folder / storage.level_name(level), start, size)
        numbers = box.pad(box.inside, fill=round(-self.offset / self.scale))
        if out_size is None:
            values = np.multiply(numbers, np.float32(self.scale), dtype=np.float32)
        else:  # resized as whole numbers: the large box is never turned into floats
            values = storage.trilinear(torch.from_numpy(numbers), out_size).numpy()
            values *= np.float32(self.scale)
        if self.offset:
            values += np.float32(self.offset)
        return torch.from_numpy(values)

    def read_label(self, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """The box of the label map as (1, d, h, w) uint8; outside the volume 0. InputError without a label."""
        if not self.has_label:
            raise InputError(f"{self.source}: was cached without a label")
        box = storage.read_box(self.folder / "label.b2nd", start, size)
        return torch.from_numpy(box.pad(box.inside))

    @property
    def class_points(self) -> dict[int, np.ndarray]:
        """Of each label class that is present, up to 2000 random voxels: id -> (K, 3) int32."""
        return _points(self.folder) if self.has_label else {}


@lru_cache(maxsize=1024)
def _points(folder: Path) -> dict[int, np.ndarray]:
    try:
        with np.load(folder / "points.npz") as file:
            return {int(name): file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: this cache entry is damaged ({error}); delete the folder to make it anew"
        ) from None


def volume_key(hashes: Sequence[str], preprocessing: Preprocessing) -> str:
    """Name of an entry: a hash of the files' hashes (image, then label), every setting and the format's version."""
    text = json.dumps({"files": list(hashes), "preprocessing": asdict(preprocessing), "format": FORMAT}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def open_volume(folder: Path, case: Case | None = None) -> CachedVolume | None:
    """The entry in `folder`, under the name of `case`; None when there is none that is whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return CachedVolume(
            name=case.name if case else meta["name"],
            source=case.image if case else Path(meta["source"]),
            folder=folder,
            content_hash=meta["content_hash"],
            channels=meta["channels"],
            levels=tuple(tuple(shape) for shape in meta["levels"]),
            affine=np.asarray(meta["affine"], np.float64),
            spacing=tuple(meta["spacing"]),
            has_label=meta["has_label"],
            scale=meta["quantisation"]["scale"],
            offset=meta["quantisation"]["offset"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):  # not one that this code wrote whole: build it anew
        shutil.rmtree(folder, ignore_errors=True)
        return None
