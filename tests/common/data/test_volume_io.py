"""Reading and preprocessing: orientation, labels on the image's grid, windows, foreground boxes."""

import gzip
import os

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.data import PydicomReader
from monai.transforms import LoadImage, Orientation

from common.data.preprocessing import Preprocessing
from common.data.volume_io import read_image, read_label
from common.errors import InputError
from common.files import file_sha256
from scripts.synthetic_ct import affine_of, phantom, write_dicom
from tests.common.made import SHAPE, SPACING, labelled, nifti


def test_every_orientation_is_read_as_ras(tmp_path):
    hu, _ = phantom(SHAPE)
    affine = affine_of(SHAPE, SPACING)
    ras = nib.Nifti1Image(hu, affine)
    for axes in ("RAS", "LPS", "PIR", "SLA"):
        turned = ras.as_reoriented(
            nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
        )
        nib.save(turned, tmp_path / f"{axes}.nii.gz")
        image = read_image(tmp_path / f"{axes}.nii.gz")
        np.testing.assert_array_equal(image.numpy()[0], hu)
        np.testing.assert_allclose(image.affine.numpy(), affine)


def test_a_dicom_series_is_the_nifti_it_was_made_from(tmp_path):
    hu, label = phantom(SHAPE)
    affine = affine_of(SHAPE, SPACING)
    write_dicom(tmp_path / "series", hu, affine)
    image = read_image(tmp_path / "series")
    np.testing.assert_array_equal(image.numpy()[0], hu)
    np.testing.assert_allclose(image.affine.numpy(), affine, atol=1e-4)
    flipped = nib.Nifti1Image(label, affine).as_reoriented(np.array([[0, -1], [2, 1], [1, -1]]))
    nib.save(flipped, tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(read_label(tmp_path / "label.nii.gz", image).numpy()[0], label)


@pytest.mark.parametrize(
    "angle, slope, intercept", [(0.0, "1", "-1024"), (0.25, "0.73", "-1000.3"), (0.25, None, None)]
)
def test_a_dicom_series_is_read_as_by_monai(tmp_path, angle, slope, intercept):
    write_dicom(tmp_path, phantom(SHAPE)[0][:, :, :7], affine_of(SHAPE, SPACING))
    axes = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0]]).round(8)
    for path in tmp_path.iterdir():
        ds = pydicom.dcmread(path)
        ds.ImageOrientationPatient = axes.ravel().tolist()
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
        if slope is None:
            del ds.RescaleSlope, ds.RescaleIntercept
        ds.save_as(path)
    image = read_image(tmp_path)
    wanted = Orientation("RAS", labels=None)(LoadImage(PydicomReader, ensure_channel_first=True)(tmp_path))
    np.testing.assert_array_equal(image.numpy(), wanted.numpy().astype(np.float32))
    np.testing.assert_allclose(image.affine.numpy(), wanted.affine.numpy(), atol=1e-6)


def test_long_numbers_in_a_dicom_header_are_read(tmp_path):
    """MONAI's reader returns an affine of 1 mm for such a series."""
    affine = affine_of(SHAPE, SPACING)
    write_dicom(tmp_path, phantom(SHAPE)[0][:, :, :5], affine)
    for path in tmp_path.iterdir():
        ds = pydicom.dcmread(path)
        ds.PixelSpacing = ["7.000000000000000001", "6.000000000000000001"]
        ds.save_as(path)
    np.testing.assert_allclose(read_image(tmp_path).affine.numpy()[:3, :3], affine[:3, :3], atol=1e-4)


def test_channels_last_become_channels_first(tmp_path):
    array = np.random.default_rng(0).normal(size=(*SHAPE, 4)).astype(np.float32)
    image = read_image(nifti(tmp_path / "m.nii.gz", array), channels=4)
    np.testing.assert_array_equal(image.numpy(), np.moveaxis(array, 3, 0))
    with pytest.raises(InputError, match="4D data of shape .* expected a 3D volume"):
        read_image(tmp_path / "m.nii.gz")
    with pytest.raises(InputError, match="expected 4D with 2 channels last"):
        read_image(tmp_path / "m.nii.gz", channels=2)


def test_window_maps_hu_linearly_and_clips(tmp_path):
    image = read_image(nifti(tmp_path / "a.nii.gz"))
    out, _ = Preprocessing(low=-175, high=250, foreground_threshold=None).apply(image)
    wanted = ((image.as_tensor() + 175) / 425).clamp(0, 1)
    torch.testing.assert_close(out.as_tensor(), wanted)


