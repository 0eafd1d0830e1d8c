"""The inputs of the fuzzer: each function changes a valid input at random and returns the program to run on it.

Every function is `make(rng, folder, bench, number)`. It writes its input to `folder / "in"`, and returns the arguments
of a program (the first is a key of PROGRAMS), whose output goes to `folder / "out"` and `folder / "cache"`.
"""

import dataclasses
import gzip
import json
import os
import random
import shutil
import struct
import sys
import typing
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import torch
import yaml
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

import generate_cache_files
from common import checkpoint
from common.config import settings_of
from Finetune import evaluate, main_finetune, predict, sweep
from Finetune.architectures import build_model, resolve
from Pretrain import main_pretrain
from Pretrain.build import build_task, settings_class
from scripts import check_leakage
from scripts.synthetic_ct import affine_of, phantom, write_dicom, write_nifti

Words = list[str]
SHAPE, SPACING = (20, 18, 16), (9.0, 10.0, 12.0)
RAN = "the code in the pickle ran"
TINY = "--embed_dim 12 --depth 3 --num_heads 2 --feature_size 4 --roi 16 --patch_size 8".split()
QUICK = "--epochs 1 --batch_size 1 --workers 0 --warmup_epochs 0 --log_every 1 --samples_per_epoch 1".split()
PRETRAIN = {
    "mae": "--model tiny --embed_dim 12 --depth 1 --num_heads 2 --patch_size 8",
    "glmae": "--model tiny --embed_dim 12 --depth 1 --num_heads 2 --patch_size 8 --global_size 16 --global_views 2 "
    "--hidden_dim 8 --bottleneck_dim 4 --out_dim 8",
    "mim": "--model tiny --embed_dims 4 8 12 16 --depths 1 --num_heads 2 --num_mid 1 --num_down 1",
}
DECODER = "--decoder_embed_dim 12 --decoder_depth 1 --decoder_num_heads 2 --local_views 1".split()
PRESET = {
    "name": "tiny",
    "description": "three organs",
    "labels": {0: "background", 1: "spleen", 2: "kidney", 3: "liver"},
    "roi": [16, 16, 16],
    "patch_size": [8, 8, 8],
    "intensity": "window",
    "low": -175,
    "high": 250,
    "folds": 2,
    "layout": {"datalist": "dataset.json"},
}


# ---------------------------------------------------------------- programs


def run_module(main: Callable[[], Any]) -> Callable[[Words], Any]:
    """Return a program that takes its arguments from sys.argv as a function of them."""

    def run(argv: Words) -> Any:
        sys.argv = ["program", *argv]
        return main()

    return run


def build_pretraining(argv: Words) -> None:
    """Build what a pretraining run builds, without its data: for settings with which a run would take long."""
    from common.cli import parse
    from common.training.settings import plan_updates

    settings = parse(settings_class(), argv)
    build_task(settings, plan_updates(settings, 3, 1))


def build_finetuning(argv: Words) -> None:
    """Build the network of a fine-tuning run, without its data."""
    from common.cli import parse
    from common.training.settings import plan_updates
    from Finetune.presets import load_preset

    config = parse(main_finetune.FinetuneSettings, argv)
    preset = load_preset(config.cases.preset)
    main_finetune.check_settings(config, preset)
    plan_updates(config, 3, 1)
    build_model(resolve(config.network, preset, main_finetune.initial_checkpoint(config.start)))


PROGRAMS: dict[str, Callable[[Words], Any]] = {
    "cache": run_module(generate_cache_files.main),
    "pretrain": run_module(main_pretrain.main),
    "build_pretraining": build_pretraining,
    "build_finetuning": build_finetuning,
    "finetune": main_finetune.main,
    "predict": predict.main,
    "evaluate": evaluate.main,
    "sweep": sweep.main,
    "leakage": run_module(check_leakage.main),
}


def finetune_words(preset: Path, data: Path, *more: object) -> Words:
    words = ["--preset", preset, "--data", data, "--cache_dir", "cache", "--out_dir", "out", *TINY, *QUICK, *more]
    return list(map(str, words))


