"""NIfTI files as they are written, checked before and while they are read: nibabel would repair a header in silence.

A gzipped file is decompressed once, no further than its header promises, and to the end, where its checksum is.
"""

import gzip
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.data import NibabelReader
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from common.data.geometry import check_size, check_spacing
from common.errors import InputError, one_line
from common.files import save_bytes

MAX_TAIL = 2**28  # of what may follow the image in a gzipped file


def read(path: Path) -> tuple[np.ndarray, dict]:
    """The array as stored and MONAI's metadata ("affine" among them). InputError says what is wrong with the file."""
    data = _decompress(path)
    kind = (
        nib.Nifti2Image if 540 in (int.from_bytes(data[:4], order) for order in ("little", "big")) else nib.Nifti1Image
    )
    reader = NibabelReader()
    reader.filenames = [str(path)]
    try:
        return reader.get_data(kind.from_bytes(data))
    except (ValueError, OSError, TypeError, HeaderDataError, ImageFileError) as error:
        raise InputError(f"{path}: not a NIfTI volume that can be read ({one_line(error)})") from None


def _decompress(path: Path) -> bytes:
    zipped = path.name.lower().endswith(".gz")
    try:
        with open(path, "rb") as raw:
            if zipped and raw.read(2) != b"\x1f\x8b":
                raise InputError(f"{path}: found a file that is not gzip (wrong first bytes), its name ends in .gz")
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if zipped else raw
            head = file.read(540)
            expected = check_header(head, path)
            data = head + file.read(max(expected - len(head), 0))
            if len(data) < expected:
                raise InputError(f"{path}: found {len(data)} bytes, its header promises {expected}: it is cut off")
            tail = 0
            while zipped and (block := file.read(1 << 20)):
                tail += len(block)
                if tail > MAX_TAIL:
                    raise InputError(f"{path}: found over {MAX_TAIL} bytes behind the {expected} of the image")
    except EOFError:
        raise InputError(f"{path}: the gzip data is cut off") from None
    except (zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: the gzip data is damaged") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None
    return data


def check_header(head: bytes, path: Path) -> int:
    """Check the first bytes of a decompressed file; returns how many bytes it must have. InputError otherwise."""
    header = _parse(head, path)
    magic = header["magic"].tobytes()[:3]
    if magic not in (b"n+1", b"n+2"):
        raise InputError(f"{path}: found the magic {magic!r}, needs a NIfTI in one file ('n+1')")
    count = int(header["dim"][0])
    dims = [int(n) for n in header["dim"][1 : 1 + min(max(count, 0), 7)]]
    while len(dims) > 3 and dims[-1] == 1:
        dims.pop()
    if not 1 <= count <= 7 or min(dims) < 1:
        raise InputError(f"{path}: found the shape {tuple(dims)} ({count} dimensions), needs a volume")
    if len(dims) < 3:
        raise InputError(f"{path}: found 2D data of shape {tuple(dims)}, needs a 3D volume")
    if min(dims[:3]) < 2:
        raise InputError(f"{path}: found one slice, shape {tuple(dims)}, needs a volume")
    check_spacing(header["pixdim"][1:4].astype(np.float64), path)
    try:
        itemsize = header.get_data_dtype().itemsize
    except (HeaderDataError, KeyError):
        raise InputError(f"{path}: found the unknown data type {int(header['datatype'])}") from None
    offset = float(header["vox_offset"])
    if not (np.isfinite(offset) and 0 <= offset < 2**30):
        raise InputError(f"{path}: found the data offset {offset:g}, needs a number of bytes")
    return max(int(offset), len(header.binaryblock) + 4) + check_size(dims, path) * itemsize


def _parse(head: bytes, path: Path) -> nib.Nifti1Header:
    for size, kind in ((348, nib.Nifti1Header), (540, nib.Nifti2Header)):
        for order, endianness in (("little", "<"), ("big", ">")):
            if len(head) >= size and int.from_bytes(head[:4], order) == size:
                return kind(head[:size], endianness=endianness, check=False)
    raise InputError(f"{path}: found no NIfTI header (wrong first bytes), needs a .nii or .nii.gz file")


# ---------------------------------------------------------------- files
# NIfTI files written whole or not at all.


def write_nifti(path: Path, image: nib.Nifti1Image) -> None:
    """A NIfTI file, compressed where its name says so; the same image gives the same bytes."""
    content = image.to_bytes()
    save_bytes(path, gzip.compress(content, compresslevel=6, mtime=0) if path.name.endswith(".gz") else content)
