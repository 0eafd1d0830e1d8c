"""Synthetic CT-like volumes with labels, for tests, benchmarks and the demo without a network."""

from collections.abc import Collection, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from common.data import nifti

# BTCV id -> name, centre, radii and HU. Lengths are in units of the half axes of the body (right, anterior) and of half
# the height of the volume (superior), with the signs of RAS. Places and sizes are roughly anatomical.
ORGANS = {
    6: ("liver", (0.42, 0.15, 0.25), (0.45, 0.55, 0.55), 105),
    1: ("spleen", (-0.62, -0.25, 0.35), (0.20, 0.28, 0.30), 115),
    7: ("stomach", (-0.35, 0.35, 0.30), (0.24, 0.28, 0.32), 45),
    2: ("right kidney", (0.38, -0.42, -0.25), (0.15, 0.20, 0.35), 160),
    3: ("left kidney", (-0.38, -0.42, -0.20), (0.15, 0.20, 0.35), 160),
    4: ("gallbladder", (0.35, 0.50, -0.10), (0.09, 0.12, 0.16), 12),
    11: ("pancreas", (-0.05, 0.12, -0.05), (0.28, 0.10, 0.12), 90),
    5: ("oesophagus", (-0.06, -0.20, 0.75), (0.06, 0.07, 0.30), 40),
    8: ("aorta", (-0.05, -0.33, 0.0), (0.07, 0.09, 2.0), 190),
    9: ("inferior vena cava", (0.12, -0.30, 0.0), (0.08, 0.09, 2.0), 130),
    10: ("portal and splenic vein", (0.10, 0.02, 0.15), (0.14, 0.06, 0.10), 150),
    12: ("right adrenal gland", (0.22, -0.35, 0.20), (0.06, 0.06, 0.10), 60),
    13: ("left adrenal gland", (-0.22, -0.35, 0.22), (0.06, 0.06, 0.10), 60),
}


def phantom(
    shape: Sequence[int], seed: int = 0, noise: float = 12.0, without: Collection[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Return HU (int16) and a label map with BTCV's ids (uint8), both (D, H, W) in RAS.

    The body has fat, muscle, a spine and 13 ellipsoids as organs.

    Args:
        seed: seed of the noise, and of sizes and places of the organs.
        noise: standard deviation of the noise in HU.
        without: ids of organs to leave out.
    """
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    # in units of the half axes of the body
    x, y, z = np.meshgrid(axes[0] / 0.86, axes[1] / 0.72, axes[2], indexing="ij", sparse=True)
    body = x**2 + y**2
    air, fat, muscle, bone = -1000, -90, 50, 350
    hu = np.full(shape, air, np.float32)
    hu[np.broadcast_to(body < 1, hu.shape)] = fat
    hu[np.broadcast_to(body < 0.85, hu.shape)] = muscle
    label = np.zeros(shape, np.uint8)
    for number, (_, centre, radii, value) in ORGANS.items():
        middle = np.add(centre, rng.uniform(-0.03, 0.03, 3))
        radius = np.multiply(radii, rng.uniform(0.9, 1.1, 3))
        inside = sum(((a - m) / r) ** 2 for a, m, r in zip((x, y, z), middle, radius)) < 1
        inside = inside & (body < 0.85) & (number not in without)
        hu[inside], label[inside] = value + rng.uniform(-8, 8), number
    spine = (x / 0.14) ** 2 + ((y + 0.62) / 0.16) ** 2 < 1
    hu[np.broadcast_to(spine, hu.shape)] = bone
    label[np.broadcast_to(spine, hu.shape)] = 0
    hu += noise * rng.standard_normal(shape, dtype=np.float32)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16), label


def affine_of(shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """Return an affine (4, 4) in RAS with the origin in the middle of the volume."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.multiply(np.subtract(shape, 1), spacing) / 2
    return affine


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a NIfTI file and the folder that it is in."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nifti.write_nifti(path, image)


def write_dicom(folder: Path, hu: np.ndarray, affine: np.ndarray, name: str = "synthetic") -> None:
    """Write `hu` (D, H, W; RAS, `affine` diagonal) as a DICOM series of axial CT slices, slice-000.dcm, ..."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = (generate_uid(entropy_srcs=[name, kind]) for kind in ("study", "series", "frame"))
    dx, dy, dz = (float(mm) for mm in np.diag(affine)[:3])
    # DICOM's axes point left and posterior, those of RAS right and anterior: the first pixel is the last voxel
    left, posterior = (-(affine[axis, 3] + (hu.shape[axis] - 1) * affine[axis, axis]) for axis in (0, 1))
    for k in range(hu.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[name, str(k)])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.PatientName, ds.PatientID, ds.Modality = name, name, "CT"
        ds.SeriesDescription = "synthetic, not a patient"
        ds.InstanceNumber = k + 1
        ds.ImagePositionPatient = [round(float(v), 6) for v in (left, posterior, affine[2, 3] + k * dz)]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = [dy, dx], dz
        pixels = (hu[::-1, ::-1, k].T.astype(np.int32) + 1024).astype(np.uint16)
        ds.Rows, ds.Columns = pixels.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = -1024, 1, "HU"
        ds.PixelData = np.ascontiguousarray(pixels).tobytes()
        ds.save_as(folder / f"slice-{k:03d}.dcm", enforce_file_format=True)
