"""Which files a preset means: cases from a published folder layout, folds, and nested subsets of few labels."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from common.data import volume_io
from common.data.datalist import ENDINGS, Case, read_cases, stem
from common.data.nifti import write_nifti
from common.data.sampler import mix
from common.errors import InputError
from common.runlog import print_main, progress
from Finetune.presets import Layout, Preset


def find_cases(preset: Preset, data: str | Path, root: str | Path | None = None) -> list[Case]:
    """The labelled cases of a data set: `data` is its folder in the published layout, or a Decathlon JSON of one's own,
    whose relative paths start from `root` (`read_cases`).

    Raises InputError when nothing is there, or a label is missing.
    """
    data = Path(data)
    if not data.exists():
        raise InputError(f"{data}: no such folder or list; needs the data of preset {preset.name}")
    if data.is_file():
        return _labelled(read_cases(data, root), data)
    if preset.layout.datalist:
        datalist = data / preset.layout.datalist
        if not datalist.is_file():
            raise InputError(f"{data}: found no {preset.layout.datalist}, which preset {preset.name} needs there")
        return _labelled(read_cases(datalist, root), datalist)
    return _from_patterns(preset, data)


def _labelled(cases: list[Case], where: Path) -> list[Case]:
    without = [case.name for case in cases if case.label is None]
    if without or not cases:
        found = f"{len(without)} cases without a label ({', '.join(without[:3])})" if cases else "no case"
        raise InputError(f"{where}: found {found}, fine-tuning needs labelled cases")
    return cases


def _from_patterns(preset: Preset, data: Path) -> list[Case]:
    cases, missing = [], []
    layout = preset.layout
    for position, pattern in enumerate(layout.images):
        for path in sorted(data.glob(pattern.replace("{case}", "*"))):
            match = re.fullmatch(_expression(pattern, layout), path.relative_to(data).as_posix())
            if not match:
                continue
            label = data / layout.labels[position].replace("{case}", match["case"]) if layout.labels else None
            if label and not label.exists():
                missing.append(str(label))
            cases.append(Case(name=stem(path), image=path, label=label, fold=None))
    if missing:
        raise InputError(f"{missing[0]}: this label is missing (one of {len(missing)})")
    names = [case.name for case in cases]
    double = next((case for case in cases if names.count(case.name) > 1), None)
    if double:
        raise InputError(f"{double.image}: two images are called {double.name}, a case's name must be its own")
    if not cases:
        raise InputError(f"{data}: found no image, preset {preset.name} expects {' or '.join(layout.images)} there")
    return cases


def _expression(pattern: str, layout: Layout) -> str:
    parts = [re.escape(part) for part in pattern.split("{case}")]
    return f"(?P<case>{layout.case})".join(parts[:2]) + "".join("(?P=case)" + part for part in parts[2:])


def class_of(preset: Preset, image: Path) -> int:
    """Classification: the class number of an image, by the folder that holds it."""
    for folder in image.parts[::-1]:
        if folder in preset.layout.classes:
            return preset.layout.classes[folder]
    raise InputError(f"{image}: no folder above it is one of {', '.join(preset.layout.classes)}")


def label_for(preset: Preset, name: str, labels: Path) -> Path | None:
    """The label file of the prediction called `name`: the one that the layout pairs with it (label0035 for img0035), in
    the folder `labels` or where the layout has it below that folder; else the one of the same name."""
    layout = preset.layout
    places = []
    for image, label in zip(layout.images, layout.labels):
        match = re.fullmatch(_expression(stem(image), layout), name)
        if match:
            path = label.replace("{case}", match["case"])
            places += [labels / path, labels / Path(path).name]
    for candidate in (name, name.removesuffix("_0000")):
        places += [labels / f"{candidate}{ending}" for ending in ENDINGS]
    return next((path for path in places if path.is_file()), None)


# ---------------------------------------------------------------- folds and few labels


def split(cases: Sequence[Case], preset: Preset, fold: int) -> tuple[list[Case], list[Case]]:
    """(training, validation) cases: `fold` validates, the rest trains.

    The fold of a case is what its list says; else fold 0 is what the preset names and the rest fills the other folds
    in order; else folds are cut from a shuffled order that depends on the preset's name alone (our choice: the seed of
    a run never moves a case).
    """
    folds = _folds(cases, preset)
    if fold not in folds:
        raise InputError(f"fold: found {fold}, preset {preset.name} on these {len(cases)} cases has {sorted(folds)}")
    validation = folds[fold]
    names = {case.name for case in validation}
    training = [case for case in cases if case.name not in names]
    if not training:
        raise InputError(f"fold {fold}: all {len(cases)} cases are in it, none is left to train on")
    return training, validation


def _folds(cases: Sequence[Case], preset: Preset) -> dict[int, list[Case]]:
    if any(case.fold is not None for case in cases):
        folds: dict[int, list[Case]] = {}
        for case in cases:
            if case.fold is not None:
                folds.setdefault(case.fold, []).append(case)
        return folds
    by_name = {case.name: case for case in cases}
    first = [by_name[name] for name in preset.validation if name in by_name]
    if preset.validation:
        found = f"{len(first)} of the {len(preset.validation)} validation cases that preset {preset.name} names"
        if not first:
            raise InputError(
                f"{cases[0].image.parent}: found {found} ({preset.validation[0]}, ...); or name folds in a list"
            )
        if len(first) < len(preset.validation):
            print_main(f"warning: found {found}")
        rest = [case for case in cases if case.name not in set(preset.validation)]
        return {0: first} | dict(enumerate(_cut(rest, preset.folds - 1), start=1))
    groups: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.name):
        groups.setdefault(patient_of(case, preset), []).append(case)
    if len(groups) < len(cases):  # several scans of a patient: folds of patients, which differ a little in size
        parts = _cut(_shuffled(groups, f"folds of {preset.name}"), preset.folds)
        return {number: [case for patient in part for case in groups[patient]] for number, part in enumerate(parts)}
    order = _shuffled(sorted(by_name), f"folds of {preset.name}")
    shuffled = [by_name[name] for name in order]
    if preset.validation_cases and preset.validation_cases < len(cases):
        size = preset.validation_cases
        return {0: shuffled[:size]} | dict(enumerate(_cut(shuffled[size:], preset.folds - 1), start=1))
    return dict(enumerate(_cut(shuffled, preset.folds)))


def patient_of(case: Case, preset: Preset) -> str:
    """Who was scanned: the start of the name that the preset's `patient` matches, else the name itself."""
    match = re.match(preset.layout.patient, case.name) if preset.layout.patient else None
    return match[0] if match else case.name


