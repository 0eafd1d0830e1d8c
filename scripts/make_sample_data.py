"""Make the data set of the demo and of the tests: two abdominal CT scans with BTCV's classes, and a chest CT.

    python -m scripts.make_sample_data --out data/sample_abdomen

The scans are real CT from the sample files in the package TotalSegmentator (Apache-2.0). A model made the labels, not
an expert. Without a network, labelled synthetic volumes are made instead, with a notice. A second call does nothing.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common.cli import parse, run_program
from common.config import setting
from common.errors import InputError
from common.files import file_sha256, naming_errors, save_bytes
from common.runlog import print_main
from Finetune.presets import load_preset

PACKAGE, VERSION = "TotalSegmentator", "2.18.0"
SHA256 = "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03"
FILES = f"totalsegmentator-{VERSION}/tests/reference_files/"
WANTED = (
    "example_ct.nii.gz",
    "example_seg_fast_force_split.nii.gz",
    "example_ct_dicom/",
    "example_seg_dicom.nii.gz",
    "aorta_report/example_ct.nii.gz",
)
ORGANS = load_preset("sample_abdomen").foreground
# TotalSegmentator's id -> BTCV's
TO_BTCV = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 7, 7: 11, 8: 12, 9: 13, 15: 5, 52: 8, 63: 9, 64: 10}
IMAGES = ("imagesTr/abdomen_a.nii.gz", "imagesTs/abdomen_b", "unlabelled/chest.nii.gz")
LABELS = ("labelsTr/abdomen_a.nii.gz", "labelsTs/abdomen_b.nii.gz")
NOT_REAL = f"""{"!" * 100}
!! {PACKAGE} {VERSION} COULD NOT BE DOWNLOADED. MAKING SYNTHETIC VOLUMES INSTEAD: ELLIPSES WITH NOISE,
!! NOT CT OF PATIENTS. SCORES ON THEM MEAN NOTHING BEYOND 'IT RUNS'.
{"!" * 100}"""


@dataclass(kw_only=True)
class SampleSettings:
    """Settings of the sample data."""

    out: Path = setting(Path("data/sample_abdomen"), "folder to make")
    synthetic: bool = setting(False, "make synthetic volumes, with or without a network")
    archive: Path | None = setting(None, f"the package {PACKAGE}-{VERSION} as a .tar.gz, instead of downloading it")


def main() -> None:
    settings = parse(SampleSettings, description=__doc__)
    make(settings.out, settings.synthetic, settings.archive)


def make(out: Path, synthetic: bool = False, archive: Path | None = None) -> Path:
    """Make the data set in `out`, unless it is complete, and return its dataset.json.

    Raises:
        InputError: the archive is not the expected one, or `out` cannot be written.
    """
    listing = out / "dataset.json"
    if is_complete(out):
        if synthetic and not is_synthetic(out):
            raise InputError(f"{out}: found real CT, expected another --out for synthetic volumes")
        print_main(f"sample data: {out} is complete ({kind_of(out)})")
        return listing
    with naming_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True)
    with temporary as name:
        folder, new = Path(name), Path(name) / "new"
        source = None if synthetic else archive or download(folder)
        if source:
            write_real(unpack(source, folder), new)
        else:
            if not synthetic:
                print_main(NOT_REAL)
            write_synthetic(new)
        # incomplete: from an older version, or changed
        if out.exists():
            out.replace(folder / "old")
        new.replace(out)
    print_main(f"sample data: made {out} ({kind_of(out)})")
    return listing


def is_complete(out: Path) -> bool:
    """Return whether all files of the data set exist."""
    return all((out / name).exists() for name in ("dataset.json", "README.txt", *IMAGES, *LABELS))


def is_synthetic(out: Path) -> bool:
    """Return whether the data set in `out` is synthetic."""
    return bool(json.loads((out / "dataset.json").read_text())["synthetic"])


def kind_of(out: Path) -> str:
    return "synthetic, NOT REAL CT" if is_synthetic(out) else "real CT"


# ---------------------------------------------------------------- the real scans


def download(folder: Path) -> Path | None:
    """Download the source archive of the package by name. Return None without a network (or without pip)."""
    print_main(f"sample data: downloading {PACKAGE} {VERSION} (38 MB)")
    source = ["--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}"]
    quiet = ["-q", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    command = [sys.executable, "-m", "pip", "download", *quiet, "-d", str(folder / "download"), *source]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        problem = "".join(done.stderr.strip().splitlines()[-1:])
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    found = sorted((folder / "download").glob("*.tar.gz"))
    if not found:
        print_main(f"sample data: the download failed ({problem or 'no archive was found'})")
    return found[0] if found else None


def unpack(archive: Path, folder: Path) -> Path:
    """Check the hash of the archive, extract the wanted files, and return the folder that holds them."""
    with naming_errors(archive, "cannot be read"):
        found = file_sha256(archive)
    if found != SHA256:
        raise InputError(f"{archive}: found the SHA-256 {found}, expected {SHA256} of {PACKAGE} {VERSION}")
    with tarfile.open(archive) as tar:
        # without `extractall`, whose safe filter needs Python 3.11.4
        for member in tar:
            if member.isfile() and member.name.startswith(tuple(FILES + name for name in WANTED)):
                target = folder / "unpacked" / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    return folder / "unpacked" / FILES


def write_real(source: Path, out: Path) -> None:
    """Write the sample files of the package in the layout of the data set, labels with BTCV's ids."""
    import nibabel as nib
    import numpy as np
    from monai.transforms import Orientation

    from common.data.volume_io import read_image, read_label
    from scripts.synthetic_ct import write_nifti

    copies = {source / "example_ct.nii.gz": IMAGES[0], source / "aorta_report/example_ct.nii.gz": IMAGES[2]}
    copies |= {path: f"{IMAGES[1]}/{path.name}.dcm" for path in (source / "example_ct_dicom").iterdir()}
    for path, name in copies.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out / name)
    ids = np.zeros(256, np.uint8)
    ids[list(TO_BTCV)] = list(TO_BTCV.values())
    label = nib.load(source / "example_seg_fast_force_split.nii.gz")
    write_nifti(out / LABELS[0], ids[np.asarray(label.dataobj, np.uint8)], label.affine)
    scan = read_image(out / IMAGES[1])
    # its axes are flipped relative to those of the series
    label = read_label(source / "example_seg_dicom.nii.gz", scan)
    axes = "".join(nib.aff2axcodes(np.asarray(scan.meta["original_affine"])))
    label = Orientation(axes, labels=None)(label)
    write_nifti(out / LABELS[1], ids[label.numpy()[0]], label.affine.numpy())
    describe(out, synthetic=False)


