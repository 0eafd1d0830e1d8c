"""One DICOM series in a folder: its files, and whether it is whole. Only headers are read; MONAI reads the pixels."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pydicom
from pydicom.misc import is_dicom

from common.data.geometry import check_size
from common.errors import InputError, one_line

TAGS = [
    "SeriesInstanceUID",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
]


def series_files(folder: Path) -> list[Path]:
    """The DICOM files that lie in `folder` itself, by name. Hidden files and other files are passed over."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and is_dicom_file(p))


def is_dicom_file(path: Path) -> bool:
    try:
        return path.is_file() and is_dicom(path)
    except OSError:
        return False


def check_series(folder: Path) -> list[Path]:
    """The files of the one series in `folder`, in the order of their slices.

    InputError when there is none or more than one, or a slice is missing, doubled, of another shape, or out of order.
    """
    headers = [(_header(path), path) for path in series_files(folder)]
    if not headers:
        raise InputError(f"{folder}: found no DICOM file, needs one series")
    series = {str(header.get("SeriesInstanceUID")) for header, _ in headers}
    if len(series) > 1:
        raise InputError(f"{folder}: found {len(series)} DICOM series, needs one per folder")
    if len(headers) < 2:
        raise InputError(f"{folder}: found one slice, needs a series")
    for header, path in headers:
        lacking = [tag for tag in TAGS[1:7] if header.get(tag) is None]
        if lacking or int(header.get("NumberOfFrames") or 1) != 1 or int(header.get("SamplesPerPixel") or 1) != 1:
            what = f"no {', '.join(lacking)}" if lacking else "several frames or colours"
            raise InputError(f"{path}: found {what}, needs a slice of a CT or MR series")
    for tag in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        values = {tuple(np.round(np.atleast_1d(np.asarray(h[tag].value, float)), 4).tolist()) for h, _ in headers}
        if len(values) > 1:
            raise InputError(f"{folder}: found slices that differ in {tag} ({sorted(values)[0]}, {sorted(values)[1]})")
    check_size((headers[0][0].Columns, headers[0][0].Rows, len(headers)), folder)
    headers.sort(key=lambda pair: int(pair[0].InstanceNumber))
    _check_positions(folder, [header for header, _ in headers])
    return [path for _, path in headers]


def _header(path: Path) -> pydicom.Dataset:
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
    except Exception as error:  # pydicom raises what struct, its parsers and the file system raise
        raise InputError(f"{path}: the DICOM header cannot be read ({one_line(error)})") from None


def _check_positions(folder: Path, headers: list[pydicom.Dataset]) -> None:
    """Slices in the order of their instance numbers must be evenly spaced along the normal of the first."""
    try:
        orientation = np.asarray(headers[0].ImageOrientationPatient, float)
        positions = np.stack([np.asarray(h.ImagePositionPatient, float) for h in headers])
    except ValueError as error:
        raise InputError(f"{folder}: found positions that are not numbers ({error})") from None
    if orientation.shape != (6,) or positions.shape[1:] != (3,) or not np.isfinite(positions).all():
        raise InputError(f"{folder}: found slices without a position in space, or one that is not finite")
    places = positions @ np.cross(orientation[:3], orientation[3:])
    ordered = np.sort(places)
    gaps = np.diff(ordered)
    usual = float(np.median(gaps))
    doubled = int((gaps < 0.01 * max(usual, 1e-6)).sum()) if usual > 0 else len(gaps)
    if doubled:
        raise InputError(
            f"{folder}: found {doubled} doubled slice(s) among {len(headers)}, each position may occur once"
        )
    if float(gaps.max()) > 1.5 * usual:
        lost = int(np.round(gaps / usual).sum()) - len(gaps)
        at = float(ordered[int(gaps.argmax())])
        gap = f"a gap of {gaps.max():.3g} mm after {at:.4g} mm, {usual:.3g} mm elsewhere"
        raise InputError(f"{folder}: {lost or 1} slice(s) missing, {gap}")
    if float(gaps.max() - gaps.min()) > 0.1 * usual:
        raise InputError(f"{folder}: found slices {gaps.min():.3g} to {gaps.max():.3g} mm apart, needs even spacing")
    steps = [b - a for a, b in pairwise(places.tolist())]
    if not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
        raise InputError(f"{folder}: the instance numbers do not follow the positions of the slices")
