"""NIfTI files written whole or not at all."""

import gzip
from pathlib import Path

import nibabel as nib

from common.files import save_bytes


def write_nifti(path: Path, image: nib.Nifti1Image) -> None:
    """A NIfTI file, compressed where its name says so; the same image gives the same bytes."""
    content = image.to_bytes()
    save_bytes(path, gzip.compress(content, compresslevel=6, mtime=0) if path.name.endswith(".gz") else content)