def test_percentiles_and_zscore_are_per_case_and_channel(tmp_path):
    array = np.abs(np.random.default_rng(0).normal(size=(*SHAPE, 2)).astype(np.float32)) * [10, 5000]
    array[:5] = 0
    image = read_image(nifti(tmp_path / "m.nii.gz", array.astype(np.float32)), channels=2)
    settings = {"channels": 2, "foreground_threshold": None}
    out, _ = Preprocessing(intensity="percentiles", low=1, high=99, **settings).apply(image)
    assert out.min() == 0 and out.max() == 1
    assert 0.005 < (out[1] == 1).float().mean() < 0.015
    out, _ = Preprocessing(intensity="zscore", **settings).apply(image)
    for channel, source in zip(out.as_tensor(), image.as_tensor()):
        inside = channel[source != 0]
        assert abs(inside.mean()) < 1e-4 and abs(inside.std() - 1) < 1e-3
        assert (channel[source == 0] == 0).all()


def test_the_foreground_box_is_that_of_the_image(tmp_path):
    hu = np.full(SHAPE, -1000, np.int16)
    hu[10:20, 12:25, 5:9] = 40
    label = np.zeros(SHAPE, np.uint8)
    # outside the box, where a crop by the label would keep it
    label[0, 0, 0] = 1
    image = read_image(nifti(tmp_path / "a.nii.gz", hu))
    target = read_label(nifti(tmp_path / "l.nii.gz", label), image)
    out, cut = Preprocessing(margin=3).apply(image, target)
    assert out.shape == cut.shape == (1, 16, 19, 10)
    assert not cut.any()
    origin = image.affine @ torch.tensor([7.0, 9.0, 2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(out.affine[:, 3], origin)
    assert Preprocessing(margin=100).apply(image)[0].shape == image.shape


def test_resampling_keeps_places(tmp_path):
    image_file, label_file = labelled(tmp_path)
    image = read_image(image_file)
    label = read_label(label_file, image)
    out, moved = Preprocessing(spacing=(4.0, 4.0, 4.0), foreground_threshold=None).apply(image, label)
    assert out.shape == moved.shape and torch.allclose(out.pixdim, torch.tensor(4.0, dtype=torch.float64))

    def centre(mask, affine):
        voxel = torch.nonzero(mask[0]).double().mean(0)
        return affine[:3, :3] @ voxel + affine[:3, 3]

    for number in (1, 6):
        before = centre(label.as_tensor() == number, label.affine)
        after = centre(moved.as_tensor() == number, moved.affine)
        # mm
        assert (before - after).norm() < 2
    assert set(moved.unique().tolist()) <= set(label.unique().tolist())


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p, d: p.unlink(), "no such file"),
        (lambda p, d: p.write_bytes(b""), "0 bytes"),
        (lambda p, d: p.write_bytes(d[: len(d) // 2]), "ended before"),
        (lambda p, d: p.write_bytes(d[:-6]), "ended before"),
        (lambda p, d: p.write_bytes(d[:3000] + bytes(64) + d[3064:]), "damaged.*(CRC|decompressing)"),
        (lambda p, d: p.write_bytes(b"<html>404</html>" * 100), "Not a gzipped file"),
        (lambda p, d: p.write_bytes(gzip.compress(b"RIFF" * 5000)), "no NIfTI header"),
        (lambda p, d: p.write_bytes(gzip.compress(gzip.decompress(d)[:-9])), "Expected .* bytes, got"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage, message):
    path = nifti(tmp_path / "bad.nii.gz")
    damage(path, path.read_bytes())
    with pytest.raises(InputError, match=message) as error:
        read_image(path)
    assert "bad.nii.gz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((30, 30), np.int16), "2D"),
        (np.zeros((30, 30, 1), np.int16), "one slice"),
        (np.ones((9, 9, 9, 3), np.int16), "4D"),
        (np.full(SHAPE, np.nan, np.float32), "NaN"),
        (np.full(SHAPE, 7, np.int16), "only the value 7"),
    ],
)
def test_an_array_that_is_no_volume_is_refused(tmp_path, array, message):
    with pytest.raises(InputError, match=message):
        read_image(nifti(tmp_path / "bad.nii.gz", array))


def test_a_label_that_does_not_fit_is_refused(tmp_path):
    image_file, label_file = labelled(tmp_path)
    image, label = read_image(image_file), np.asarray(nib.load(label_file).dataobj)
    shifted = affine_of(SHAPE, SPACING)
    shifted[0, 3] += 12
    for array, affine, message in [
        (label[:-1], None, "shape"),
        (label, shifted, "12 mm off its image"),
        (label + np.float32(0.5) * (label > 0), None, "expected whole numbers"),
        (label.astype(np.int16) - 1, None, "-1.."),
        (label.astype(np.int16) * 100, None, "expected 0..255"),
    ]:
        with pytest.raises(InputError, match=message):
            read_label(nifti(tmp_path / "l.nii.gz", array, affine), image)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda hu: hu / 1000, "scaled already"),
        (lambda hu: hu * 1000.0, "expected HU: scanners store"),
        (lambda hu: hu + 1024.0 + 24, "rescale offset"),
        (lambda hu: np.where(hu > -500, 5000, 4000), "hardly any"),
    ],
)
def test_intensities_that_cannot_be_hu_are_refused(tmp_path, change, message):
    image = read_image(nifti(tmp_path / "a.nii.gz", change(phantom(SHAPE)[0]).astype(np.float32)))
    with pytest.raises(InputError, match=message):
        Preprocessing().apply(image)


