"""Checks a folder against what is published of a data set, and finds the files that a recipe needs in it.

Folders above the published names make no difference: `RawData/Training/img/img0001.nii.gz` is found as
`img/img0001.nii.gz`. Nothing is written here; scripts/prepare.py makes the links.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.data import nifti
from common.data.datalist import read_cases
from common.errors import InputError
from common.runlog import progress
from Finetune.cases import expression, map_values
from Finetune.presets import Preset
from Pretrain import catalog
from Pretrain.catalog import Source

# folders that a Mac adds to archives
CLUTTER = "__MACOSX"
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
EMPTY = "{path}: found an empty file (0 bytes)"


@dataclass
class Findings:
    """What a folder holds of a data set.

    `links` are the paths of the recipe's layout, and the files or folders that they stand for; `pairs` are the images
    among them, with their labels.
    """

    links: dict[str, Path] = field(default_factory=dict)
    pairs: list[tuple[Path, Path | None]] = field(default_factory=list)
    # published, but not found
    missing: list[str] = field(default_factory=list)
    # found, but not as published
    wrong: list[str] = field(default_factory=list)
    # more than is published
    more: list[str] = field(default_factory=list)
    # whether a number was compared with a published one
    compared: bool = False
    # scans in the folders, where these are linked instead of volumes
    scans: int = 0

    def add(self, targets: Sequence[str], files: Sequence[Path]) -> None:
        """Add a case: its image, and its label where it has one."""
        self.links |= dict(zip(targets, files))
        self.pairs.append((files[0], files[1] if len(files) > 1 else None))

    def compare(self, where: Path, count: int, published: int, what: str) -> None:
        """Compare a number with a published one: fewer are missing, more are named."""
        self.compared = True
        if count < published:
            self.missing.append(f"{where}: found {count} of {published} {what}")
        elif count > published:
            self.more.append(f"{where}: found {count}, more than the {published} {what}")


def inspect(preset: Preset, source: Path) -> Findings:
    """Return what `source` holds of the data set of a preset. The content of the files is not read."""
    if preset.published.folders:
        return _folders(preset, source)
    return _listed(preset, source) if preset.layout.datalist else _matched(preset, source)


def inspect_source(data: Source, source: Path) -> Findings:
    """Return what `source` holds of a pretraining data set, whose folder is linked as a whole."""
    found = Findings()
    volumes, _ = catalog.find_in(data, source)
    if not volumes:
        found.missing.append(f"{source}: found no volume, expected {data.layout}")
        return found
    found.links[data.folders[0]] = source
    found.pairs = [(case.image, None) for case in volumes]
    if data.published:
        found.compare(source, len(volumes), data.published, "published volumes")
    return found


# ---------------------------------------------------------------- presets


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, links to folders followed once, without hidden ones."""
    visited = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = sorted(name for name in folders if name[0] != "." and name != CLUTTER)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        yield from (Path(place, name) for name in sorted(files) if name[0] != ".")


def _matched(preset: Preset, source: Path) -> Findings:
    found, layout, published = Findings(), preset.layout, preset.published
    files = list(files_below(source))
    for number, (patterns, endings) in enumerate(zip(zip(layout.images, layout.labels), _endings(preset))):
        images, labels = (_by_case(files, source, ending, preset, found) for ending in endings)
        expected = published.all_ids() if number == 0 else []
        for case in sorted({*images, *expected}):
            targets = [pattern.replace("{case}", case) for pattern in patterns]
            absent = [target for target, by_case in zip(targets, (images, labels)) if case not in by_case]
            found.missing += [f"{source}: found no {name}" for name in absent]
            if not absent:
                found.add(targets, [images[case], labels[case]])
        if expected:
            found.compare(source, len({*images, *expected}), len(expected), "published cases")
        elif published.cases:
            found.compare(source, len(images), published.cases[number], f"files {patterns[0]}")
        elif not images:
            found.missing.append(f"{source}: found no file {patterns[0]}")
    return found


def _endings(preset: Preset) -> list[tuple[str, str]]:
    """Return what the paths of (images, labels) end in, for each pattern of the layout: the name of the file, or where
    several patterns share a name (as in imagesTr and labelsTr) the whole pattern."""
    patterns = list(zip(preset.layout.images, preset.layout.labels))
    names = [tuple(pattern.rsplit("/", 1)[-1] for pattern in pair) for pair in patterns]
    flat = [name for pair in names for name in pair]
    return names if len(set(flat)) == len(flat) else patterns


