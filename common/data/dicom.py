"""Reading of a DICOM series in a folder, after checks of its headers.

pydicom decodes the pixels slice by slice into one array. MONAI's PydicomReader holds the files, the decoded slices and
their stack in memory at once. Without a message, it also replaces the affine by the identity if a number in a header is
longer than the 16 characters that DICOM allows.
"""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.misc import is_dicom

from common.data.geometry import check_size
from common.errors import InputError, one_line

# tag -> how many numbers it holds
REQUIRED = {
    "InstanceNumber": 1,
    "ImagePositionPatient": 3,
    "ImageOrientationPatient": 6,
    "PixelSpacing": 2,
    "Rows": 1,
    "Columns": 1,
}
# modalities without an image to train on
NOT_IMAGES = {
    "RTSTRUCT": "contours",
    "SEG": "a segmentation",
    "RTDOSE": "a dose distribution",
    "RTPLAN": "a treatment plan",
    "SR": "a structured report",
    "PR": "a presentation state",
    "KO": "a selection of images",
    "REG": "a registration",
}
EQUAL = ["Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"]
TAGS = [*REQUIRED, "SeriesInstanceUID", "NumberOfFrames", "SamplesPerPixel", "Modality", "ImageType"]


def series_files(folder: Path) -> list[Path]:
    """Return the DICOM files directly in `folder`, sorted by name, without hidden files."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and is_dicom_file(p))


def is_dicom_file(path: Path) -> bool:
    """Return whether `path` is a file with the prefix of DICOM."""
    try:
        return path.is_file() and is_dicom(path)
    except OSError:
        return False


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the one series in `folder` as (columns, rows, slices) float32, its affine (4, 4) in RAS, and its modality.

    Raises:
        InputError: as `check_series`, or the pixels cannot be decoded.
    """
    headers = check_series(folder)
    volume = np.empty((len(headers), headers[0].Rows, headers[0].Columns), np.float32)
    try:
        for target, header in zip(volume, headers):
            slice_ = pydicom.dcmread(header.filename)
            pixels = slice_.pixel_array.astype(np.float32)
            target[:] = pixels * slice_.get("RescaleSlope", 1) + slice_.get("RescaleIntercept", 0)
    # pydicom's decoders raise whatever their libraries raise
    except Exception as error:
        raise InputError(f"{folder}: the DICOM series cannot be decoded ({one_line(error)})") from None
    return volume.T, _affine(headers), str(headers[0].get("Modality") or "unknown")


