"""A bad file stops no run and is never used: 300 malformed files of all kinds, each with its reason."""

import gzip
import json
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom

from common.cache import build
from common.data.datalist import Case, read_cases
from common.data.preprocessing import Preprocessing
from scripts.synthetic_ct import affine_of, phantom, write_dicom
from tests.common.made import SHAPE, SPACING, nifti

HU, LABEL = phantom(SHAPE)
AFFINE = affine_of(SHAPE, SPACING)


def _header(path: Path, change) -> Path:
    """Write a good file and change bytes of its header."""
    nifti(path, HU)
    data = bytearray(gzip.decompress(path.read_bytes()))
    change(data)
    path.write_bytes(gzip.compress(bytes(data), 1))
    return path


def _floats(offset, *values):
    def change(data):
        data[offset : offset + 4 * len(values)] = np.asarray(values, "<f4").tobytes()

    return change


def _truncated(path, rng):
    data = nifti(path, HU).read_bytes()
    path.write_bytes(data[: int(rng.integers(20, len(data) - 1))])


def _flipped(path, rng):
    data = bytearray(nifti(path, HU).read_bytes())
    for at in rng.integers(200, len(data) - 8, 20):
        data[at] ^= 0xFF
    path.write_bytes(data)


def _magic(path, rng):
    _header(path, lambda d: d.__setitem__(slice(344, 348), rng.bytes(4)))


def _garbage(path, rng):
    path.write_bytes(rng.bytes(int(rng.integers(1, 3000))))


def _zipped_garbage(path, rng):
    path.write_bytes(gzip.compress(rng.bytes(int(rng.integers(0, 3000)))))


def _zero_bytes(path, rng):
    path.write_bytes(b"")


def _two_d(path, rng):
    nifti(path, HU[:, :, int(rng.integers(SHAPE[2]))])


def _four_d(path, rng):
    nifti(path, np.stack([HU] * int(rng.integers(2, 5)), 3))


def _one_slice(path, rng):
    axis = int(rng.integers(3))
    nifti(path, np.take(HU, [int(rng.integers(30))], axis))


def _not_finite(path, rng):
    array = HU.astype(np.float32)
    array.reshape(-1)[rng.integers(0, array.size, int(rng.integers(1, 50)))] = rng.choice([np.nan, np.inf, -np.inf])
    nifti(path, array)


def _one_value(path, rng):
    nifti(path, np.full(SHAPE, rng.integers(-1000, 1000), np.int16))


def _spacing(path, rng):
    _header(path, _floats(80 + 4 * int(rng.integers(3)), rng.choice([0.0, -1.0, np.nan, 1000.0, 1e-4, np.inf])))


def _sheared(path, rng):
    affine = AFFINE.copy()
    affine[0, 1] = rng.uniform(1, 4)
    nifti(path, HU, affine)


def _singular(path, rng):
    row = int(rng.integers(3))
    _header(path, _floats(280 + 16 * row, 0, 0, 0, 0))


def _nan_affine(path, rng):
    _header(path, _floats(280 + 4 * int(rng.integers(12)), np.nan))


def _no_hu(path, rng):
    made = [HU / 1000, HU.astype(np.float32) * 1000, np.where(HU > -500, 5000, 4000), HU + 1100]
    nifti(path, made[int(rng.integers(len(made)))].astype(np.float32))


def _too_large(path, rng):
    _header(path, lambda d: d.__setitem__(slice(42, 48), np.asarray([30000, 30000, 30000], "<i2").tobytes()))


def _unknown_type(path, rng):
    _header(path, lambda d: d.__setitem__(slice(70, 72), np.asarray([int(rng.integers(3000, 9000))], "<i2").tobytes()))


def _air(path, rng):
    nifti(path, rng.integers(-1024, -960, SHAPE).astype(np.int16))


KINDS = {
    _truncated: "ended before|Not a gzipped|no NIfTI header",
    _flipped: "damaged",
    _magic: "no NIfTI header|without voxels",
    _garbage: "Not a gzipped|ended before",
    _zipped_garbage: "no NIfTI header",
    _zero_bytes: "0 bytes",
    _two_d: "2D",
    _four_d: "4D",
    _one_slice: "one slice",
    _not_finite: "NaN or infinite",
    _one_value: "only the value",
    _spacing: "spacing",
    _sheared: "sheared",
    _singular: "spacing|singular",
    _nan_affine: "not finite",
    _no_hu: "HU",
    _too_large: "at most 1073741824",
    _unknown_type: "data code",
    _air: "foreground|expected HU",
}


