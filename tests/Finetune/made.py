"""Small synthetic data sets with the layout, names, channels, data types and label values of the published ones."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from Finetune.presets import Preset

# as the published files are numbered; if the preset names its validation cases, the second is one of them
IDS = {
    "BTCV": ("0001", "0035", "0002"),
    "BTCV_iso": ("0001", "0035", "0002"),
    "MMWHS_CT": ("1005", "1001", "1006"),
    "AMOS22_CT": ("0001", "0004", "0408"),
    "MSD09_Spleen": ("spleen_16", "spleen_2", "spleen_17"),
}


def volume(preset: Preset, seed: int, shape=(30, 28, 26)):
    """Return (image, label values): a body with a box of its own brightness for each class."""
    rng = np.random.default_rng(seed)
    coords = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    body = (coords**2).sum(axis=0) < 1.1
    ids = np.zeros(shape, np.int64)
    count = len(preset.labels) - 1
    # boxes on a spiral through the body
    for number in range(1, count + 1):
        turn = 2 * np.pi * (number + 0.1 * seed) / count
        centre = (0.45 * np.cos(turn), 0.45 * np.sin(turn), 0.5 * (number / count - 0.5))
        ids[(np.abs(coords - np.reshape(centre, (3, 1, 1, 1))) < 0.16).all(axis=0)] = number
    if preset.modality == "CT":
        low, high = (preset.low, preset.high) if preset.intensity == "window" else (-175, 250)
        image = np.where(body, low + (high - low) * (0.3 + 0.6 * ids / count), -1000)
        image = (image + rng.normal(0, 15, shape)).round().astype(np.int16)
        image[0, 0, 0] = -1024
    else:
        channels = preset.channels
        image = body[..., None] * (300 + 100 * ids[..., None] + 50 * np.arange(channels))
        image = (image + body[..., None] * rng.normal(0, 15, (*shape, channels))).astype(np.float32)
        image = image if channels > 1 else image[..., 0]
    back = {number: value for value, number in sorted(preset.label_values.items(), reverse=True)}
    values = np.vectorize(lambda n: back.get(n, n))(ids)
    return image, values.astype(np.uint16 if back else np.uint8)


def make_dataset(preset: Preset, root: Path, affine=None, cases: int = 3, shape=(30, 28, 26)) -> Path:
    """Write a data set of `cases` volumes in the layout of `preset` and return its folder."""
    affine = np.diag([-3.0, -3.0, 3.0, 1.0]) if affine is None else affine
    layout, entries = preset.layout, []
    for position in range(cases):
        image, label = volume(preset, position, shape)
        number = IDS.get(preset.name, ("001", "002", "003"))[position]
        if layout.datalist:
            name = number if not number.isdigit() else f"case_{number}"
            image_path, label_path = root / f"imagesTr/{name}.nii.gz", root / f"labelsTr/{name}.nii.gz"
            entries.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
        else:
            image_path = root / layout.images[0].replace("{case}", number)
            label_path = root / layout.labels[0].replace("{case}", number)
        for path, array in ((image_path, image), (label_path, label)):
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), path)
    if layout.datalist:
        (root / layout.datalist).write_text(json.dumps({"name": preset.name, "training": entries, "test": []}))
    return root


def make_scans(preset: Preset, root: Path, patients: int = 5) -> Path:
    """Write a classification data set with two scans of each patient and return its folder."""
    for number, folder in enumerate(preset.layout.classes):
        for patient in range(patients):
            for scan in range(2):
                rng = np.random.default_rng(100 * number + 10 * patient + scan)
                pixels = rng.uniform(0, 255, (24, 22, 10)) ** (0.5 + number)
                path = root / folder / f"{folder}{patient}-{scan}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image((pixels / pixels.max() * 255).astype(np.uint8), np.eye(4)), path)
    return root
