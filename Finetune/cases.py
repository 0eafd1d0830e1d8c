"""The cases of a preset: files in a published folder layout, folds, nested subsets of few labels, label values."""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from common.cache.volume import CachedVolume
from common.config import shown
from common.data import volume_io
from common.data.datalist import ENDINGS, Case, read_cases, stem
from common.data.nifti import write_nifti
from common.data.sampler import mix
from common.errors import InputError
from common.files import digest
from common.runlog import print_main, progress
from Finetune.evaluation.statistics import grouped
from Finetune.presets import Layout, Preset


def find_cases(preset: Preset, data: str | Path, root: str | Path | None = None) -> list[Case]:
    """Return the labelled cases of a data set.

    Args:
        data: the folder of the data set in its published layout, or a custom Decathlon JSON.
        root: where the relative paths of the JSON start, as in `read_cases`.

    Raises:
        InputError: no case is found, or a label is missing.
    """
    data = Path(data)
    if not data.exists():
        raise InputError(f"{data}: no such folder or list; expected the data of preset {preset.name}")
    if data.is_dir() and not preset.layout.datalist:
        return _from_patterns(preset, data)
    datalist = data / preset.layout.datalist if data.is_dir() else data
    if not datalist.is_file():
        raise InputError(f"{data}: found no {preset.layout.datalist}, which preset {preset.name} expects there")
    cases = read_cases(datalist, root)
    if without := [case.name for case in cases if case.label is None]:
        raise InputError(f"{datalist}: found {len(without)} cases without a label ({', '.join(without[:3])})")
    return cases


def _from_patterns(preset: Preset, data: Path) -> list[Case]:
    layout, cases = preset.layout, {}
    for image_pattern, label_pattern in zip(layout.images, layout.labels or [None] * len(layout.images)):
        for path in sorted(data.glob(image_pattern.replace("{case}", "*"))):
            match = re.fullmatch(expression(image_pattern, layout), path.relative_to(data).as_posix())
            if not match:
                continue
            if stem(path) in cases:
                raise InputError(f"{path}: another image is called {stem(path)}, too")
            label = data / label_pattern.replace("{case}", match["case"]) if label_pattern else None
            cases[stem(path)] = Case(stem(path), path, label)
    if missing := [case.label for case in cases.values() if case.label and not case.label.exists()]:
        raise InputError(f"{missing[0]}: this label is missing (one of {len(missing)})")
    if not cases:
        raise InputError(f"{data}: found no image, expected {' or '.join(layout.images)} (preset {preset.name})")
    return list(cases.values())


def expression(pattern: str, layout: Layout) -> str:
    """Return the regular expression of a layout's pattern; its group `case` is what {case} stands for."""
    parts = [re.escape(part) for part in pattern.split("{case}")]
    return f"(?P<case>{layout.case})".join(parts[:2]) + "".join("(?P=case)" + part for part in parts[2:])


def class_of(preset: Preset, image: Path) -> int:
    """Return the class number of an image by the folder that holds it. InputError if none is a class."""
    for folder in image.parts[::-1]:
        if folder in preset.layout.classes:
            return preset.layout.classes[folder]
    raise InputError(f"{image}: expected in one of the folders {', '.join(preset.layout.classes)}")


def label_for(preset: Preset, name: str, labels: Path) -> Path | None:
    """Return the label file for the image or prediction called `name`, None if there is none.

    It is the one that the layout pairs with the name (label0035 for img0035), in the folder `labels` or where the
    layout has it below that folder; else the file of the same name.
    """
    layout = preset.layout
    places = []
    for image, label in zip(layout.images, layout.labels):
        match = re.fullmatch(expression(stem(image), layout), name)
        if match:
            path = label.replace("{case}", match["case"])
            places += [labels / path, labels / Path(path).name]
    for candidate in (name, name.removesuffix("_0000")):
        places += [labels / f"{candidate}{ending}" for ending in ENDINGS]
    return next((path for path in places if path.is_file()), None)


# ---------------------------------------------------------------- folds and few labels


def split(cases: Sequence[Case], preset: Preset, fold: int) -> tuple[list[Case], list[Case]]:
    """Return the (training, validation) cases: `fold` validates, the others train.

    Folds are those of the list. Without them, fold 0 has the cases that the preset names and the others fill the other
    folds in order; or folds are taken from a shuffled order that depends on the preset's name only, so that the seed of
    a run never moves a case (our choice).

    Raises:
        InputError: there is no such fold, it has all cases, or none of the named cases is found.
    """
    folds = folds_of(cases, preset)
    if fold not in folds:
        raise InputError(f"--fold {fold}: must be one of {shown(sorted(folds))} for these {len(cases)} cases")
    validation = folds[fold]
    names = {case.name for case in validation}
    training = [case for case in cases if case.name not in names]
    if not training:
        raise InputError(f"--fold {fold}: has all {len(cases)} cases, none is left for training")
    return training, validation


def folds_of(cases: Sequence[Case], preset: Preset) -> dict[int, list[Case]]:
    """Return fold -> the cases that validate in it, as `split` divides them.

    Raises:
        InputError: none of the cases that the preset names is found.
    """
    if listed := [case for case in cases if case.fold is not None]:
        return grouped(listed, lambda case: case.fold)
    if preset.validation:
        return _named_folds(cases, preset)
    patients = grouped(sorted(cases, key=lambda case: case.name), lambda case: patient_of(case, preset))
    if len(patients) == len(cases):
        patients = {case.name: [case] for case in cases}
    order, size = _shuffled(patients, f"folds of {preset.name}"), preset.validation_cases
    if size and size < len(cases) and len(patients) == len(cases):
        parts = [order[:size], *_parts(order[size:], preset.folds - 1)]
    else:
        # folds of patients, so they differ in size if some have several scans
        parts = _parts(order, preset.folds)
    return {number: [case for name in part for case in patients[name]] for number, part in enumerate(parts)}