def pretrain_words(method: str, *more: object) -> Words:
    size = "16" if method != "mim" else "32"
    words = ["--method", method, *PRETRAIN[method].split(), *DECODER, "--local_size", size, *QUICK]
    return list(map(str, [*words, "--cache_dir", "cache", "--out_dir", "out", *more]))


# ---------------------------------------------------------------- the valid inputs


@dataclasses.dataclass(frozen=True)
class Bench:
    """The valid inputs in a folder: scans and labels, a preset, a series, checkpoints, label maps, a score card."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / name

    def prepare(self, run: Callable[[Path, Words], None]) -> None:
        """Write the inputs. `run(folder, words)` runs a program in a folder."""
        entries = []
        for number in range(3):
            hu, label = phantom(SHAPE, seed=number)
            write_nifti(self.data / f"imagesTr/c{number}.nii.gz", hu, affine_of(SHAPE, SPACING))
            write_nifti(self.data / f"labelsTr/c{number}.nii.gz", label.clip(max=3), affine_of(SHAPE, SPACING))
            entries.append({"image": f"imagesTr/c{number}.nii.gz", "label": f"labelsTr/c{number}.nii.gz"})
        (self.data / "dataset.json").write_text(json.dumps({"training": entries, "test": []}))
        (self.folder / "preset.yaml").write_text(yaml.safe_dump(PRESET))
        write_dicom(self.series, phantom((16, 14, 8))[0], affine_of((16, 14, 8), (12.0, 14.0, 20.0)))
        preset = self.folder / "preset.yaml"
        run(self.folder / "finetuned", ["finetune", *finetune_words(preset, self.data)])
        for method in PRETRAIN:
            run(self.folder / method, ["pretrain", *pretrain_words(method, "--datalist", self.data / "imagesTr")])
        model = self.folder / "finetuned/out"
        words = ["predict", "--checkpoint", model, "--images", self.data / "imagesTr", "--out", "out"]
        run(self.folder / "predicted", list(map(str, words)))

    def copy_data(self, folder: Path) -> Path:
        shutil.copytree(self.data, folder / "in/data")
        return folder / "in/data"

    def warm_cache(self, folder: Path, program: str) -> None:
        shutil.copytree(self.folder / program / "cache", folder / "cache")


# ---------------------------------------------------------------- bytes


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Return bytes that are cut, flipped, repeated, replaced or followed by others."""
    place, extra = rng.randrange(len(content) or 1), rng.randbytes(rng.choice([1, 16, 4096]))
    flipped = bytearray(content)
    for _ in range(rng.choice([1, 1, 8, 64])):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    choices = [content[:place], bytes(flipped), bytes(flipped), content + extra, content[place:], b"", content * 2]
    choices += [content[:place] + extra + content[place + len(extra) :], extra, content[:place] + content[place + 1 :]]
    return rng.choice(choices)


def numbers(rng: random.Random) -> Any:
    """Return a number, or something else, that is unusual where a number is expected."""
    return rng.choice(
        [0, -1, 1, 2, 3, 255, 256, -32768, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-30, 1e300]
        + [float("nan"), float("inf"), float("-inf"), None, True, "", "abc", "1", [], [1], {}, {"a": 1}, "é\u0301 "]
    )


# ---------------------------------------------------------------- NIfTI

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


