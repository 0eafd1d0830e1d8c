"""Convert the slices of CC-CCII to volumes for preset CC_CCII.

CLASS/PATIENT/SCAN/*.png become CLASS/CLASS_PATIENT-SCAN.nii.gz.

    python -m scripts.convert_cc_ccii --data CC-CCII --out data/CC_CCII

The published slices are 8-bit images without a spacing. The volumes get a spacing of 1 mm, which is not the true one.
Volumes that exist are not written again. A scan that cannot be read is reported, and the others are converted.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from common.cli import parse, run_program
from common.config import setting
from common.data.nifti import write_nifti
from common.errors import InputError, one_line
from common.runlog import print_main, progress
from Finetune.presets import load_preset

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


@dataclass(kw_only=True)
class ConvertSettings:
    """Settings of the conversion."""

    data: Path = setting(help="folder with the published class folders")
    out: Path = setting(help="folder for the volumes")


def main(argv: list[str] | None = None) -> None:
    config = parse(ConvertSettings, argv, description=__doc__)
    classes = load_preset("CC_CCII").layout.classes
    scans = [scan for name in classes for scan in sorted((config.data / name).glob("*/*")) if scan.is_dir()]
    if not scans:
        layout = f"CLASS/PATIENT/SCAN/*.png with the classes {', '.join(classes)}"
        raise InputError(f"{config.data}: found no scan, expected {layout}")
    failures = []
    for scan in progress(scans, desc="convert", unit="scan"):
        name, patient = scan.parts[-3], scan.parts[-2]
        target = config.out / name / f"{name}_{patient}-{scan.name}.nii.gz"
        if target.exists():
            continue
        try:
            write_nifti(target, nib.Nifti1Image(stack(scan), np.eye(4)))
        except InputError as error:
            failures.append(str(error))
            print_main(f"error: {error}")
    print_main(f"{len(scans) - len(failures)} of {len(scans)} scans in {config.out}")
    if failures:
        raise InputError(f"{len(failures)} of {len(scans)} scans could not be converted, the first: {failures[0]}")


def stack(scan: Path) -> np.ndarray:
    """Return a scan as (columns, rows, slices) uint8, slices in the order of the numbers in their names."""
    paths = sorted((p for p in scan.iterdir() if p.suffix.lower() in PICTURES), key=natural_order)
    if not paths:
        raise InputError(f"{scan}: found no image, expected slices ({', '.join(PICTURES)})")
    slices = []
    for path in paths:
        try:
            picture = Image.open(path)
            # convert("L") would clip these at 255
            if picture.mode.startswith(("I", "F")):
                raise InputError(f"{path}: found an image of mode {picture.mode}, expected 8 bits per pixel")
            slices.append(np.asarray(picture.convert("L")).T)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({one_line(error)})") from None
        if slices[-1].shape != slices[0].shape:
            raise InputError(f"{path}: found a slice of {slices[-1].shape}, expected {slices[0].shape} as the first")
    return np.stack(slices, axis=2)


def natural_order(path: Path) -> list:
    """Return a sorting key that puts 2.png before 10.png."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


if __name__ == "__main__":
    sys.exit(run_program(main))