def _affine(headers: list[pydicom.Dataset]) -> np.ndarray:
    """Return the affine (4, 4): (column, row, slice) -> mm in RAS. DICOM's own axes are LPS."""
    first, last = (np.asarray(header.ImagePositionPatient, float) for header in (headers[0], headers[-1]))
    orientation = np.asarray(headers[0].ImageOrientationPatient, float)
    between_rows, between_columns = map(float, headers[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * between_columns
    affine[:3, 1] = orientation[3:] * between_rows
    affine[:3, 2] = (last - first) / (len(headers) - 1)
    affine[:3, 3] = first
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def check_series(folder: Path) -> list[pydicom.FileDataset]:
    """Return the headers of the one series in `folder`, in the order of their slices.

    Raises:
        InputError: there is no series or more than one; a file is not an image, is a localizer, or has several frames;
            or a slice is missing, occurs twice, differs from the others in shape or orientation, or is out of order.
    """
    headers = [_header(path) for path in series_files(folder)]
    if not headers:
        raise InputError(f"{folder}: found no DICOM file, expected one series")
    for header in headers:
        _check_kind(header)
    series = {str(header.get("SeriesInstanceUID")) for header in headers}
    if len(series) > 1:
        raise InputError(f"{folder}: found {len(series)} DICOM series, expected one per folder")
    if len(headers) < 2:
        raise InputError(f"{folder}: found one slice, expected a series")
    for header in headers:
        _check_slice(header)
    _check_equal(headers, folder)
    check_size((headers[0].Columns, headers[0].Rows, len(headers)), folder)
    headers.sort(key=lambda header: int(header.InstanceNumber))
    _check_positions(folder, headers)
    return headers


def _header(path: Path) -> pydicom.FileDataset:
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
        # decodes the values, which pydicom otherwise does when they are used
        for _ in header:
            pass
        return header
    # pydicom raises what struct, its parsers and the file system raise
    except Exception as error:
        raise InputError(f"{path}: the DICOM header cannot be read ({one_line(error)})") from None


def _check_kind(header: pydicom.FileDataset) -> None:
    path, modality, frames = header.filename, str(header.get("Modality")), header.get("NumberOfFrames") or 1
    if modality in NOT_IMAGES:
        raise InputError(f"{path}: found {NOT_IMAGES[modality]} (modality {modality}), expected a series of images")
    if "LOCALIZER" in (header.get("ImageType") or ()):
        raise InputError(f"{path}: found a localizer, expected a slice of a CT or MR series")
    if frames != 1:
        found = f"{frames} frames in one file (enhanced or multi-frame DICOM)"
        raise InputError(f"{path}: found {found}, expected one file per slice; convert it to NIfTI first")


def _check_slice(header: pydicom.FileDataset) -> None:
    absent = [tag for tag in REQUIRED if header.get(tag) is None]
    if absent:
        raise InputError(f"{header.filename}: found no {', '.join(absent)}, expected a slice of a CT or MR series")
    if (header.get("SamplesPerPixel") or 1) != 1:
        raise InputError(f"{header.filename}: found a colour image, expected a slice of a CT or MR series")
    for tag, count in REQUIRED.items():
        try:
            numbers = np.atleast_1d(np.asarray(header[tag].value, float))
        except (ValueError, TypeError):
            numbers = np.empty(0)
        if numbers.shape != (count,) or not np.isfinite(numbers).all():
            value = one_line(str(header[tag].value), 80)
            raise InputError(f"{header.filename}: found the {tag} {value}, expected {count} finite number(s)")
    if min(header.Rows, header.Columns) < 1:
        raise InputError(
            f"{header.filename}: found {header.Rows} rows and {header.Columns} columns, expected at least 1"
        )


def _check_equal(headers: list[pydicom.Dataset], folder: Path) -> None:
    for tag in EQUAL:
        values = {tuple(np.round(np.atleast_1d(np.asarray(h[tag].value, float)), 4).tolist()) for h in headers}
        if len(values) > 1:
            raise InputError(f"{folder}: found slices that differ in {tag} ({sorted(values)[0]}, {sorted(values)[1]})")


def _check_positions(folder: Path, headers: list[pydicom.Dataset]) -> None:
    """Check that slices in the order of their instance numbers are evenly spaced along the normal of the first."""
    normal = np.cross(*np.asarray(headers[0].ImageOrientationPatient, float).reshape(2, 3))
    places = np.stack([np.asarray(header.ImagePositionPatient, float) for header in headers]) @ normal
    ordered = np.sort(places)
    gaps = np.diff(ordered)
    usual = float(np.median(gaps))
    doubled = int((gaps < 0.01 * max(usual, 1e-6)).sum()) if usual > 0 else len(gaps)
    if doubled:
        raise InputError(f"{folder}: found {doubled} doubled slice(s) among {len(headers)}, expected each once")
    if float(gaps.max()) > 1.5 * usual:
        missing = int(np.round(gaps / usual).sum()) - len(gaps)
        at = float(ordered[int(gaps.argmax())])
        gap = f"a gap of {gaps.max():.3g} mm after {at:.4g} mm, {usual:.3g} mm elsewhere"
        raise InputError(f"{folder}: {missing or 1} slice(s) missing, {gap}")
    if float(gaps.max() - gaps.min()) > 0.1 * usual:
        raise InputError(f"{folder}: found slices {gaps.min():.3g} to {gaps.max():.3g} mm apart, expected even spacing")
    steps = np.diff(places)
    if not ((steps > 0).all() or (steps < 0).all()):
        raise InputError(f"{folder}: the instance numbers do not follow the positions of the slices")
