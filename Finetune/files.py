"""Files written whole or not at all, and folders that can be written to."""

import gzip
import os
import uuid
from pathlib import Path

import nibabel as nib

from common.config import InputError


def save_bytes(path: Path, content: bytes) -> None:
    """Write so that `path` holds all of `content` or what it held before. InputError when the place cannot be
    written."""
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def writable(folder: Path) -> None:
    """InputError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None


def write_nifti(path: Path, image: nib.Nifti1Image) -> None:
    """A NIfTI file, compressed where its name says so; the same image gives the same bytes."""
    content = image.to_bytes()
    save_bytes(path, gzip.compress(content, compresslevel=6, mtime=0) if path.name.endswith(".gz") else content)