def nifti(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
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


def special_file(rng: random.Random, place: Path) -> None:
    """Put something that is not a file, or not a readable one, in place of a file."""
    place.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        os.mkfifo(place)
    elif kind == 1:
        place.symlink_to(place)
    elif kind == 2:
        place.mkdir()
    else:
        place.symlink_to(place.parent / "nothing.nii.gz")


# ---------------------------------------------------------------- DICOM

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


def dicom(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
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


# ---------------------------------------------------------------- checkpoints


class Payload:
    """Unpickling it creates the file RAN: what a checkpoint must never do."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "ran")


def change_value(rng: random.Random, value: Any) -> Any:
    """Return another value in place of a tensor or plain value."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and rng.random() < 0.8:
        broken = value.clone()
        if broken.numel():
            broken.view(-1)[0] = rng.choice([float("nan"), float("inf"), 1e38])
        wide = torch.zeros(1).expand(*(4096 for _ in range(max(2, value.ndim))))
        others = [
            value.to_sparse(),
            value.half(),
            value.int(),
            value.double(),
            value.flatten()[:1].clone(),
            value.flatten(),
        ]
        others += [
            value.flatten()[:1].clone(),
            torch.zeros(0),
            value[None],
            torch.zeros(()),
            torch.quantize_per_tensor(value.float(), 1.0, 0, torch.qint8),
        ]
        return rng.choice(
            [broken, broken, wide, value.to_sparse(), *others, value.to(torch.complex64), value.to("meta")]
        )
    return rng.choice([numbers(rng), {}, [], "x" * 100, torch.zeros(2), {"a": {"b": []}}, 10**9])


def change_entry(rng: random.Random, content: Any) -> Any:
    """Change, remove or add one entry somewhere in nested dicts and lists, in place."""
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return content
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and rng.random() < 0.85:
            place = place[key]
            continue
        kind = rng.random()
        if kind < 0.25:
            del place[key]
        elif kind < 0.35 and isinstance(place, dict):
            place[rng.choice(["x", "", 1, "blocks.x.y", "blocks.99.w", "module.module.a", None])] = place[key]
        else:
            place[key] = change_value(rng, place[key])
        return content


def changed_checkpoint(rng: random.Random, source: Path, target: Path, ran: Path) -> None:
    content = checkpoint.load(source)
    kind = rng.randrange(8)
    if kind == 0:
        target.write_bytes(damaged(rng, source.read_bytes()))
        return
    if kind == 1:
        name = rng.choice(["args", "epoch", "code", "model"])
        content = Payload(ran) if rng.random() < 0.3 else content | {name: Payload(ran)}
    elif kind == 2:
        args = content.get("args", {})
        content["args"] = rng.choice([__import__("argparse").Namespace(**args), None, [], "x", {}])
    elif kind == 3:
        content = rng.choice([[], None, "x", torch.zeros(3), {}, {"model": {}}, {"model": {"a": 1}}, {1: 2}])
    elif kind == 4:
        state = next(v for k, v in content.items() if k in ("student", "state_dict", "model"))
        name = rng.choice([n for n, v in state.items() if v.is_floating_point() and v.ndim])
        state[name] = change_value(rng, state[name])
    else:
        for _ in range(rng.choice([1, 1, 2])):
            change_entry(rng, content)
    torch.save(content, target, _use_new_zipfile_serialization=rng.random() < 0.8)


def checkpoints(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
    """A checkpoint: bytes, values, shapes, sparse and expanded tensors, NaN, pickled code; every reader."""
    program = ("init", "predict", "predict", "resume", "init", "resume_finetuning", "leakage")[number % 7]
    (folder / "in").mkdir()
    place = folder / "in/checkpoint-last.pth"
    method = rng.choice(list(PRETRAIN))
    own = "finetuned" if program in ("predict", "resume_finetuning") else method
    changed_checkpoint(rng, bench.folder / own / "out/checkpoint-last.pth", place, folder / RAN)
    data, preset = bench.data, bench.folder / "preset.yaml"
    if program == "init":
        model = [
            "--model",
            "mim",
            "--embed_dim",
            "none",
            "--depth",
            "none",
            "--roi",
            "64",
            "32",
            "32",
            "--size",
            "tiny",
        ]
        more = [*model, "--embed_dims", "4", "8", "12", "16", "--depths", "1", "--patch_size", "16"]
        more = [*(more if method == "mim" else ["--depth", "1"]), "--model", "mim" if method == "mim" else "linear"]
        return ["build_finetuning", *finetune_words(preset, data, "--init", place, *more)]
    if program == "predict":
        return ["predict", "--checkpoint", "in", "--images", str(data / "imagesTr"), "--out", "out"]
    if program == "leakage":
        words = ["--pretrain", place, "--finetune", preset, "--data", data, "--cache_dir", "cache"]
        return ["leakage", *map(str, words)]
    bench.warm_cache(folder, own)
    (folder / "out").mkdir()
    resume = "in/checkpoint-last.pth"
    if rng.random() < 0.5:
        resume = "auto"
        shutil.copy(place, folder / "out")
    if program == "resume":
        return ["pretrain", *pretrain_words(method, "--datalist", data / "imagesTr", "--resume", resume)]
    return ["finetune", *finetune_words(preset, data, "--resume", resume)]


# ---------------------------------------------------------------- lists

PATHS = ["imagesTr/c0.nii.gz", "", ".", "/", "..", "a\0b", "\ud800", "x" * 300, "y/" * 3000, " ", "~", "nothing.nii.gz"]
PATHS += [
    "imagesTr",
    "/dev/zero",
    "/dev/null",
    "/proc/self/mem",
    "a\nb",
    "dataset.json",
    "imagesTr/../imagesTr/c0.nii.gz",
]


def changed_list(rng: random.Random, content: Any) -> bytes:
    """Return a JSON list with paths, types or nesting that do not belong there."""
    kind = rng.randrange(9)
    text = json.dumps(content)
    if kind == 0:
        depth = rng.choice([100, 900, 3000, 200_000])
        nested = rng.choice([("[", "]"), ('{"training":', "}")])
        return (nested[0] * depth + "1" + nested[1] * depth).encode()
    if kind == 1:
        return damaged(rng, text.encode())
    if kind == 2:
        return rng.choice([text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), text.encode() + b"\xff", b"NaN"])
    if kind == 3:
        return text.replace('"test"', '"training"').replace("c1", rng.choice(["c0", "c2"])).encode()
    if kind in (4, 5):
        case = rng.choice(content["training"])
        case[rng.choice(["image", "label"])] = rng.choice([*PATHS, *PATHS, numbers(rng)])
    elif kind == 6:
        names = ["fold", "name", "fold", "name", "image", "label"]
        for case in content["training"]:
            case[rng.choice(names)] = rng.choice([numbers(rng), "9" * 5000, "a/b", ".x", "c0", rng.randrange(3)])
    elif kind == 7:
        return text.replace(
            '"training": [', f'"training": [{rng.choice(["9" * 5000, "1e999", "-Infinity", "[]"])}, '
        ).encode()
    else:
        change_entry(rng, content)
    return json.dumps(plain(content)).encode()


def lists(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
    """A JSON or text list: paths (NUL, surrogates, devices), types, nesting, encodings, names, folds."""
    data = bench.copy_data(folder)
    if number % 4 == 3:
        place = data / "list.txt"
        lines = [*(rng.choice(PATHS) for _ in range(rng.randrange(4))), "imagesTr/c1.nii.gz", "# a comment"]
        rng.shuffle(lines)
        place.write_bytes("\n".join(lines).encode(errors="surrogatepass") + rng.choice([b"", b"\xff", b"\r\n", b"\0"]))
    else:
        place = data / "dataset.json"
        place.write_bytes(changed_list(rng, json.loads(place.read_text())))
    source = (
        str(place) if rng.random() < 0.9 else str(data / rng.choice(PATHS)).replace("\0", "?").replace("\ud800", "?")
    )
    preset, labels = str(bench.folder / "preset.yaml"), ["--labels"] if rng.random() < 0.5 else []
    model = str(bench.folder / "finetuned/out")
    return rng.choice(
        [
            ["cache", "--datalist", source, "--cache_dir", "cache", *labels],
            ["cache", "--datalist", source, "--cache_dir", "cache", "--dry_run", "--allow_failures"],
            ["cache", "--preset", preset, "--datalist", source, "--cache_dir", "cache"],
            ["predict", "--checkpoint", model, "--images", source, "--out", "out", "--no-overlays"],
            ["sweep", "--preset", preset, "--data", source, "--out", "out", "--slurm"],
            ["evaluate", "--preset", preset, "--predictions", str(bench.folder / "predicted/out"), "--labels", source]
            + ["--out", "out"],
            ["leakage", "--pretrain", source, "--finetune", preset, "--data", str(data), "--cache_dir", "cache"]
            + ["--exclude_leaks", "out/clean.txt"],
        ]
    )


# ---------------------------------------------------------------- label maps


def changed_label(rng: random.Random, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a label map and its affine with values, types, a shape or a geometry that do not belong there."""
    affine = affine_of(SHAPE, SPACING)
    kind = rng.randrange(6)
    values = label.astype(rng.choice([np.float32, np.float64, np.int32, np.int16]))
    if kind == 0:
        values.flat[rng.randrange(values.size)] = rng.choice([-1, 4, 5, 255, 256, 1000, -32768])
    elif kind == 1:
        values = values.astype(np.float64)
        values.flat[rng.randrange(values.size)] = rng.choice([0.5, float("nan"), float("inf"), 1e30, -0.4, 1 + 1e-9])
    elif kind == 2:
        values = rng.choice(
            [values[:-1], values[:, :, :1], values[..., None], np.stack([values] * 2, -1), values[0], values.T]
        )
    elif kind == 3:
        affine = other_affine(rng)
    elif kind == 4:
        values = rng.choice(
            [values * 0, values * 0 + 3, values > 0, values.astype(np.complex64), values.astype(np.float16) > 1]
        )
        values = values.astype(np.uint8) if values.dtype == bool else values
    else:
        values = label.astype(rng.choice([np.uint16, np.int64, np.uint64, np.int8]))
    return values, affine


def labels(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
    """A label map: ids, fractions, NaN, types, shape, geometry, bytes; scored, cached or trained on."""
    data = bench.copy_data(folder)
    predictions = shutil.copytree(bench.folder / "predicted/out", folder / "in/predictions")
    target = rng.choice([data / "labelsTr/c1.nii.gz", predictions / "c1.nii.gz"])
    values, affine = changed_label(rng, np.asanyarray(nib.load(data / "labelsTr/c1.nii.gz").dataobj))
    content = nib.Nifti1Image(values, affine, dtype=values.dtype).to_bytes()
    if rng.random() < 0.15:
        content = header_fields(rng, content)
    content = gzip.compress(content, 1)
    target.write_bytes(damaged(rng, content) if rng.random() < 0.1 else content)
    if rng.random() < 0.2:
        text = (predictions / "predictions.json").read_text()
        changed = json.dumps(plain(change_entry(rng, json.loads(text)))).encode()
        (predictions / "predictions.json").write_bytes(rng.choice([changed, damaged(rng, text.encode())]))
    preset = bench.folder / "preset.yaml"
    if target.is_relative_to(predictions) or number % 3 == 0:
        words = ["--predictions", predictions, "--labels", data / "labelsTr", "--preset", preset, "--out", "out"]
        return ["evaluate", *map(str, words), "--images", str(data / "imagesTr")]
    if number % 3 == 1:
        return ["cache", "--preset", str(preset), "--data_root", str(data), "--cache_dir", "cache"]
    return ["finetune", *finetune_words(preset, data)]


# ---------------------------------------------------------------- presets and other YAML


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n" for before, after in zip("abcdefgh", "bcdefghi")
)


def changed_yaml(rng: random.Random, content: dict) -> bytes:
    """Return a YAML with values, keys or a structure that do not belong there."""
    kind = rng.randrange(10)
    if kind == 0:
        return damaged(rng, yaml.safe_dump(content).encode())
    if kind == 1:
        key = rng.choice(["labels", "roi", "spacing", "name", "layout", "validation", "regions"])
        depth = rng.choice([100, 900, 5000])
        bombs = [
            f"{BOMB}{key}: *i\n",
            f"{key}: &x [*x]\n",
            f"{key}: &x {{a: *x}}\n",
            f"{key}: {'[' * depth}{']' * depth}\n",
        ]
        others = [
            "!!python/object/apply:os.system ['touch ran']\n",
            "a: 1\n---\nb: 2\n",
            "- 1\n",
            "x",
            "",
            "? [1]\n: 2\n",
        ]
        text = yaml.safe_dump({k: v for k, v in content.items() if k != key})
        return (text * (rng.random() < 0.8) + rng.choice([*bombs, *bombs, *others])).encode()
    patterns = [
        "img/{case}.nii.gz",
        "/{case}.nii",
        "{case}",
        "../{case}/{case}.nii.gz",
        "**/{case}",
        "x",
        "[{case}",
        "",
    ]
    named = {"images": ["imagesTr/{case}.nii.gz"], "labels": ["labelsTr/{case}.nii.gz"]}
    extra = {
        "roi": [[10**9] * 3, [8] * 3, [16, 16], [24, 24, 24], [0, 8, 8], 16, [8000] * 3],
        "patch_size": [[1] * 3, [3] * 3, [16] * 3, [10**9] * 3, [4, 8, 16]],
        "labels": [{0: "a"}, {0: "a", 1: "a"}, {1: "b", 2: "c"}, {k: str(k) for k in range(300)}, {0: "", 1: ""}],
        "label_values": [{5: 1}, {0: 0, 1: 1, 2: 2, 3: 3}, {0: 0, 1: 9}, {2**40: 1}, {-1: 0, 0: 1, 1: 1, 2: 2, 3: 3}],
        "regions": [{"a": [1, 2], "b": [2]}, {"a": []}, {"a": [9]}, {"": [1]}, {"a/b": [1, 2]}],
        "spacing": [[1e-9] * 3, [0.001] * 3, [999] * 3, [1e300] * 3, [1, 1], [0.2, 8, 8], [30, 30, 30]],
        "channels": [2, 4, 10**9],
        "folds": [2, 3, 10**9, 2**63],
        "validation": [["c0"], ["c0", "c1", "c2"], ["x"], [""]],
        "validation_cases": [1, 2, 3, 10**9],
        "label_order": [["c0", "c0"], ["x"]],
        "intensity": ["zscore", "percentiles"],
        "low": [250, 1e300, -1e300, 249.9999999999999],
        "high": [-175, 1e300, 1e-300, 2**70],
        "foreground_threshold": [2, -1, 1e300, None],
        "nsd_tolerance": [0, 1e300, 1e-300],
        "task": ["classification"],
        "layout": [
            {"images": [rng.choice(patterns)], "labels": [rng.choice(patterns)]},
            named | {"case": rng.choice(["(", "(a+)+", "", ".*", "(?P<case>.)"])},
            {"datalist": rng.choice(["x.json", "/dev/zero", "..", "", "a\0b", "z" * 300, "imagesTr"])},
            {"datalist": "dataset.json", "patient": rng.choice(["", "c", "(", ".*"])},
        ],
        "augmentation": [{"flip": 2}, {"noise": 1}, {"x": 1}],
        "name": ["a/b", "", "x" * 5000, "a\0b"],
    }  # fmt: skip
    for _ in range(rng.choice([1, 1, 2])):
        if rng.random() < 0.6:
            key = rng.choice(list(extra))
            content[key] = rng.choice(extra[key])
        else:
            change_entry(rng, content)
    return yaml.safe_dump(plain(content), allow_unicode=True).encode(errors="replace")


def plain(value: Any) -> Any:
    """Return a value that YAML can hold: tensors become lists."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def presets(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
    """A preset, a list of data sets or a file of settings: values, keys, nesting, references; read, trained, scored."""
    (folder / "in").mkdir()
    place = folder / "in/mine.yaml"
    kind = number % 5
    if kind == 4:
        recipe = {"method": "mae", "batch_size": 1, "epochs": 1, "local_size": [16, 16, 16], "low": -1000, "lr": 1e-3}
        place.write_bytes(changed_yaml(rng, recipe))
        words = pretrain_words("mae", "--datalist", bench.data / "imagesTr")
        return ["build_pretraining", "--config", str(place), *words[2:]]
    if kind == 3:
        names = ["name", "description", "where", "licence", "citation", "layout", "modality"]
        source = {name: "x" for name in names} | {"folders": ["imagesTr"], "count": 3}
        listed = {
            "name": "x",
            "description": "x",
            "datasets": rng.choice([[str(place)], ["BTCV", "x"], ["in/mine.yaml"] * 2]),
        }
        place.write_bytes(changed_yaml(rng, rng.choice([source, source, listed])))
        if rng.random() < 0.3:
            place.write_text(yaml.safe_dump(listed))
        return ["cache", "--datasets", str(place), "--data_root", str(bench.data), "--cache_dir", "cache"]
    place.write_bytes(changed_yaml(rng, json.loads(json.dumps(PRESET)) | {"labels": dict(PRESET["labels"])}))
    data = bench.copy_data(folder)
    if kind == 0:
        words = ["--predictions", bench.folder / "predicted/out", "--labels", data / "labelsTr", "--preset", place]
        return ["evaluate", *map(str, words), "--out", "out"]
    if kind == 1:
        return ["cache", "--preset", str(place), "--data_root", str(data), "--cache_dir", "cache"]
    words = finetune_words(place, data)
    drop = words.index("--roi")
    return ["finetune", *words[:drop], *words[drop + 2 :]]


# ---------------------------------------------------------------- settings


def is_number(kind: Any) -> bool:
    return kind in (int, float) or any(is_number(part) for part in typing.get_args(kind) if not isinstance(part, str))


CLASSES = {
    "pretrain": settings_class(),
    "finetune": main_finetune.FinetuneSettings,
    "predict": predict.PredictSettings,
    "evaluate": evaluate.EvaluateSettings,
    "sweep": sweep.SweepSettings,
    "cache": generate_cache_files.CacheSettings,
}
NUMERIC = [
    (program, name) for program, cls in CLASSES.items() for name, s in settings_of(cls).items() if is_number(s.kind)
]
# values of which each setting gets one after another, starting at a random one
SETTING_VALUES = [
    "0",
    "-1",
    "nan",
    "inf",
    "1000000000",
    "9223372036854775808",
    "1e300",
    "abc",
    "-2",
    "1e-300",
    "0.5",
    "2",
]
SETTING_VALUES += ["3 5 7", "none", "true", "-inf", "1", "18446744073709551616", "7", "", "1e400", "1_00", "5000"]
# with large values of these a run takes long, and is not absurd
LONG = {
    "epochs",
    "samples_per_epoch",
    "batch_size",
    "micro_batch_size",
    "crops",
    "workers",
    "local_views",
    "global_views",
}


def settings(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
    """A numeric setting: 0, -1, nan, inf, huge, wrong type; the run is then made, if it is short."""
    (folder / "in").mkdir()
    program, name = NUMERIC[number % len(NUMERIC)]
    order = random.Random(name)
    values = order.sample(SETTING_VALUES, len(SETTING_VALUES))
    value = values[number // len(NUMERIC) % len(values)].split(" ")
    words = base_words(program, name, order, bench)
    if rng.random() < 0.3:
        plain_value = yaml.safe_load(value[0]) if len(value) == 1 else [yaml.safe_load(v) for v in value]
        (folder / "in/settings.yaml").write_text(yaml.safe_dump({name: plain_value}))
        given = ["--config", "in/settings.yaml"]
        while f"--{name}" in words:
            place = words.index(f"--{name}")
            end = next((i for i in range(place + 1, len(words)) if words[i].startswith("--")), len(words))
            del words[place:end]
    else:
        given = [f"--{name}", *value]
    if program in ("pretrain", "finetune"):
        bench.warm_cache(folder, words[1] if program == "pretrain" else "finetuned")
        if name in LONG:
            program = {"pretrain": "build_pretraining", "finetune": "build_finetuning"}[program]
    return [program, *words, *given]


def base_words(program: str, name: str, order: random.Random, bench: Bench) -> Words:
    """Return arguments of a short run of a program in which the setting is used."""
    scans, preset = str(bench.data / "imagesTr"), bench.folder / "preset.yaml"
    model, made = str(bench.folder / "finetuned/out"), str(bench.folder / "predicted/out")
    if program == "pretrain":
        allowed = settings_of(CLASSES[program])[name].when.get("method", tuple(PRETRAIN))
        return pretrain_words(order.choice(allowed), "--datalist", scans)
    if program == "finetune":
        words = finetune_words(preset, bench.data)
        return words
    return {
        "predict": ["--checkpoint", model, "--images", scans, "--out", "out"],
        "evaluate": [
            "--predictions",
            made,
            "--labels",
            str(bench.data / "labelsTr"),
            "--preset",
            str(preset),
            "--out",
            "out",
        ],
        "sweep": ["--preset", str(preset), "--data", str(bench.data), "--out", "out", "--slurm"],
        "cache": ["--datalist", scans, "--cache_dir", "cache"],
    }[program]


Make = Callable[[random.Random, Path, Bench, int], Words]
# kind -> function and number of inputs
KINDS: dict[str, tuple[Make, int]] = {
    "NIfTI": (nifti, 160),
    "DICOM": (dicom, 100),
    "checkpoint": (checkpoints, 120),
    "list": (lists, 100),
    "label map": (labels, 80),
    "preset": (presets, 98),
    "setting": (settings, 3 * len(NUMERIC)),
}
