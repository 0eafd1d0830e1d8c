"""Changed label maps and predictions."""

import gzip
import json
import random
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

from scripts.synthetic_ct import affine_of
from tests.reliability.fuzz_inputs.bench import SHAPE, SPACING, Bench, Words, finetune_words
from tests.reliability.fuzz_inputs.changes import change_entry, damaged, plain
from tests.reliability.fuzz_inputs.nifti import header_fields, other_affine


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


def make(rng: random.Random, folder: Path, bench: Bench, number: int) -> Words:
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