def test_300_malformed_files_are_reported_and_not_used(tmp_path):
    rng = np.random.default_rng(0)
    cases, patterns = [], {}
    for number in range(304):
        make, pattern = list(KINDS.items())[number % len(KINDS)]
        path = tmp_path / f"{number:03d}{make.__name__}.nii.gz"
        make(path, rng)
        cases.append(Case(path.name, path))
        patterns[path.name] = pattern
    good = Case("good", nifti(tmp_path / "good.nii.gz", HU))
    cases.insert(150, good)
    result = build.build_missing(cases, Preprocessing(), tmp_path / "cache")
    assert [volume.name for volume in result.volumes] == ["good"]
    assert len(result.failures) == 304
    for failure in result.failures:
        assert re.search(patterns[failure.case.name], failure.reason), failure
        assert failure.case.name in failure.reason and "\n" not in failure.reason
        # a check refused it, not an unforeseen error of a library
        assert failure.lasting, failure


def _bad_labels(folder):
    image = nifti(folder / "image.nii.gz", HU)
    shifted = AFFINE.copy()
    shifted[1, 3] -= 20
    yield "shape", Case("shape", image, nifti(folder / "shape.nii.gz", LABEL[1:]))
    yield "off its image", Case("grid", image, nifti(folder / "grid.nii.gz", LABEL, shifted))
    yield "expected whole numbers", Case("half", image, nifti(folder / "half.nii.gz", LABEL * np.float32(0.5)))
    yield "0..255", Case("minus", image, nifti(folder / "minus.nii.gz", LABEL.astype(np.int16) - 3))
    yield "no such file", Case("absent", image, folder / "absent.nii.gz")


def _slices(folder: Path) -> list[Path]:
    write_dicom(folder, HU[:, :, :8], AFFINE)
    return sorted(folder.iterdir())


def _change(path: Path, **tags) -> None:
    ds = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.save_as(path)