def test_a_scan_of_air_has_no_foreground(tmp_path):
    air = np.random.default_rng(0).integers(-1024, -950, SHAPE).astype(np.int16)
    with pytest.raises(InputError, match="a.nii.gz: found no voxel above 0.05"):
        Preprocessing().apply(read_image(nifti(tmp_path / "a.nii.gz", air)))


def test_invalid_settings_are_refused():
    for settings in (
        {"low": 5, "high": 5},
        {"intensity": "percentiles", "low": 1, "high": 101},
        {"spacing": (0, 1, 1)},
    ):
        with pytest.raises(InputError, match="found"):
            Preprocessing(**settings)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = nifti(tmp_path / "a.nii.gz")
    path.chmod(0)
    with pytest.raises(InputError, match="cannot be read"):
        read_image(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}.*a pipe or a device"):
        read_image(tmp_path / name)
    with pytest.raises(OSError, match="a pipe or a device"):
        file_sha256(tmp_path / name)


def test_a_label_with_infinity_is_refused(tmp_path):
    image, label = labelled(tmp_path)
    values = np.asarray(nib.load(label).dataobj, np.float32)
    values[0, 0, 0] = np.inf
    nifti(label, values)
    with pytest.raises(InputError, match="a_label.*inf"):
        read_label(label, read_image(image))


def test_a_header_that_asks_for_too_much_memory_is_refused(tmp_path, monkeypatch):
    def full(_):
        raise MemoryError

    path = nifti(tmp_path / "a.nii.gz")
    monkeypatch.setattr("common.data.nifti.np.asanyarray", full)
    with pytest.raises(InputError, match=r"a\.nii.*memory"):
        read_image(path)


def test_a_spacing_that_makes_a_volume_too_large_is_refused(tmp_path):
    image = read_image(nifti(tmp_path / "a.nii.gz"))
    with pytest.raises(InputError, match="a.nii.gz at a spacing of 0.001.*voxels"):
        Preprocessing(spacing=(0.001,) * 3).apply(image)


@pytest.mark.parametrize(
    "tag, value",
    [("Rows", [16, 16]), ("PixelSpacing", [2]), ("ImagePositionPatient", [0, 0]), ("InstanceNumber", None)],
)
def test_a_dicom_tag_with_other_numbers_is_named(tmp_path, tag, value):
    write_dicom(tmp_path, phantom(SHAPE)[0][:, :, :3], affine_of(SHAPE, SPACING))
    for path in tmp_path.iterdir():
        ds = pydicom.dcmread(path)
        setattr(ds, tag, value)
        ds.save_as(path)
    with pytest.raises(InputError, match=f"slice-000.*{tag}"):
        read_image(tmp_path)


def test_an_unknown_type_in_a_dicom_header_is_refused(tmp_path):
    write_dicom(tmp_path, phantom(SHAPE)[0][:, :, :3], affine_of(SHAPE, SPACING))
    path = tmp_path / "slice-000.dcm"
    path.write_bytes(path.read_bytes().replace(b"\x28\0\x10\0US", b"\x28\0\x10\0U\x15"))
    with pytest.raises(InputError, match="slice-000.*header"):
        read_image(tmp_path)
