"""Presets: one YAML per data set in Finetune/datasets/, with the keys of `Preset` below.

`load_preset("BTCV")` reads one of them, `load_preset("my/own.yaml")` a custom one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import did_you_mean, read_yaml, setting
from common.data.preprocessing import Preprocessing
from common.data.published import Published
from common.errors import InputError, one_line

DATASETS = Path(__file__).parent / "datasets"


@dataclass(frozen=True)
class Layout:
    """Where a published data set has its files: a Decathlon `datalist`, or patterns with `{case}`."""

    datalist: str | None = setting(None, "Decathlon JSON relative to the data folder, e.g. dataset.json")
    images: tuple[str, ...] = setting((), "patterns of the image files, e.g. img/img{case}.nii.gz")
    labels: tuple[str, ...] = setting((), "patterns of the label files, one for each pattern of images")
    case: str = setting("[^/]+?", "regular expression for {case}, e.g. the numbers of the CT scans in a mixed set")
    classes: dict[str, int] = setting({}, "classification: folder of a volume -> class number")
    patient: str | None = setting(None, "regular expression for the start of names; the same start, the same fold")


def probability(help: str = "") -> float:
    """Return a setting for a probability, 0 by default."""
    return setting(0.0, help, least=0, most=1)


@dataclass(frozen=True)
class Augmentation:
    """Probabilities per crop, and ranges. Axes are numbered 0, 1, 2 in RAS order: left-right, back-front, down-up."""

    flip: float = probability("per axis of flip_axes")
    flip_axes: tuple[int, ...] = setting((0, 1, 2), "axes to flip, also for Finetune.predict --flips", least=0, most=2)
    rotate90: float = probability("one to three quarter turns in the plane of the first two axes, if they are equal")
    shift_intensity: float = probability("add up to +-0.1 on the scale of [0, 1]")
    scale_intensity: float = probability("multiply by up to 1 +- 0.1")
    gamma: float = probability("raise to a power within gamma_range, on the scale of the crop's minimum and maximum")
    gamma_range: tuple[float, float] = setting((0.7, 1.5), "smallest and largest power", above=0)
    noise: float = probability("Gaussian, standard deviation 0.01")
    affine: float = probability("rotation, zoom and translation together, with one interpolation")
    rotation: tuple[float, float, float] = setting((0.0, 0.0, 12.0), "largest angle about each axis, degrees", least=0)
    zoom: float = setting(0.1, "zoom by up to 1 +- this, per axis", least=0, below=1)
    translation: float = setting(0.0, "largest shift along each axis, as a fraction of the crop", least=0, below=1)


@dataclass(frozen=True)
class Preset:
    """A data set: what its files hold, how they are preprocessed, which cases validate."""

    name: str
    description: str
    labels: dict[int, str] = setting(help="id -> name; 0 is the background")
    roi: tuple[int, int, int] = setting(help="voxels (D, H, W) of a crop and of the sliding window", least=1, most=1024)
    intensity: Literal["window", "percentiles", "zscore"] = setting(help="how intensities are scaled")
    layout: Layout = setting(help="where the files are")
    task: Literal["segmentation", "classification"] = "segmentation"
    modality: str = "CT"
    channels: int = setting(1, "channels of the image", least=1, most=1024)
    spacing: tuple[float, float, float] | None = setting(None, "mm, RAS axes; none: that of the file", above=0)
    low: float = setting(-175.0, "scaled to 0: HU for window, percent for percentiles")
    high: float = setting(250.0, "scaled to 1: HU for window, percent for percentiles")
    foreground_threshold: float | None = setting(0.05, "crop to the image voxels above this; none: do not crop")
    patch_size: tuple[int, int, int] = setting((16, 16, 16), "of an encoder from random weights", least=1, most=1024)
    label_values: dict[int, int] = setting({}, "value in the label files -> id, if they differ")
    regions: dict[str, tuple[int, ...]] = setting({}, "overlapping regions (sigmoid): name -> ids whose union it is")
    augmentation: Augmentation = Augmentation()
    nsd_tolerance: float = setting(2.0, "mm", least=0)
    labels_by: str = setting("experts", "who drew the reference labels; printed on the score card")
    folds: int = setting(5, "number of folds, unless the list has folds", least=2)
    validation: tuple[str, ...] = setting((), "cases of fold 0; the others fill the other folds in order")
    validation_cases: int | None = setting(None, "size of fold 0 if its cases are not named; none: equal", least=1)
    clean_folds: tuple[int, ...] = setting((), "folds that no published pretraining list has seen; (): none is known")
    leak: str = setting("", "what is wrong with the other folds; printed by runs from a checkpoint, and on their card")
    label_order: tuple[str, ...] = setting((), "training cases in the order in which --label_count takes them")
    published: Published | None = setting(None, "what the download holds, for scripts.prepare")

    @property
    def preprocessing(self) -> Preprocessing:
        names = ("spacing", "intensity", "low", "high", "foreground_threshold", "channels")
        modality = "CT" if self.modality == "CT" else "any"
        return Preprocessing(**{name: getattr(self, name) for name in names}, modality=modality)

    @property
    def foreground(self) -> dict[int, str]:
        """The classes without the background: id -> name."""
        return {number: name for number, name in self.labels.items() if number != 0}

    @property
    def out_channels(self) -> int:
        """Channels of the logits: regions (sigmoid), or classes including the background (softmax)."""
        return len(self.regions) or len(self.labels)

    def scored(self) -> dict[str, tuple[int, ...]]:
        """Return what is scored: name -> ids whose union it is."""
        return self.regions or {name: (number,) for number, name in self.foreground.items()}


def available() -> list[str]:
    """Return the names of the presets in Finetune/datasets/."""
    return sorted(path.stem for path in DATASETS.glob("*.yaml"))


def load_preset(name_or_path: str | Path) -> Preset:
    """Return a preset by its name, or a custom one by the path of its YAML.

    Raises:
        InputError: there is no such preset, or its values are wrong or contradict each other.
    """
    text = str(name_or_path)
    path = DATASETS / f"{text}.yaml" if text in available() else Path(text)
    if path.suffix in (".yaml", ".yml"):
        return check(read_yaml(path, Preset), path)
    hint = did_you_mean(text, available())
    raise InputError(f"--preset {text}: unknown preset; {hint}expected a YAML or one of {', '.join(available())}")


def check(preset: Preset, where: str | Path) -> Preset:
    """Return the preset. InputError if its values contradict each other; `where` names its file."""
    for problems in (_label_problems, _image_problems, _augmentation_problems, _layout_problems):
        for problem in problems(preset):
            raise InputError(f"{where}: {problem}")
    return preset


def _label_problems(preset: Preset) -> Iterator[str]:
    ids, names = sorted(preset.labels), list(preset.labels.values())
    if ids != list(range(len(ids))):
        yield f"labels: found the ids {ids}, expected 0 (the background), 1, 2, ... without a gap"
    if not 2 <= len(ids) <= 255:
        yield f"labels: found {len(ids)}, expected 2 to 255 with the background"
    for name in names:
        if names.count(name) > 1:
            yield f"labels: found the name '{name}' twice"
    for name, numbers in preset.regions.items():
        if not numbers:
            yield f"regions: found no id in '{name}'"
    for name, numbers in {**preset.regions, "label_values": preset.label_values.values()}.items():
        if not set(numbers) <= set(ids):
            yield f"{name}: found the ids {sorted(numbers)}, expected those of labels, {ids}"


def _image_problems(preset: Preset) -> Iterator[str]:
    if any(size % patch for size, patch in zip(preset.roi, preset.patch_size)):
        yield f"roi: found {preset.roi}, expected multiples of the patch size {preset.patch_size}"
    try:
        _ = preset.preprocessing
    except InputError as error:
        yield str(error)


def _augmentation_problems(preset: Preset) -> Iterator[str]:
    axes, (low, high) = preset.augmentation.flip_axes, preset.augmentation.gamma_range
    if len(set(axes)) != len(axes):
        yield f"augmentation: flip_axes: found {axes}, expected each axis once"
    if low >= high:
        yield f"augmentation: gamma_range: found {(low, high)}, expected the smaller number first"


def _layout_problems(preset: Preset) -> Iterator[str]:
    layout = preset.layout
    if (layout.datalist is None) == (not layout.images):
        yield "layout: expected either 'datalist' or 'images' and 'labels'"
    if preset.task == "segmentation" and len(layout.images) != len(layout.labels):
        yield f"layout: found {len(layout.labels)} patterns of labels, expected {len(layout.images)} as of images"
    for name in ("case", "patient"):
        try:
            re.compile(getattr(layout, name) or "")
        except re.error as error:
            yield f"layout: {name}: found '{getattr(layout, name)}', expected a regular expression: {one_line(error)}"
    if preset.published and len(preset.published.cases) not in (0, max(1, len(layout.images))):
        yield f"published: found {len(preset.published.cases)} numbers of cases, expected one per pattern of images"
    numbers = sorted(set(layout.classes.values()))
    if preset.task == "classification" and numbers != sorted(preset.labels):
        yield f"layout: classes: found the numbers {numbers}, expected {sorted(preset.labels)}"
    for pattern in (*layout.images, *layout.labels):
        if "{case}" not in pattern:
            yield f"layout: found '{pattern}', expected {{case}} in it"
