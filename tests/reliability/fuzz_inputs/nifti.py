"""Changed NIfTI files: header fields, affines, extensions, voxels and gzip streams."""

import gzip
import random
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from scripts.synthetic_ct import affine_of, phantom
from tests.reliability.fuzz_inputs.bench import SHAPE, SPACING, Bench, Words
from tests.reliability.fuzz_inputs.changes import damaged, special_file

# name -> offset and struct format of a field of the header
FIELDS = {
    "sizeof_hdr": (0, "i"), "dim0": (40, "h"), "dim1": (42, "h"), "dim2": (44, "h"), "dim3": (46, "h"),
    "dim4": (48, "h"), "dim5": (50, "h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim0": (76, "f"),
    "pixdim1": (80, "f"), "pixdim2": (84, "f"), "pixdim3": (88, "f"), "pixdim4": (92, "f"), "vox_offset": (108, "f"),
    "scl_slope": (112, "f"), "scl_inter": (116, "f"), "xyzt_units": (123, "b"), "qform_code": (252, "h"),
    "sform_code": (254, "h"), "quatern_b": (256, "f"), "quatern_c": (260, "f"), "quatern_d": (264, "f"),
    "qoffset_x": (268, "f"), "srow_x0": (280, "f"), "srow_x1": (284, "f"), "srow_x3": (292, "f"),
    "srow_y1": (300, "f"), "srow_z2": (320, "f"), "magic": (344, "i"), "extension": (348, "i"), "esize": (352, "i"),
}  # fmt: skip
INTEGERS = {"b": [0, -1, 1, 2, 127, -128], "h": [0, -1, 1, 2, 3, 8, 32, 64, 128, 255, 512, 1024, 1536, 32767, -32768]}
INTEGERS["i"] = [*INTEGERS["h"], 2**31 - 1, -(2**31), 348, 540, 352]
FLOATS = [
    0.0,
    -1.0,
    1e-30,
    1e30,
    float("nan"),
    float("inf"),
    float("-inf"),
    352.0,
    353.0,
    347.0,
    1e9,
    0.5,
    49.0,
    3.4e38,
]


def header_fields(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(list(FIELDS))
        offset, kind = FIELDS[name]
        struct.pack_into(f"<{kind}", changed, offset, rng.choice(FLOATS if kind == "f" else INTEGERS[kind]))
    return bytes(changed)


def other_affine(rng: random.Random) -> np.ndarray:
    affine = affine_of(SHAPE, SPACING)
    kind = rng.randrange(6)
    if kind == 0:
        affine[rng.randrange(3), rng.randrange(4)] = rng.choice(FLOATS)
    elif kind == 1:
        affine[:3, :3] *= rng.choice([1e-3, -1.0, 1e3, 0.0, 4.0])
    elif kind == 2:
        affine[:3, 3] = rng.choice([1e30, 1e9, float("nan"), -5e4])
    elif kind == 3:
        affine[:3, :3] += np.array([rng.gauss(0, rng.choice([0.01, 1, 50])) for _ in range(9)]).reshape(3, 3)
    elif kind == 4:
        affine[:, rng.randrange(3)] = affine[:, rng.randrange(3)]
    else:
        affine = affine[rng.sample(range(3), 3) + [3]]
    return affine


def other_voxels(rng: random.Random, hu: np.ndarray) -> np.ndarray:
    values = hu.astype(rng.choice([np.float32, np.float64]))
    count = rng.choice([1, 100, values.size])
    broken = values.copy()
    broken.reshape(-1)[:count] = rng.choice([float("nan"), float("inf"), 1e300, -1e300, 3.4e38, 65535, -1e5, 1e-40])
    shapes = [hu[:, :, :1], hu[:1], hu[:, :, 0], hu[..., None], np.stack([hu] * 2, -1), hu[None], hu[:2, :2, :2]]
    kinds = [hu.astype(kind) for kind in (np.uint8, np.uint16, np.int64, np.uint64, np.complex64, np.float64)]
    rgb = np.zeros(hu.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    flat = [np.zeros_like(hu), np.full_like(hu, -1000), (hu > 0).astype(np.uint8), hu / 1000.0, hu.astype(np.uint16)]
    return rng.choice([broken, broken, *shapes, *kinds, rgb, *flat])


def gzip_streams(rng: random.Random, content: bytes) -> bytes:
    zipped = gzip.compress(content, 1)
    trailer = bytearray(zipped)
    trailer[-rng.randrange(1, 9)] ^= 1 << rng.randrange(8)
    deflate = zlib.compress(content)
    big = gzip.compress(content + bytes(64 << 20), 1)
    half = len(content) // 2
    members = gzip.compress(content[:half]) + gzip.compress(content[half:])
    choices = [content, bytes(trailer), deflate, zipped[:-8], zipped[:-4], zipped + bytes(512), zipped + b"x", big]
    return rng.choice(
        [*choices, members, gzip.compress(zipped), zipped[:10], damaged(rng, zipped), damaged(rng, zipped)]
    )


def nifti_bytes(rng: random.Random) -> bytes:
    """Return the bytes of a NIfTI file without compression, changed in one way."""
    hu, _ = phantom(SHAPE)
    kind = rng.choice([nib.Nifti1Image, nib.Nifti1Image, nib.Nifti2Image])
    change = rng.choice(
        ["header", "header", "header", "affine", "affine", "voxels", "voxels", "bytes", "extension", "no"]
    )
    voxels = other_voxels(rng, hu) if change == "voxels" else hu
    image = kind(voxels, affine_of(SHAPE, SPACING), dtype=voxels.dtype)
    if change == "affine":
        # not through the image, which refuses some
        image.header.set_sform(other_affine(rng), code=1)
    if change == "extension":
        image.header.extensions.append(nib.nifti1.Nifti1Extension(rng.choice([0, 2, 4, 6, 999]), rng.randbytes(100)))
    content = image.to_bytes()
    if change in ("header", "extension"):
        content = header_fields(rng, content)
    return damaged(rng, content) if change == "bytes" else content


def make(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
    """A NIfTI file: header fields, affine, extension, voxels, gzip stream; cached or predicted."""
    content = nifti_bytes(rng)
    zipped = rng.random() < 0.6
    if zipped:
        content = gzip_streams(rng, content) if rng.random() < 0.5 else gzip.compress(content, 1)
    name = rng.choice(
        ["a.nii.gz", "a.NII.GZ", "é x.nii.gz"] if zipped else ["a.nii", "a.nii", "a.nii.gz", "a.mha", "a.nrrd"]
    )
    (folder / "in/a").mkdir(parents=True)
    place = folder / "in/a" / name
    place.write_bytes(content)
    if rng.random() < 0.1:
        special_file(rng, place)
    if number % 3 == 2:
        return ["predict", "--checkpoint", str(bench.folder / "finetuned/out"), "--images", "in", "--out", "out"]
    spacing = rng.choice(["none", "none", "8", "20"])
    intensity = rng.choice([["window"], ["zscore"], ["percentiles", "--low", "0.5", "--high", "99.5"]])
    words = ["--datalist", "in", "--cache_dir", "cache", "--spacing", spacing, "--intensity", *intensity]
    return ["cache", *words, *rng.choice([[], ["--report"], ["--dry_run"]])]
