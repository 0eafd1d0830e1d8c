"""Make the data set of the demo and of the tests: two abdominal CT with BTCV's classes, and two scans without.

    python -m scripts.make_sample_data --out data/sample_abdomen

The scans are real CT of four patients, from the sample files in the packages TotalSegmentator (Apache-2.0) and slicerio
(MIT), whose other CT files are crops of these scans, or an atlas. A model made the labels, not an expert. Without a
network, labelled synthetic volumes are made instead, with a notice. A second call does nothing.
"""

import gzip
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import parse, run_program
from common.config import setting
from common.errors import InputError
from common.files import file_sha256, naming_errors, save_bytes
from common.runlog import print_main
from Finetune.presets import load_preset


@dataclass(frozen=True)
class Package:
    """A package whose archive holds sample files, and the SHA-256 of that archive."""

    name: str
    version: str
    sha256: str
    # "source" or "wheel": what pip downloads
    kind: str
    megabytes: float
    licence: str

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}"


TOTALSEGMENTATOR = Package(
    "TotalSegmentator",
    "2.18.0",
    "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
    "source",
    38,
    "Apache-2.0",
)
SLICERIO = Package(
    "slicerio", "1.4.0", "ae3432ee06386bfe3b2e8d2d07940411fcbaefab8ed89a3853ee9c5ac19e296b", "wheel", 0.8, "MIT"
)
FILES = f"totalsegmentator-{TOTALSEGMENTATOR.version}/tests/reference_files/"
TRUNK = "slicerio/data/CTChest4.nrrd"
WANTED = (
    "example_ct.nii.gz",
    "example_seg_fast_force_split.nii.gz",
    "example_ct_dicom/",
    "example_seg_dicom.nii.gz",
    "aorta_report/example_ct.nii.gz",
)
ORGANS = load_preset("sample_abdomen").foreground
DEMO_PRESET = Path(__file__).parent / "demo.yaml"
# TotalSegmentator's id -> BTCV's
TO_BTCV = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 7, 7: 11, 8: 12, 9: 13, 15: 5, 52: 8, 63: 9, 64: 10}
# TotalSegmentator's id -> that of scripts/demo.yaml. Bones are all that the package knows, but for costal cartilage and
# the humeri (69, 70): only the scan that is scored shows arms.
BONES = (*range(25, 51), *range(71, 79), *range(91, 117))
TO_STRUCTURES = {5: 1, 1: 2, 6: 3, 52: 4, 79: 6, 86: 7, 87: 7} | dict.fromkeys(BONES, 5)
BTCV_TO_STRUCTURES = {6: 1, 1: 2, 7: 3, 8: 4}
IMAGES = ("imagesTr/abdomen_a.nii.gz", "imagesTs/abdomen_b", "unlabelled/chest.nii.gz", "unlabelled/trunk.nii.gz")
LABELS = ("labelsTr/abdomen_a.nii.gz", "labelsTs/abdomen_b.nii.gz")
STRUCTURES = ("structuresTr/abdomen_a.nii.gz", "structuresTs/abdomen_b.nii.gz")
# the part of the training scan above this share of its height: what the other labelled scan shows, and kidneys
UPPER, LOWEST = "imagesTr/abdomen_a_upper.nii.gz", 0.4
LISTS = ("dataset.json", "structures.json")
NOT_REAL = f"""{"!" * 100}
!! {TOTALSEGMENTATOR.title} OR {SLICERIO.title} COULD NOT BE DOWNLOADED.
!! MAKING SYNTHETIC VOLUMES INSTEAD: ELLIPSES WITH NOISE, NOT CT OF PATIENTS.
!! SCORES ON THEM MEAN NOTHING BEYOND 'IT RUNS'.
{"!" * 100}"""


@dataclass(kw_only=True)
class SampleSettings:
    """Settings of the sample data."""

    out: Path = setting(Path("data/sample_abdomen"), "folder to make")
    synthetic: bool = setting(False, "make synthetic volumes, with or without a network")
    archive: Path | None = setting(None, f"{TOTALSEGMENTATOR.title} as a .tar.gz, instead of downloading it")
    wheel: Path | None = setting(None, f"{SLICERIO.title} as a .whl, instead of downloading it")


def main() -> None:
    settings = parse(SampleSettings, description=__doc__)
    make(settings.out, settings.synthetic, settings.archive, settings.wheel)


