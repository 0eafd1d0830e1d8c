"""Presets: one YAML per data set in Finetune/datasets/, read against the schema below.

`load_preset("BTCV")` takes one of ours, `load_preset("my/own.yaml")` anybody's. A wrong key names itself and the
nearest right one.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import read_yaml, setting
from common.data.preprocessing import Preprocessing
from common.errors import InputError

DATASETS = Path(__file__).parent / "datasets"


@dataclass(frozen=True)
class Layout:
    """Where a published data set keeps its files. Either a Decathlon `datalist`, or patterns with `{case}` relative to
    the data folder."""

    datalist: str | None = setting(None, "Decathlon JSON relative to the data folder, e.g. dataset.json")
    images: tuple[str, ...] = setting((), "patterns of the image files, e.g. img/img{case}.nii.gz")
    labels: tuple[str, ...] = setting((), "patterns of the label files, one for each pattern of images")
    case: str = setting("[^/]+?", "regular expression that {case} must match, e.g. only CT numbers of a mixed set")
    classes: dict[str, int] = setting({}, "classification: folder of a volume -> class number")
    patient: str | None = setting(None, "regular expression at the start of a case's name; its cases share a fold")


@dataclass(frozen=True)
class Augmentation:
    """Probabilities per crop; each axis is flipped on its own."""

    flip: float = 0.0
    rotate90: float = setting(0.0, "one to three quarter turns in the plane of the first two equal axes")
    shift_intensity: float = setting(0.0, "add up to +-0.1 of the [0,1] scale")
    scale_intensity: float = setting(0.0, "multiply by up to 1 +- 0.1")
    affine: float = setting(0.0, "rotation in the plane up to pi/15 and zoom of 0.1")
    noise: float = setting(0.0, "gaussian, standard deviation 0.01")


@dataclass(frozen=True)
class Preset:
    """A data set: what its files mean, how they are preprocessed, which cases validate."""

    name: str
    description: str
    labels: dict[int, str] = setting(help="id -> name; 0 is the background")
    roi: tuple[int, int, int] = setting(help="voxels (D, H, W) of a crop and of the sliding window")
    intensity: Literal["window", "percentiles", "zscore"] = setting(help="how intensities become [0,1], or z-scores")
    layout: Layout = setting(help="where the files are")
    task: Literal["segmentation", "classification"] = "segmentation"
    modality: str = "CT"
    channels: int = setting(1, "channels of the image")
    spacing: tuple[float, float, float] | None = setting(None, "mm, RAS axes; none keeps the file's")
    low: float = setting(-175.0, "window: HU that becomes 0; percentiles: per cent")
    high: float = setting(250.0, "window: HU that becomes 1; percentiles: per cent")
    foreground_threshold: float | None = setting(0.05, "crop to image voxels above this; none crops nothing")
    patch_size: tuple[int, int, int] = setting((16, 16, 16), "of the encoder, unless the run says otherwise")
    label_values: dict[int, int] = setting({}, "value in the label file -> id, where they differ")
    regions: dict[str, tuple[int, ...]] = setting({}, "overlapping regions (sigmoid): name -> ids whose union it is")
    augmentation: Augmentation = Augmentation()
    nsd_tolerance: float = setting(2.0, "mm")
    labels_by: str = setting("experts", "who drew the reference labels; shown on the score card")
    folds: int = setting(5, "number of folds where the list has none")
    validation: tuple[str, ...] = setting((), "cases of fold 0; the others fill the other folds in order")
    validation_cases: int | None = setting(None, "size of fold 0 where its cases are not named; none for equal folds")
    clean_folds: tuple[int, ...] = setting(
        (), "folds whose validation cases published pretraining lists leave out; () all"
    )
    leak: str = setting(
        "", "what is wrong with the other folds; said in a run that starts from a checkpoint, and on its card"
    )
    label_order: tuple[str, ...] = setting((), "training cases in the order in which --label_count takes them")

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(
            spacing=self.spacing,
            intensity=self.intensity,
            low=self.low,
            high=self.high,
            foreground_threshold=self.foreground_threshold,
            channels=self.channels,
        )

    @property
    def foreground(self) -> dict[int, str]:
        """id -> name of every class but the background."""
        return {number: name for number, name in self.labels.items() if number != 0}

    @property
    def out_channels(self) -> int:
        """Channels of the logits: classes with the background (softmax), or regions (sigmoid)."""
        return len(self.regions) or len(self.labels)

    def scored(self) -> dict[str, tuple[int, ...]]:
        """What is scored: name -> the ids whose union it is."""
        return self.regions or {name: (number,) for number, name in self.foreground.items()}


def available() -> list[str]:
    return sorted(path.stem for path in DATASETS.glob("*.yaml"))


def load_preset(name_or_path: str | Path) -> Preset:
    """A preset of ours by name, or of one's own by the path of a YAML. InputError says what is wrong with it."""
    text = str(name_or_path)
    if text in available():
        return check(read_yaml(DATASETS / f"{text}.yaml", Preset), DATASETS / f"{text}.yaml")
    if text.endswith((".yaml", ".yml")):
        return check(read_yaml(text, Preset), text)
    near = difflib.get_close_matches(text, available(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"preset: found '{text}', {hint}allowed: {', '.join(available())}, or the path of a YAML")


def check(preset: Preset, where: str | Path) -> Preset:
    """The preset itself when its values agree with each other, InputError otherwise."""

    def fail(text: str) -> None:
        raise InputError(f"{where}: {text}")

    if sorted(preset.labels) != list(range(len(preset.labels))):
        fail(
            f"labels: found the ids {sorted(preset.labels)}, needs 0 (the background, if any), 1, 2, ... without a gap"
        )
    names = list(preset.labels.values())
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        fail(f"labels: found the name '{double}' twice, each class needs its own")
    if len(preset.labels) < 2 or len(preset.labels) > 255:
        fail(f"labels: found {len(preset.labels)}, needs 2 to 255 with the background")
    if min(preset.roi) < 1 or min(preset.patch_size) < 1 or any(r % p for r, p in zip(preset.roi, preset.patch_size)):
        fail(f"roi: found {preset.roi}, the patch size {preset.patch_size} must divide it")
    if preset.intensity != "zscore" and preset.low >= preset.high:
        fail(f"low: found {preset.low}, must be below high ({preset.high})")
    if preset.intensity == "percentiles" and not 0 <= preset.low < preset.high <= 100:
        fail(f"low, high: found {preset.low}, {preset.high}, percentiles are 0..100")
    if preset.spacing and min(preset.spacing) <= 0:
        fail(f"spacing: found {preset.spacing}, needs positive mm")
    for name, ids in [*preset.regions.items(), ("label_values", tuple(preset.label_values.values()))]:
        if not set(ids) <= set(preset.labels):
            fail(f"{name}: found the ids {sorted(ids)}, allowed: {sorted(preset.labels)}")
    if () in preset.regions.values():
        fail(f"regions: found no id in '{next(name for name, ids in preset.regions.items() if not ids)}'")
    least = {"channels": 1, "folds": 2, "nsd_tolerance": 0}
    least |= {"validation_cases": 1} if preset.validation_cases is not None else {}
    for field, low in least.items():
        if getattr(preset, field) < low:
            fail(f"{field}: found {getattr(preset, field)}, needs at least {low}")
    for field, value in vars(preset.augmentation).items():
        if not 0 <= value <= 1:
            fail(f"augmentation: {field}: found {value}, needs a probability 0..1")
    layout = preset.layout
    if (layout.datalist is None) == (not layout.images):
        fail("layout: needs either 'datalist' or 'images' and 'labels'")
    if preset.task == "segmentation" and len(layout.images) != len(layout.labels):
        fail(f"layout: found {len(layout.images)} patterns of images and {len(layout.labels)} of labels, needs as many")
    for field in ("case", "patient"):
        try:
            re.compile(getattr(layout, field) or "")
        except re.error as error:
            fail(f"layout: {field}: found '{getattr(layout, field)}', which is no regular expression ({error})")
    if preset.task == "classification" and not set(layout.classes.values()) == set(preset.labels):
        fail(f"layout: classes: found the numbers {sorted(layout.classes.values())}, needs {sorted(preset.labels)}")
    for pattern in (*layout.images, *layout.labels):
        if pattern.count("{case}") < 1:
            fail(f"layout: found '{pattern}', needs a {{case}} in it")
    return preset
