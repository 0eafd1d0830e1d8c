"""What a file is, whatever it is called: hashes of bytes and of voxels, and an index that spares reading them twice."""

import hashlib
import json
import os
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from common.data import dicom
from common.errors import InputError
from common.files import file_sha256


@dataclass(frozen=True)
class File:
    """A volume's file, or the files of a DICOM folder taken together."""

    path: str
    state: str  # size and time of change: the same state means the same content
    hash: str
    content: str | None = None  # hash of the voxels, where it is known


def fingerprint(path: Path) -> File:
    """The file's path, state and hash. InputError when it cannot be read."""
    try:
        state = file_state(path)
        return File(str(path.absolute()), state, file_hash(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def file_state(path: Path) -> str:
    """Size and time of change, of a folder those of the files in it. OSError when it cannot be looked at."""
    if path.is_dir():
        entries = sorted((entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file())
        text = json.dumps([(name, state.st_size, state.st_mtime_ns) for name, state in entries])
        return hashlib.sha256(text.encode()).hexdigest()[:32]
    state = path.stat()
    return f"{state.st_size}-{state.st_mtime_ns}"


def file_hash(path: Path) -> str:
    """SHA-256 of the bytes; of a DICOM folder, of its slices whatever their names."""
    if path.is_dir():
        hashes = sorted(file_hash(slice_) for slice_ in dicom.series_files(path))
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    return file_sha256(path)


def content_hash(image: torch.Tensor) -> str:
    """Hash of the voxels (C, D, H, W) in RAS orientation: the same for NIfTI and DICOM, any compression, any name.

    Whole numbers are hashed as such, so that the storage type plays no part either.
    """
    values = torch.as_tensor(image).contiguous()
    whole = values.round()
    if bool(((values - whole).abs() < 1e-3).all()) and float(whole.abs().max()) < 2**31:
        values = whole.to(torch.int32)
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.numpy().data)
    return digest.hexdigest()


def peak_memory() -> int:
    """Largest memory that this process has held, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class HashIndex:
    """(path, state) -> hash, one JSON line each. Lines are only added, so any number of processes may write one index.

    A line that was cut off is passed over: that file is then read again.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, File] = {}
        if path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    file = File(**json.loads(line))
                    self._known[file.path] = file
                except (ValueError, TypeError):
                    continue

    def get(self, path: Path) -> str | None:
        """The hash of a file that has not changed since it was added, else None."""
        known = self.file(path)
        return known.hash if known else None

    def file(self, path: Path) -> File | None:
        """What is known of a file that has not changed since it was added, else None."""
        known = self._known.get(str(path.absolute()))
        try:
            return known if known and known.state == file_state(path) else None
        except OSError:
            return None

    def add(self, files: Iterable[File]) -> None:
        files = list(files)
        self._known |= {file.path: file for file in files}
        text = "".join(json.dumps(vars(file)) + "\n" for file in files)
        with open(self.path, "ab", buffering=0) as out:
            out.write(text.encode())