def _by_case(files: Sequence[Path], source: Path, ending: str, preset: Preset, found: Findings) -> dict[str, Path]:
    """Return case -> file for the files whose path ends as the pattern says."""
    wanted = re.compile(f"(?:.*/)?{expression(ending, preset.layout)}")
    by_case: dict[str, Path] = {}
    for path in files:
        match = wanted.fullmatch(path.relative_to(source).as_posix())
        if match is None:
            continue
        first = by_case.setdefault(match["case"], path)
        if not os.path.samefile(first, path):
            found.wrong.append(f"{path}: found twice, also as {first}; give the folder of one copy as --source")
    return by_case


def _listed(preset: Preset, source: Path) -> Findings:
    found, name = Findings(), preset.layout.datalist
    lists = [path for path in files_below(source) if path.name == Path(name).name]
    if len(lists) != 1:
        where = f": {', '.join(str(path.parent) for path in lists)}; give one as --source" if lists else ""
        (found.wrong if lists else found.missing).append(
            f"{source}: found {len(lists)} files {name}, expected one{where}"
        )
        return found
    folder = lists[0].parent
    found.links[name] = lists[0]
    cases = read_cases(lists[0])
    for case in cases:
        files = [case.image, case.label] if case.label else [case.image]
        if not case.label:
            found.wrong.append(f"{lists[0]}: found {case.name} without a label")
        absent = [path for path in files if not path.exists()]
        found.missing += [f"{path}: listed in {name}, and not there" for path in absent]
        if not absent:
            found.add([os.path.relpath(path, folder) for path in files], files)
    prefix = preset.published.prefix
    if others := [case.image.name for case in cases if not case.image.name.lower().startswith(prefix.lower())]:
        expected = f"expected names that start with {prefix}; this is not the list of {preset.name}"
        found.wrong.append(f"{lists[0]}: found {others[0]}, {expected}")
    stated, published = _stated_number(lists[0]), preset.published.cases
    # where both numbers are equal, the message names the published one
    numbers = ({} if stated is None else {stated: "cases of numTraining"}) | dict.fromkeys(published, "published cases")
    for number, what in numbers.items():
        found.compare(lists[0], len({case.image for case in cases}), number, what)
    return found


def _stated_number(path: Path) -> int | None:
    """Return the number of training cases that a Decathlon list states, None if it states no number."""
    number = json.loads(path.read_text()).get("numTraining")
    return number if type(number) is int else None


def _folders(preset: Preset, source: Path) -> Findings:
    found = Findings()
    for name in preset.published.folders:
        folders = [path for path in (source / name, *source.glob(f"*/{name}")) if path.is_dir()]
        scans = [scan for folder in folders[:1] for scan in folder.glob("*/*") if scan.is_dir()]
        if not scans:
            found.missing.append(f"{source}: found no {name}/PATIENT/SCAN")
        elif len(folders) > 1:
            found.wrong.append(f"{source}: found {name} in several places: {', '.join(map(str, folders))}")
        else:
            found.links[name] = folders[0]
        found.scans += len(scans)
        for scan in scans:
            pictures = sorted(path for path in scan.iterdir() if path.suffix.lower() in PICTURES)
            found.wrong += [EMPTY.format(path=path) for path in pictures if _is_empty(path)]
            if not pictures:
                found.wrong.append(f"{scan}: found no picture")
    return found


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


# ---------------------------------------------------------------- content


def check_contents(found: Findings, preset: Preset | None) -> None:
    """Check that every file is complete, and every label: its shape and its values. Adds to `found.wrong`."""
    for image, label in progress(found.pairs, desc="check", unit="case"):
        try:
            shape = _shape(image)
            if preset and label:
                _check_label(label, image, shape, preset)
        except InputError as error:
            found.wrong.append(str(error))


def _shape(path: Path) -> tuple[int, ...] | None:
    """Return the shape of a NIfTI file. InputError when a file is not complete; of other formats, when it is empty."""
    if path.name.lower().endswith((".nii", ".nii.gz")):
        return nifti.read_shape(path)
    if _is_empty(path):
        raise InputError(EMPTY.format(path=path))
    return None


def _check_label(label: Path, image: Path, shape: tuple[int, ...], preset: Preset) -> None:
    channels = shape[3] if len(shape) > 3 else 1
    if channels != preset.channels:
        raise InputError(f"{image}: found {channels} channels, expected {preset.channels} (preset {preset.name})")
    values, _ = nifti.read(label)
    if values.shape[:3] != shape[:3]:
        raise InputError(f"{label}: found a label of shape {values.shape[:3]}, expected {shape[:3]} as its image")
    map_values(np.unique(values), preset, label)
