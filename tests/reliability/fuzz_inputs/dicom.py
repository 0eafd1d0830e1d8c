"""Changed DICOM series: tags, slices, transfer syntaxes and bytes."""

import random
import shutil
from pathlib import Path

import pydicom
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from scripts.synthetic_ct import affine_of, phantom, write_dicom
from tests.reliability.fuzz_inputs.bench import Bench, Words
from tests.reliability.fuzz_inputs.changes import damaged, special_file

TAGS = (
    "InstanceNumber ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns SeriesInstanceUID Modality "
    "NumberOfFrames SamplesPerPixel ImageType RescaleSlope RescaleIntercept BitsAllocated BitsStored HighBit "
    "PixelRepresentation PhotometricInterpretation PixelData PatientName SpecificCharacterSet SliceThickness"
).split()
VALUES = [
    0,
    -1,
    1,
    2,
    65535,
    10**9,
    1e30,
    "",
    "abc",
    "nan",
    "inf",
    "-0",
    "1e400",
    [1, 0],
    [0] * 6,
    ["nan"] * 3,
    ["1"] * 7,
]
VALUES += [None, [1, 0, 0, 0, 1, 0], [2, 2], [0, 0], ["-3", "3"], "MR", "SEG", b"\xff", "ISO_IR 192", "RGB", [1e30] * 3]


def change_tag(rng: random.Random, ds: pydicom.Dataset) -> None:
    tag = rng.choice(TAGS)
    if rng.random() < 0.25:
        if tag in ds:
            delattr(ds, tag)
        return
    # written as text, for pydicom refuses some of the values
    value = rng.choice(VALUES)
    element = pydicom.DataElement(pydicom.datadict.tag_for_keyword(tag), "UN", b"")
    try:
        setattr(ds, tag, value)
        _ = ds[element.tag].value
    except Exception:
        element.value = str(value).encode()
        ds[element.tag] = element


def change_slices(rng: random.Random, folder: Path) -> None:
    """Remove, double, swap or mix slices of a series."""
    files = sorted(folder.iterdir())
    kind = rng.randrange(7)
    if kind == 0:
        for path in rng.sample(files, rng.choice([1, 2, len(files) - 1, len(files)])):
            path.unlink()
    elif kind == 1:
        shutil.copy(rng.choice(files), folder / "copy.dcm")
    elif kind == 2:
        write_dicom(folder / "x", phantom((16, 14, 3))[0], affine_of((16, 14, 3), (12.0, 14.0, 20.0)), name="other")
        for path in (folder / "x").iterdir():
            path.rename(folder / f"other-{path.name}")
        (folder / "x").rmdir()
    elif kind == 3:
        numbers = list(range(len(files)))
        rng.shuffle(numbers)
        for number, path in zip(numbers, files):
            ds = pydicom.dcmread(path)
            ds.InstanceNumber = number
            ds.save_as(path)
    elif kind == 4:
        (folder / rng.choice(["DICOMDIR", "notes.txt", "a.nii.gz", ".hidden.dcm"])).write_bytes(rng.randbytes(300))
    elif kind == 5:
        special_file(rng, rng.choice(files))
    else:
        ds = pydicom.dcmread(files[0])
        ds.ImagePositionPatient = [float(v) + rng.choice([0.01, 5, 1e9]) for v in ds.ImagePositionPatient]
        ds.save_as(files[0])


def change_syntax(rng: random.Random, path: Path) -> None:
    """Write a slice in another transfer syntax, or give it the name of one that its pixels do not have."""
    ds = pydicom.dcmread(path)
    other = [
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        ImplicitVRLittleEndian,
        JPEG2000Lossless,
        JPEGLSLossless,
    ]
    if rng.random() < 0.4:
        ds.compress(RLELossless)
    content = rng.random() < 0.5
    if content:
        ds.file_meta.TransferSyntaxUID = rng.choice([*other, RLELossless, "1.2.3", "1.2.840.10008.1.2.4.50"])
    try:
        ds.save_as(path, enforce_file_format=False)
    except Exception:
        # pydicom does not write some of the contradictions
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"))


def make(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
    """A DICOM series: tags, mixed, missing and doubled slices, transfer syntaxes, bytes; cached or predicted."""
    series = shutil.copytree(bench.series, folder / "in/series")
    files = sorted(series.iterdir())
    kind = number % 4
    chosen = files if rng.random() < 0.5 else rng.sample(files, rng.randrange(1, 3))
    if kind == 0:
        state = rng.getstate()
        for path in chosen:
            # the same change in all slices
            rng.setstate(state)
            ds = pydicom.dcmread(path)
            try:
                change_tag(rng, ds)
                ds.save_as(path)
            # pydicom does not write some of the values
            except Exception:
                path.write_bytes(damaged(rng, path.read_bytes()))
    elif kind == 1:
        change_slices(rng, series)
    elif kind == 2:
        for path in chosen:
            change_syntax(rng, path)
    else:
        for path in chosen:
            path.write_bytes(damaged(rng, path.read_bytes()))
    if rng.random() < 0.3:
        return ["predict", "--checkpoint", str(bench.folder / "finetuned/out"), "--images", "in", "--out", "out"]
    modality = rng.choice(["CT", "any"])
    return ["cache", "--datalist", rng.choice(["in", "in/series"]), "--cache_dir", "cache", "--modality", modality]