def _cut(cases: Sequence, parts: int) -> list[list]:
    """`parts` runs of equal length, the first ones one longer where it does not divide; empty ones left out."""
    small, larger = divmod(len(cases), max(parts, 1))
    cuts, start = [], 0
    for part in range(parts):
        stop = start + small + (part < larger)
        cuts.append(list(cases[start:stop]))
        start = stop
    return [cut for cut in cuts if cut]


def _shuffled(names: Iterable[str], key: str) -> list[str]:
    """An order that depends on `key` and on each name alone: adding a case does not reshuffle the others."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{key}/{name}".encode()).digest())


def few_labels(
    training: Sequence[Case], preset: Preset, count: int | None = None, fraction: float | None = None, seed: int = 0
) -> list[Case]:
    """The first `count` (or `fraction`) of the training cases in a fixed order, so that smaller subsets are nested in
    larger ones.

    The order is the preset's `label_order`, then the rest shuffled by `seed`.
    """
    if count is None and fraction is None:
        return list(training)
    if count is not None and fraction is not None:
        raise InputError(f"label_count {count} and label_fraction {fraction}: give one of the two")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise InputError(f"label_fraction: found {fraction}, needs more than 0 and at most 1")
        count = max(1, round(fraction * len(training)))
    if not 1 <= count <= len(training):
        raise InputError(f"label_count: found {count}, there are {len(training)} training cases")
    by_name = {case.name: case for case in training}
    order = [name for name in preset.label_order if name in by_name]
    order += _shuffled([name for name in by_name if name not in set(order)], f"labels {mix(seed)}")
    return [by_name[name] for name in order[:count]]


# ---------------------------------------------------------------- label values


def map_values(values: np.ndarray, preset: Preset, where: str | Path, or_ids: bool = False) -> np.ndarray:
    """Label values of a file as the preset's ids, uint8; with `or_ids` (predictions) the file may hold ids already.
    InputError names a value that the preset does not know."""
    identity = {number: number for number in preset.labels}
    tables = [identity] if or_ids else []
    for known in [*tables, preset.label_values or identity]:
        ids, unknown = np.zeros(values.shape, np.uint8), np.ones(values.shape, bool)
        for value, number in known.items():
            here = values == value
            ids[here] = number
            unknown &= ~here
        if not unknown.any():
            return ids
    raise InputError(
        f"{where}: found the label value {values[unknown][0]:g}, preset {preset.name} allows {sorted(known)}"
    )


def with_mapped_labels(cases: Sequence[Case], preset: Preset, folder: Path) -> list[Case]:
    """The cases with labels whose values are ids: themselves, or copies below `folder` where the preset maps values
    (made once)."""
    if not preset.label_values:
        return list(cases)
    mapped = []
    for case in progress(cases, desc="map label values", unit="case"):
        if case.problem:
            mapped.append(case)
            continue
        stat = case.label.stat()
        key = f"{case.label.resolve()} {stat.st_size} {stat.st_mtime_ns} {sorted(preset.label_values.items())}"
        target = folder / f"{case.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.nii.gz"
        if not target.exists():
            label = volume_io.load(case.label, channels=1)
            ids = map_values(label[0].numpy(), preset, case.label)
            write_nifti(target, nib.Nifti1Image(ids, label.affine.numpy()))
        mapped.append(replace(case, label=target))
    return mapped


def check_classes(entries: Sequence, preset: Preset) -> None:
    """InputError for a cached case whose label holds an id outside the preset."""
    for entry in entries:
        unknown = sorted(set(map(int, entry.class_points)) - set(preset.labels))
        if unknown:
            raise InputError(
                f"{entry.source}: its label holds the id {unknown[0]}, "
                f"preset {preset.name} allows 0..{len(preset.labels) - 1}"
            )
