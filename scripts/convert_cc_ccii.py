"""CC-CCII's pictures to volumes: CLASS/PATIENT/SCAN/*.png -> CLASS/CLASS_PATIENT-SCAN.nii.gz, which preset CC_CCII
reads.

    python -m scripts.convert_cc_ccii --data CC-CCII --out data/CC_CCII

The published slices are 8-bit pictures without a spacing: voxels are written as 1 mm cubes, which they are not. What
is there already is left as it is; a scan that cannot be read is reported and the rest goes on.
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
from common.errors import InputError
from common.runlog import print_main, progress
from Finetune.presets import load_preset

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


@dataclass(kw_only=True)
class ConvertSettings:
    """Settings of the conversion."""

    data: Path = setting(help="folder with the class folders as published")
    out: Path = setting(help="folder for the volumes")


def main(argv: list[str] | None = None) -> None:
    config = parse(ConvertSettings, argv, description=__doc__)
    classes = load_preset("CC_CCII").layout.classes
    scans = [scan for name in classes for scan in sorted((config.data / name).glob("*/*")) if scan.is_dir()]
    if not scans:
        raise InputError(
            f"{config.data}: found no scan, needs CLASS/PATIENT/SCAN/*.png with the classes {', '.join(classes)}"
        )
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
    """The slices of a scan as (columns, rows, slices) uint8, in the order of the numbers in their names."""
    paths = sorted((p for p in scan.iterdir() if p.suffix.lower() in PICTURES), key=in_order)
    if not paths:
        raise InputError(f"{scan}: found no picture ({', '.join(PICTURES)})")
    slices = []
    for path in paths:
        try:
            picture = Image.open(path)
            if picture.mode.startswith(("I", "F")):  # convert("L") would cut it off at 255
                raise InputError(f"{path}: found a picture of mode {picture.mode}, needs 8 bits per pixel")
            slices.append(np.asarray(picture.convert("L")).T)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        if slices[-1].shape != slices[0].shape:
            raise InputError(
                f"{path}: found a slice of {slices[-1].shape}, the first of its scan has {slices[0].shape}"
            )
    return np.stack(slices, axis=2)


def in_order(path: Path) -> list:
    """2.png before 10.png."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


if __name__ == "__main__":
    sys.exit(run_program(main))