def _named_folds(cases: Sequence[Case], preset: Preset) -> dict[int, list[Case]]:
    by_name = {case.name: case for case in cases}
    first = [by_name[name] for name in preset.validation if name in by_name]
    found = f"found {len(first)} of the {len(preset.validation)} validation cases that preset {preset.name} names"
    if not first:
        raise InputError(f"{cases[0].image.parent}: {found} ({preset.validation[0]}, ...); or use a list with folds")
    if len(first) < len(preset.validation):
        print_main(f"warning: {found}")
    others = [case for case in cases if case.name not in preset.validation]
    return {0: first} | dict(enumerate(_parts(others, preset.folds - 1), start=1))


def patient_of(case: Case, preset: Preset) -> str:
    """Return the patient of a case: the start of its name that the layout's `patient` matches, else its name."""
    match = re.match(preset.layout.patient, case.name) if preset.layout.patient else None
    return match[0] if match else case.name


def _parts(items: Sequence, count: int) -> list[list]:
    """Return up to `count` consecutive parts of nearly equal length, none of them empty."""
    parts = np.array_split(np.arange(len(items)), min(count, max(1, len(items))))
    return [[items[i] for i in part] for part in parts if len(part)]


def _shuffled(names: Iterable[str], key: str) -> list[str]:
    """Return an order that depends on `key` and each name only, so that a new name does not reshuffle the others."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{key}/{name}".encode()).digest())


def few_labels(
    training: Sequence[Case], preset: Preset, count: int | None = None, fraction: float | None = None, seed: int = 0
) -> list[Case]:
    """Return the first `count`, or the first `fraction`, of the training cases in a fixed order; by default all.

    The order is the preset's `label_order`, then the other cases shuffled by `seed`, so smaller subsets are nested in
    larger ones.

    Raises:
        InputError: both are given, or there are fewer cases.
    """
    if count is None and fraction is None:
        return list(training)
    if count is not None and fraction is not None:
        raise InputError(f"--label_count {count}, --label_fraction {fraction}: expected one of them")
    if fraction is not None:
        count = max(1, round(fraction * len(training)))
    if not 1 <= count <= len(training):
        raise InputError(f"--label_count {count}: must be 1 to {len(training)}, the number of training cases")
    by_name = {case.name: case for case in training}
    order = [name for name in preset.label_order if name in by_name]
    order += _shuffled([name for name in by_name if name not in set(order)], f"labels {mix(seed)}")
    return [by_name[name] for name in order[:count]]


def development_and_test(validation: Sequence[Case], share: float = 0.5) -> tuple[list[Case], list[Case]]:
    """Return the held-out cases as (development, test): settings are chosen on the first, results are of the second.

    The parts depend on the names of the cases only. `share` (0 to below 1) of them, rounded, are for development; with
    two cases or more and a share above 0 neither part is empty. Our choice.
    """
    if not share or len(validation) < 2:
        return [], list(validation)
    count = min(max(1, round(share * len(validation))), len(validation) - 1)
    chosen = set(_shuffled([case.name for case in validation], "development")[:count])
    parts = grouped(validation, lambda case: case.name in chosen)
    return parts[True], parts[False]


# ---------------------------------------------------------------- label values


def map_values(values: np.ndarray, preset: Preset, where: str | Path, or_ids: bool = False) -> np.ndarray:
    """Return the label values (D, H, W) of a file as the preset's ids, uint8 of the same shape.

    Args:
        where: names the file in errors.
        or_ids: the file may also hold ids, as predictions do.

    Raises:
        InputError: a value is neither.
    """
    ids = {number: number for number in preset.labels}
    for table in [ids, preset.label_values or ids] if or_ids else [preset.label_values or ids]:
        known = np.isin(values, list(table))
        if known.all():
            mapped = np.zeros(values.shape, np.uint8)
            for value, number in table.items():
                mapped[values == value] = number
            return mapped
    found, expected = f"{values[~known][0]:g}", shown(sorted(table))
    raise InputError(f"{where}: found the label value {found}, expected one of {expected} (preset {preset.name})")


def with_mapped_labels(cases: Sequence[Case], preset: Preset, folder: Path) -> list[Case]:
    """Return the cases with label files that hold ids: copies in `folder` if the preset has `label_values`.

    Copies are written once.
    """
    if not preset.label_values:
        return list(cases)
    mapped = []
    for case in progress(cases, desc="map label values", unit="case"):
        if case.problem:
            mapped.append(case)
            continue
        stat = case.label.stat()
        key = f"{os.path.realpath(case.label)} {stat.st_size} {stat.st_mtime_ns} {sorted(preset.label_values.items())}"
        target = folder / f"{case.name}-{digest([key])}.nii.gz"
        if not target.exists():
            label = volume_io.load(case.label, channels=1)
            ids = map_values(label[0].numpy(), preset, case.label)
            write_nifti(target, nib.Nifti1Image(ids, label.affine.numpy()))
        mapped.append(replace(case, label=target))
    return mapped


def check_classes(volumes: Sequence[CachedVolume], preset: Preset) -> None:
    """Raise InputError if the label of a volume holds an id that the preset does not have."""
    for volume in volumes:
        unknown = sorted(set(map(int, volume.class_points)) - set(preset.labels))
        if unknown:
            expected = f"0..{len(preset.labels) - 1} (preset {preset.name})"
            raise InputError(f"{volume.source}: found the id {unknown[0]} in its label, expected {expected}")
