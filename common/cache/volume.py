"""A cached volume as its readers see it. See common/cache/build.py for the layout of its folder."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.cache import storage
from common.data.datalist import Case
from common.data.preprocessing import Preprocessing
from common.errors import InputError
from common.files import digest

FORMAT = 2


@dataclass(frozen=True)
class CachedVolume:
    """A cached volume. It holds no voxels and is cheap to pickle; each process opens the arrays when it reads them.

    Attributes:
        source: image file or DICOM folder.
        folder: folder in the cache.
        content_hash: hash of the voxels as scanned, whatever the name, format or compression of the file.
        levels: shape (D, H, W) of each resolution level, the full one first.
        affine: (4, 4), voxel of the cached volume -> mm, RAS.
        spacing: mm (D, H, W).
        scale, offset: preprocessed intensity = stored number * scale + offset.
    """

    name: str
    source: Path
    folder: Path
    content_hash: str
    channels: int
    levels: tuple[tuple[int, int, int], ...]
    affine: np.ndarray = field(compare=False, repr=False)
    spacing: tuple[float, float, float]
    has_label: bool
    scale: float
    offset: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (D, H, W) of the full level."""
        return self.levels[0]

    @property
    def zero(self) -> int:
        """The stored number of a preprocessed intensity of 0."""
        return round(-self.offset / self.scale)

    def read(
        self, start: Sequence[int], size: Sequence[int], level: int = 0, out_size: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return the box [start, start + size) of a level as (C, d, h, w) float32, 0 outside the volume.

        Only the chunks that the box touches are read.

        Args:
            out_size: resize the box to this shape (d, h, w), trilinear.

        Raises:
            InputError: the cached volume is missing or damaged.
        """
        numbers = self.read_numbers(start, size, level).numpy()
        if out_size is None:
            values = np.multiply(numbers, np.float32(self.scale), dtype=np.float32)
        # resize the stored numbers, so that the large box is never converted to floats
        else:
            values = storage.trilinear(torch.from_numpy(numbers), out_size).numpy()
            values *= np.float32(self.scale)
        if self.offset:
            values += np.float32(self.offset)
        return torch.from_numpy(values)

    def read_numbers(self, start: Sequence[int], size: Sequence[int], level: int = 0) -> torch.Tensor:
        """Return the box of a level as stored, (C, d, h, w) int16 or uint8, `zero` outside the volume.

        Raises:
            InputError: the cached volume is missing or damaged.
        """
        return torch.from_numpy(storage.read_box(self._path(level), start, size, outside=self.zero))

    def read_into(self, out: torch.Tensor, start: Sequence[int], level: int = 0) -> None:
        """Read the box of a level at `start`, which lies in the volume, into `out` (C, d, h, w), as `dtype`.

        Raises:
            InputError: the cached volume is missing or damaged.
        """
        storage.read_into(self._path(level), start, out.numpy())

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored numbers, int16 or uint8. InputError if the cached volume is missing or damaged."""
        return getattr(torch, storage.number_type(self._path(0)).name)

    def _path(self, level: int) -> Path:
        return self.folder / storage.level_name(level)

    def read_label(self, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """Return the box of the label map as (1, d, h, w) uint8, 0 outside the volume. InputError without a label."""
        if not self.has_label:
            raise InputError(f"{self.source}: was cached without a label")
        return torch.from_numpy(storage.read_box(self.folder / "label.b2nd", start, size))

    @property
    def class_points(self) -> dict[int, np.ndarray]:
        """Up to 2000 random voxels of each label class that is present: id -> (K, 3) int32."""
        return _points(self.folder) if self.has_label else {}


@lru_cache(maxsize=1024)
def _points(folder: Path) -> dict[int, np.ndarray]:
    try:
        with np.load(folder / "points.npz") as file:
            return {int(name): file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise storage.damaged(folder / "points.npz", error) from None


def volume_key(hashes: Sequence[str], preprocessing: Preprocessing) -> str:
    """Return the folder name of a volume: a hash of the files (image, then label), the settings and the format."""
    text = json.dumps({"files": list(hashes), "preprocessing": preprocessing.key(), "format": FORMAT}, sort_keys=True)
    return digest([text], 32)


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the content of a volume's meta.json. OSError or ValueError if it cannot be read."""
    return json.loads((folder / "meta.json").read_text())


def open_volume(folder: Path, case: Case) -> CachedVolume | None:
    """Return the volume in `folder`, named after `case`; None, and an empty place, if it is missing or incomplete."""
    try:
        meta = read_meta(folder)
        return CachedVolume(
            name=case.name,
            source=case.image,
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
    # damaged, or written by another program: build it again
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