def make(out: Path, synthetic: bool = False, archive: Path | None = None, wheel: Path | None = None) -> Path:
    """Make the data set in `out`, unless it is complete, and return its dataset.json.

    Raises:
        InputError: an archive is not the expected one, or `out` cannot be written.
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
        sources = [] if synthetic else obtain(folder, {TOTALSEGMENTATOR: archive, SLICERIO: wheel})
        if sources:
            write_real(unpack(sources[0], folder), sources[1], new)
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
    return all((out / name).exists() for name in (*LISTS, "README.txt", *IMAGES, UPPER, *LABELS, *STRUCTURES))


def is_synthetic(out: Path) -> bool:
    """Return whether the data set in `out` is synthetic."""
    return bool(json.loads((out / "dataset.json").read_text())["synthetic"])


def kind_of(out: Path) -> str:
    return "synthetic, NOT REAL CT" if is_synthetic(out) else "real CT"


# ---------------------------------------------------------------- the real scans


def obtain(folder: Path, given: Mapping[Package, Path | None]) -> list[Path]:
    """Return the archive of each package, the given one or a download. Return [] if one cannot be downloaded."""
    archives = []
    for package, path in given.items():
        path = path or download(package, folder)
        if path is None:
            return []
        check_archive(path, package)
        archives.append(path)
    return archives


def download(package: Package, folder: Path) -> Path | None:
    """Download the archive of a package by name. Return None without a network (or without pip)."""
    print_main(f"sample data: downloading {package.title} ({package.megabytes} MB)")
    source = ["--no-binary" if package.kind == "source" else "--only-binary", package.name]
    quiet = ["-q", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    target = folder / "download" / package.name
    command = [sys.executable, "-m", "pip", "download", *quiet, "-d", str(target), "--no-deps", *source]
    try:
        pinned = f"{package.name}=={package.version}"
        done = subprocess.run([*command, pinned], capture_output=True, text=True, timeout=600)
        problem = "".join(done.stderr.strip().splitlines()[-1:])
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    found = sorted(target.glob("*.tar.gz" if package.kind == "source" else "*.whl"))
    if not found:
        print_main(f"sample data: the download failed ({problem or 'no archive was found'})")
    return found[0] if found else None


def check_archive(archive: Path, package: Package) -> None:
    """Raise InputError unless the archive has the hash of the package."""
    with naming_errors(archive, "cannot be read"):
        found = file_sha256(archive)
    if found != package.sha256:
        raise InputError(f"{archive}: found the SHA-256 {found}, expected {package.sha256} of {package.title}")


def unpack(archive: Path, folder: Path) -> Path:
    """Extract the wanted files of TotalSegmentator's archive, and return the folder that holds them."""
    with tarfile.open(archive) as tar:
        # without `extractall`, whose safe filter needs Python 3.11.4
        for member in tar:
            if member.isfile() and member.name.startswith(tuple(FILES + name for name in WANTED)):
                target = folder / "unpacked" / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    return folder / "unpacked" / FILES