# ---------------------------------------------------------------- synthetic scans

KIDNEYS = (2, 3)


def write_synthetic(out: Path) -> None:
    """Write synthetic volumes in the same layout."""
    from scripts.synthetic_ct import affine_of, phantom, write_dicom, write_nifti

    for number, (shape, spacing) in enumerate((((112, 96, 80), (3, 3, 3)), ((160, 128, 48), (2, 2, 3)))):
        # the real second scan has no kidneys either
        hu, label = phantom(shape, seed=number, without=KIDNEYS if number == 1 else ())
        affine = affine_of(shape, spacing)
        if number == 0:
            write_nifti(out / IMAGES[0], hu, affine)
        else:
            write_dicom(out / IMAGES[1], hu, affine)
        write_nifti(out / LABELS[number], label, affine)
    hu, _ = phantom((96, 96, 96), seed=2)
    write_nifti(out / IMAGES[2], hu, affine_of(hu.shape, (3, 3, 3)))
    describe(out, synthetic=True)


def describe(out: Path, synthetic: bool) -> None:
    """Write dataset.json and README.txt."""
    if synthetic:
        source, labels_by = "made by scripts/synthetic_ct.py, NOT REAL CT", "synthetic"
        licence = "Apache-2.0 (this project)"
    else:
        source = f"sample files of {PACKAGE} {VERSION} (Wasserthal et al., Radiology: AI 2023), by package name"
        labels_by, licence = f"a model ({PACKAGE}), not experts", "Apache-2.0 (TotalSegmentator)"
    training = [
        {"image": IMAGES[0], "label": LABELS[0], "fold": 1},
        {"image": IMAGES[1], "label": LABELS[1], "fold": 0},
    ]
    listing = {
        "name": "sample_abdomen",
        "description": f"two abdominal CT scans with BTCV's classes and a chest CT: {source}",
        "licence": licence,
        "synthetic": synthetic,
        "labels_by": labels_by,
        "modality": {"0": "CT"},
        "labels": {"0": "background"} | {str(number): name for number, name in ORGANS.items()},
        "numTraining": len(training),
        "numTest": 0,
        "training": training,
        # without the scan that validates
        "pretraining": [{"image": IMAGES[0]}, {"image": IMAGES[2]}],
        "test": [],
    }
    readme = f"""sample_abdomen, made by `python -m scripts.make_sample_data`

Source:  {source}
Licence: {licence}
Labels:  made by {labels_by}; BTCV's 13 ids. Mention this with every score on them.

{IMAGES[0]}   abdomen and pelvis; trains (fold 1), and pretrains
{IMAGES[1]}/          another patient, upper abdomen, a DICOM series; validates (fold 0)
{IMAGES[2]}     chest, a third patient; pretrains, has no labels
dataset.json               these as a list in the Decathlon's layout
"""
    for name, text in (("README.txt", readme), ("dataset.json", json.dumps(listing, indent=1) + "\n")):
        save_bytes(out / name, text.encode())


if __name__ == "__main__":
    sys.exit(run_program(main))
