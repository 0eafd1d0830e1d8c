"""Hashes of files and of voxels, and an index of them, so that a known file is not read again."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from common.cache.jsonlines import JsonLines
from common.data import dicom
from common.files import digest, file_sha256, naming_read_errors

# voxels that are hashed at a time
CHUNK = 2**20


@dataclass(frozen=True)
class FileRecord:
    """The hash of a file, or of all files of a DICOM folder.

    `state` are size and modification time: the same state means the same content. `content` is the hash of the voxels,
    if known.
    """

    path: str
    state: str
    hash: str
    content: str | None = None


def file_record(path: Path) -> FileRecord:
    """Return the record of a file. InputError if it cannot be read."""
    with naming_read_errors(path):
        return FileRecord(str(path.absolute()), file_state(path), file_hash(path))


def file_state(path: Path) -> str:
    """Return size and modification time, of a folder those of all its files. OSError if they cannot be read."""
    if path.is_dir():
        entries = sorted((entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file())
        text = json.dumps([(name, state.st_size, state.st_mtime_ns) for name, state in entries])
        return digest([text], 32)
    state = path.stat()
    return f"{state.st_size}-{state.st_mtime_ns}"


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, or of the slices in a DICOM folder regardless of their names."""
    if path.is_dir():
        hashes = sorted(file_hash(slice_) for slice_ in dicom.series_files(path))
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    return file_sha256(path)


def content_hash(image: torch.Tensor) -> str:
    """Return a hash of voxels (C, D, H, W) in RAS orientation, the same for any file format, compression and name.

    Whole numbers are hashed as int32, so that the type they were stored in does not matter either.
    """
    values = torch.as_tensor(image).contiguous()
    voxels = hashlib.sha256(str(tuple(values.shape)).encode())
    # in parts, which need no memory for another volume
    parts = values.flatten().split(CHUNK)
    whole = all(map(_is_whole, parts))
    for part in parts:
        voxels.update((part.round().to(torch.int32) if whole else part).numpy().data)
    return voxels.hexdigest()


def _is_whole(values: torch.Tensor) -> bool:
    rounded = values.round()
    return bool(((values - rounded).abs() < 1e-3).all()) and float(rounded.abs().max()) < 2**31


class HashIndex(JsonLines):
    """The file `index.jsonl`, which holds a record for every file that was read."""

    def __init__(self, path: Path):
        super().__init__(path, key="path")

    def get(self, path: Path) -> FileRecord | None:
        """Return the record of a file, None if the file is unknown or has changed since it was added."""
        fields = self.records.get(str(path.absolute()))
        try:
            return FileRecord(**fields) if fields and fields["state"] == file_state(path) else None
        # no such file, or a record that another version of this code wrote
        except (OSError, TypeError, KeyError):
            return None