def read_trunk(wheel: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return slicerio's CT of a trunk: HU (D, H, W) int16 and its affine (4, 4) in RAS.

    The file has NRRD's format in its simplest form: a text header, an empty line, and a gzip stream of int32 with the
    first axis fastest. A reader of the format is no requirement of this project.
    """
    header, data = zipfile.ZipFile(wheel).read(TRUNK).split(b"\n\n", 1)
    fields = dict(line.split(": ", 1) for line in header.decode().splitlines() if ": " in line)
    shape = [int(size) for size in fields["sizes"].split()]
    hu = np.frombuffer(gzip.decompress(data), "<i4").reshape(shape, order="F").astype(np.int16)
    vectors = (fields["space directions"] + " " + fields["space origin"]).split()
    affine = np.eye(4)
    affine[:3] = np.array([[float(number) for number in vector.strip("()").split(",")] for vector in vectors]).T
    # left, posterior, superior -> right, anterior, superior
    affine[:2] *= -1
    return hu, affine


def write_real(source: Path, wheel: Path, out: Path) -> None:
    """Write the sample files of the packages in the layout of the data set, labels with BTCV's ids.

    Args:
        source: TotalSegmentator's reference files.
        wheel: slicerio's archive.
    """
    import nibabel as nib
    from monai.transforms import Orientation

    from common.data.volume_io import read_image, read_label
    from scripts.synthetic_ct import write_nifti

    copies = {source / "example_ct.nii.gz": IMAGES[0], source / "aorta_report/example_ct.nii.gz": IMAGES[2]}
    copies |= {path: f"{IMAGES[1]}/{path.name}.dcm" for path in (source / "example_ct_dicom").iterdir()}
    for path, name in copies.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out / name)
    label = nib.load(source / "example_seg_fast_force_split.nii.gz")
    for names, table in ((LABELS, TO_BTCV), (STRUCTURES, TO_STRUCTURES)):
        write_nifti(out / names[0], mapped(np.asarray(label.dataobj, np.uint8), table), label.affine)
    scan = read_image(out / IMAGES[1])
    # its axes are flipped relative to those of the series
    label = read_label(source / "example_seg_dicom.nii.gz", scan)
    axes = "".join(nib.aff2axcodes(np.asarray(scan.meta["original_affine"])))
    label = Orientation(axes, labels=None)(label)
    for names, table in ((LABELS, TO_BTCV), (STRUCTURES, TO_STRUCTURES)):
        write_nifti(out / names[1], mapped(label.numpy()[0], table), label.affine.numpy())
    write_nifti(out / IMAGES[3], *read_trunk(wheel))
    crop_upper(out)
    describe(out, synthetic=False)


def crop_upper(out: Path) -> None:
    """Write the upper part of the training scan, and crop its structures to it."""
    import nibabel as nib

    from common.data.nifti import write_nifti

    for source, target in ((IMAGES[0], UPPER), (STRUCTURES[0], STRUCTURES[0])):
        image = nib.load(out / source)
        # The array is read before its file is replaced.
        upper = image.slicer[..., round(LOWEST * image.shape[2]) :]
        write_nifti(out / target, nib.Nifti1Image(np.asarray(upper.dataobj), upper.affine, upper.header))


def mapped(label: np.ndarray, table: Mapping[int, int]) -> np.ndarray:
    """Return a label map (D, H, W) uint8 with other ids; those that the table lacks become the background."""
    ids = np.zeros(256, np.uint8)
    ids[list(table)] = list(table.values())
    return ids[label]


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
        write_nifti(out / STRUCTURES[number], mapped(label, BTCV_TO_STRUCTURES), affine)
    for seed, name in enumerate(IMAGES[2:], start=2):
        hu, _ = phantom((96, 96, 96), seed=seed)
        write_nifti(out / name, hu, affine_of(hu.shape, (3, 3, 3)))
    crop_upper(out)
    describe(out, synthetic=True)


def describe(out: Path, synthetic: bool) -> None:
    """Write dataset.json, structures.json and README.txt."""
    if synthetic:
        source, labels_by = "made by scripts/synthetic_ct.py, NOT REAL CT", "synthetic"
        licence = "Apache-2.0 (this project)"
    else:
        source = (
            f"sample files of {TOTALSEGMENTATOR.title} (Wasserthal et al., Radiology: AI 2023) and {SLICERIO.title}"
        )
        labels_by = f"a model ({TOTALSEGMENTATOR.name}), not experts"
        licence = ", ".join(f"{package.licence} ({package.name})" for package in (TOTALSEGMENTATOR, SLICERIO))
    training = [
        {"image": IMAGES[0], "label": LABELS[0], "fold": 1},
        {"image": IMAGES[1], "label": LABELS[1], "fold": 0},
    ]
    listing = {
        "name": "sample_abdomen",
        "description": f"two abdominal CT scans with BTCV's classes, a chest and a trunk: {source}",
        "licence": licence,
        "synthetic": synthetic,
        "labels_by": labels_by,
        "modality": {"0": "CT"},
        "labels": {"0": "background"} | {str(number): name for number, name in ORGANS.items()},
        "numTraining": len(training),
        "numTest": 0,
        "training": training,
        # without the scan that validates
        "pretraining": [{"image": IMAGES[0]}, {"image": IMAGES[2]}, {"image": IMAGES[3]}],
        "test": [],
    }
    structures = load_preset(DEMO_PRESET).labels
    labelled = [case | {"label": label} for case, label in zip(training, STRUCTURES)]
    labelled[0]["image"] = UPPER
    changed = {"labels": {str(number): name for number, name in structures.items()}, "training": labelled}
    listings = {"dataset.json": listing, "structures.json": listing | changed}
    readme = f"""sample_abdomen, made by `python -m scripts.make_sample_data`

Source:  {source}
Licence: {licence}
Labels:  made by {labels_by}; BTCV's 13 ids. Mention this with every score on them.

{IMAGES[0]}   abdomen and pelvis; trains (fold 1), and pretrains
{UPPER}   its upper part; trains in the demo
{IMAGES[1]}/          another patient, upper abdomen, a DICOM series; validates (fold 0)
{IMAGES[2]}     chest, a third patient; pretrains, has no labels
{IMAGES[3]}     trunk, a fourth patient, slices of 10 mm; pretrains, has no labels
labelsTr/, labelsTs/       BTCV's ids
structuresTr/, structuresTs/   organs, bones and muscles, ids of scripts/demo.yaml
dataset.json               the scans and BTCV's labels as a list in the Decathlon's layout
structures.json            the same with the labels of the demo
"""
    for name, text in {name: json.dumps(value, indent=1) + "\n" for name, value in listings.items()}.items():
        save_bytes(out / name, text.encode())
    save_bytes(out / "README.txt", readme.encode())


if __name__ == "__main__":
    sys.exit(run_program(main))