def _bad_series(folder):
    slices = _slices(folder / "missing")
    slices[4].unlink()
    yield "1 slice\\(s\\) missing", folder / "missing"
    slices = _slices(folder / "doubled")
    (folder / "doubled/copy.dcm").write_bytes(slices[2].read_bytes())
    yield "doubled", folder / "doubled"
    for path in _slices(folder / "single")[1:]:
        path.unlink()
    yield "one slice", folder / "single"
    slices = _slices(folder / "two")
    _change(slices[0], SeriesInstanceUID="1.2.3")
    yield "2 DICOM series", folder / "two"
    slices = _slices(folder / "cut")
    slices[3].write_bytes(slices[3].read_bytes()[:1500])
    yield "decoded|header cannot be read", folder / "cut"
    slices = _slices(folder / "turned")
    _change(slices[3], ImageOrientationPatient=[0, 1, 0, 1, 0, 0])
    yield "differ in ImageOrientationPatient", folder / "turned"
    slices = _slices(folder / "nowhere")
    _change(slices[3], ImagePositionPatient=None)
    yield "no ImagePositionPatient", folder / "nowhere"
    slices = _slices(folder / "shuffled")
    _change(slices[0], InstanceNumber=5)
    _change(slices[4], InstanceNumber=1)
    yield "do not follow", folder / "shuffled"
    slices = _slices(folder / "frames")
    _change(slices[0], NumberOfFrames=275)
    yield "slice-000.dcm: found 275 frames in one file", folder / "frames"
    for modality, pattern in {"RTSTRUCT": "contours", "SEG": "a segmentation", "SR": "a structured report"}.items():
        for path in _slices(folder / modality)[1:]:
            path.unlink()
        _change(path.with_name("slice-000.dcm"), Modality=modality)
        yield f"found {pattern} \\(modality {modality}\\)", folder / modality
    for path in _slices(folder / "scout"):
        _change(path, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    yield "found a localizer", folder / "scout"
    for path in _slices(folder / "mr"):
        _change(path, Modality="MR")
    yield "found modality MR, expected CT.*--modality any", folder / "mr"
    for path in _slices(folder / "pet"):
        _change(path, Modality="PT")
    yield "found modality PT, expected CT", folder / "pet"
    (folder / "empty").mkdir()
    yield "no DICOM file", folder / "empty"


def _bad_paths(folder):
    (folder / "loop.nii.gz").symlink_to(folder / "loop.nii.gz")
    yield "cannot be read", Case("loop", folder / "loop.nii.gz")
    yield "no such file", Case("missing", folder / "missing.nii.gz")
    (folder / "list.txt").write_text("a.nii.gz\na.nii.gz\n")
    yield "twice", read_cases(folder / "list.txt")[1]
    # root may read everything
    if os.geteuid() != 0:
        nifti(folder / "secret.nii.gz", HU).chmod(0)
        yield "cannot be read", Case("secret", folder / "secret.nii.gz")


def test_labels_series_and_paths_that_cannot_be_used(tmp_path):
    bad = [*_bad_labels(tmp_path), *_bad_paths(tmp_path)]
    bad += [(pattern, Case(folder.name, folder)) for pattern, folder in _bad_series(tmp_path)]
    result = build.build_missing([case for _, case in bad], Preprocessing(), tmp_path / "cache")
    assert not result.volumes
    for (pattern, case), failure in zip(bad, result.failures):
        assert failure.case is case
        assert re.search(pattern, failure.reason), failure


def test_a_modality_is_accepted_if_asked_for(tmp_path):
    for path in _slices(tmp_path / "mr"):
        _change(path, Modality="MR")
    case = Case("mr", tmp_path / "mr")
    assert "modality MR" in build.build_missing([case], Preprocessing(), tmp_path / "cache").failures[0].reason
    anything = build.build_missing([case], Preprocessing(modality="any"), tmp_path / "cache")
    zscore = build.build_missing([case], Preprocessing(intensity="zscore"), tmp_path / "cache")
    assert anything.built == zscore.built == 1
    assert "modality MR" in build.build_missing([case], Preprocessing(), tmp_path / "cache").failures[0].reason


def test_the_modality_is_in_the_key_only_if_it_matters():
    assert "modality" not in Preprocessing().key() | Preprocessing(intensity="zscore", modality="any").key()
    assert Preprocessing(modality="any").key() == Preprocessing().key() | {"modality": "any"}


def test_the_same_voxels_under_two_names_are_used_once(tmp_path):
    cases = [Case(name, nifti(tmp_path / f"{name}.nii.gz", HU)) for name in "ab"]
    cases.append(Case("c", nifti(tmp_path / "c.nii", HU[:, ::-1], np.diag([6.0, -7.0, 8.0, 1.0]))))
    result = build.build_missing(cases, Preprocessing(), tmp_path / "cache", unique=True)
    assert [volume.name for volume in result.volumes] == ["a"]
    assert all("same voxels as in" in failure.reason for failure in result.failures)


def test_a_bad_file_is_read_again_only_if_it_changed(tmp_path, monkeypatch):
    case = Case("x", nifti(tmp_path / "x.nii.gz", np.ones(SHAPE, np.int16)))
    first = build.build_missing([case], Preprocessing(), tmp_path / "cache")
    with monkeypatch.context() as patch:
        # would be called to read the file again
        patch.setattr(build, "read_image", None)
        again = build.build_missing([case], Preprocessing(), tmp_path / "cache")
    assert again.failures[0].reason == first.failures[0].reason
    record = json.loads((tmp_path / "cache/failures.jsonl").read_text())
    assert record["name"] == "x" and "only the value" in record["reason"]
    nifti(case.image, HU)
    assert build.build_missing([case], Preprocessing(), tmp_path / "cache").built == 1


def test_a_file_without_permission_is_tried_again(tmp_path, monkeypatch):
    case = Case("x", nifti(tmp_path / "x.nii.gz", HU))

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    # simulated, because root may read everything
    with monkeypatch.context() as patch:
        patch.setattr(build.hashing, "file_hash", denied)
        (failure,) = build.build_missing([case], Preprocessing(), tmp_path / "cache").failures
    assert "x.nii.gz: cannot be read (Permission denied)" in failure.reason
    assert build.build_missing([case], Preprocessing(), tmp_path / "cache").built == 1


def test_a_missing_file_is_tried_again(tmp_path):
    case = Case("x", tmp_path / "x.nii.gz")
    assert "no such file" in build.build_missing([case], Preprocessing(), tmp_path / "cache").failures[0].reason
    nib.save(nib.Nifti1Image(HU, AFFINE), case.image)
    assert build.build_missing([case], Preprocessing(), tmp_path / "cache").built == 1
