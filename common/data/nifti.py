"""Reading and writing of NIfTI files.

nibabel reads and writes them. `read` adds what it leaves out: nibabel replaces a spacing of zero by 1 mm, accepts the
magic and the data offset of a header that has its voxels in another file, allocates what a header promises, and stops
before the checksum at the end of a gzipped file.
"""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder

from common.data.geometry import check_size, check_spacing
from common.errors import InputError, one_line
from common.files import save_bytes

KINDS = (nib.Nifti1Image, nib.Nifti2Image)


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the array of a NIfTI file, axes as stored, and its affine (4, 4).

    Raises:
        InputError: the file is not a NIfTI volume, is damaged or cut off, or is too large.
    """
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            image = _open(file, path)
            array = np.asanyarray(image.dataobj)
            while file.read(1 << 20):
                pass
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{path}: found a header that asks for more memory than there is, expected a volume") from None
    # gzip, zlib, numpy and nibabel raise a different type for each kind of damage
    except Exception as error:
        raise InputError(f"{path}: not a NIfTI volume, or a damaged one ({one_line(error)})") from None
    return array, image.affine


def read_shape(path: Path) -> tuple[int, ...]:
    """Return the shape of a NIfTI file, axes as stored, after a check that its voxels are all there.

    They are not read: the end of a gzipped file states the size of its content. Only where that differs, as in a
    damaged file or one of several gzip members, the file is read.

    Raises:
        InputError: as `read`.
    """
    zipped = path.name.lower().endswith(".gz")
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            image = _open(file, path)
        offset, count = int(image.dataobj.offset), int(np.prod(image.shape, dtype=np.int64))
        expected = offset + count * image.get_data_dtype().itemsize
        with open(path, "rb") as file:
            end = file.seek(-4, os.SEEK_END) + 4
            complete = int.from_bytes(file.read(4), "little") == expected % 2**32 if zipped else end >= expected
    except InputError:
        raise
    # as in `read`
    except Exception as error:
        raise InputError(f"{path}: not a NIfTI volume, or a damaged one ({one_line(error)})") from None
    if not complete:
        read(path)
    return image.shape


def _open(file, path: Path) -> nib.Nifti1Image:
    start = file.read(540)
    kind = next((kind for kind in KINDS if kind.header_class.may_contain_header(start)), None)
    if kind is None:
        raise InputError(f"{path}: found no NIfTI header, expected a .nii or .nii.gz file")
    file.seek(0)
    header = kind.header_class.from_fileobj(file, check=False)
    if header["magic"].tobytes()[:2] != b"n+" or header["vox_offset"] < header.single_vox_offset:
        raise InputError(f"{path}: found a NIfTI header without voxels, expected both in one file")
    check_size(header.get_data_shape(), path)
    check_spacing(header["pixdim"][1:4].astype(np.float64), path)
    file.seek(0)
    return kind.from_file_map({"image": FileHolder(fileobj=file)}, mmap=False)


def write_nifti(path: Path, image: nib.Nifti1Image) -> None:
    """Write a NIfTI file, compressed if `path` ends in .gz. The same image always gives the same bytes."""
    content = image.to_bytes()
    save_bytes(path, gzip.compress(content, compresslevel=6, mtime=0) if path.name.endswith(".gz") else content)
