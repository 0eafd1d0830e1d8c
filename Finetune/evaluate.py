"""Label maps against references, in the space of the label files: the score card.

    python -m Finetune.evaluate --predictions DIR --labels DIR --preset NAME --out DIR
    python -m Finetune.evaluate --compare CARD_A CARD_B --out DIR

Writes scores.csv (a row per case and class), scores.json (numbers, rules, protocol), scores.txt (the table), dice.png
(box plots) and worst/ (the worst cases, reference above prediction). Several folders of predictions are the folds of
one cross-validation.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import parse, run_program
from common.config import setting
from common.data import geometry, volume_io
from common.data.datalist import DATA_ROOT_HELP, ENDINGS, read_cases, stem
from common.errors import InputError
from common.files import check_writable, save_bytes
from common.runlog import print_main, progress
from Finetune.cases import label_for, map_values
from Finetune.evaluation.metrics import Score, case_means, score_case
from Finetune.evaluation.report import box_plots, compare, compare_table, write_card
from Finetune.evaluation.visualize import overlay, save_png
from Finetune.predict import PROTOCOL, to_grey
from Finetune.presets import Preset, load_preset

OF_A_FOLDER = ("checkpoints", "cases", "failed", "trained_on")  # of its protocol; the rest is how it was made


@dataclass(kw_only=True)
class EvaluateSettings:
    """Settings of an evaluation."""

    out: Path = setting(help="folder for the score card")
    predictions: tuple[Path, ...] = setting((), "folder of label maps; several are the folds of one cross-validation")
    labels: Path | None = setting(
        None,
        "folder of reference label maps, named as the predictions or as the preset pairs them; "
        "or a Decathlon JSON that names the label of every case",
    )
    data_root: Path | None = setting(None, DATA_ROOT_HELP)
    preset: str | None = setting(None, "data set: a name of Finetune/datasets/, or the path of a YAML of one's own")
    images: tuple[Path, ...] = setting(
        (), "folders of the images, to draw the worst cases on; without the image a case is drawn on black"
    )
    worst: int = setting(3, "pictures of this many worst cases")
    compare: tuple[Path, ...] = setting(
        (), "two folders with score cards on the same cases: paired differences, second minus first"
    )


def main(argv: list[str] | None = None) -> None:
    config = parse(EvaluateSettings, argv, description=__doc__)
    if config.compare:
        if len(config.compare) != 2 or config.predictions:
            raise InputError(
                f"--compare: found {len(config.compare)} folders, needs two score cards and no --predictions"
            )
        result = compare(*config.compare)
        save_bytes(config.out / "compare.json", json.dumps(result, indent=2).encode())
        print_main(compare_table(result))
        return
    for name in ("predictions", "labels", "preset"):
        if not getattr(config, name):
            raise InputError(
                f"--{name}: missing; needs --predictions, --labels, --preset and --out, or --compare and --out"
            )
    if config.worst < 0:
        raise InputError(f"worst: found {config.worst}, needs at least 0")
    for folder in config.images:
        if not folder.is_dir():
            raise InputError(f"images: found {folder}, needs a folder")
    preset = load_preset(config.preset)
    if preset.task != "segmentation":
        raise InputError(f"preset {preset.name}: is for {preset.task}, main_finetune writes its scores")
    evaluate(config, preset)


def evaluate(config: EvaluateSettings, preset: Preset) -> None:
    pairs = find_pairs(config.predictions, config.labels, preset, config.data_root)
    made = {folder: read_protocol(folder) for folder in config.predictions}
    check_writable(config.out)
    scores: list[Score] = []
    for name, (prediction, label) in progress(pairs.items(), desc="score", unit="case"):
        found, reference, spacing = read_pair(prediction, label, preset)
        scores += score_case(name, found, reference, spacing, preset.scored(), preset.nsd_tolerance)
    table = write_card(
        config.out, scores, protocol(config, preset, made, list(pairs)), notes(config, preset, made, pairs)
    )
    print_main(table)
    box_plots(config.out / "dice.png", scores)
    draw_worst(config, preset, pairs, scores)
    print_main(f"score card in {config.out}")


# ---------------------------------------------------------------- files


def find_pairs(
    predictions: Sequence[Path], labels: Path, preset: Preset, root: Path | None = None
) -> dict[str, tuple[Path, Path]]:
    """case -> (prediction, label). InputError for a prediction without a label, a case found twice, or nothing at
    all."""
    pairs: dict[str, tuple[Path, Path]] = {}
    for folder in predictions:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
    if not labels.exists():
        raise InputError(f"{labels}: no such folder or list")
    listed = {case.name: case for case in read_cases(labels, root)} if labels.is_file() else None
    for folder in predictions:
        for path in sorted(folder.iterdir()):
            name = stem(path)
            if not path.name.lower().endswith(ENDINGS) or path.name.startswith(".") or name.endswith("_probabilities"):
                continue
            if name in pairs:
                raise InputError(f"{path}: {name} is in {pairs[name][0].parent} as well, a case is scored once")
            if listed is None:
                label = label_for(preset, name, labels)
            else:
                label = listed[name].label if name in listed else None
                if label and listed[name].problem:
                    raise InputError(listed[name].problem)
            if label is None:
                raise InputError(f"{path}: found no label for it in {labels}")
            if label.resolve() == path.resolve():
                raise InputError(f"{path}: found as its own label; --predictions and --labels must differ")
            pairs[name] = (path, label)
    if not pairs:
        raise InputError(f"{', '.join(map(str, predictions))}: found no label map (NAME.nii.gz or .nii)")
    return pairs


def read_pair(prediction: Path, label: Path, preset: Preset) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Both label maps as ids (D, H, W) uint8, RAS, and their spacing in mm. InputError when they lie on different
    grids."""
    found, found_affine = read_map(prediction)
    reference, affine = read_map(label)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if found.shape != reference.shape:
        raise InputError(
            f"{prediction}: found the shape {found.shape}, its label {label} has {reference.shape} (both in RAS)"
        )
    shift = geometry.corner_distance(found_affine, affine, found.shape)
    if shift > 0.1 * spacing.min():
        raise InputError(
            f"{prediction}: lies up to {shift:.3g} mm off its label {label}, at most a tenth of a voxel is allowed"
        )
    found, reference = map_values(found, preset, prediction, or_ids=True), map_values(reference, preset, label)
    return found, reference, tuple(spacing.tolist())


def read_map(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(values (D, H, W), affine) of a label map, brought to RAS by flips and swaps of axes alone. InputError for a file
    that is damaged: nibabel alone reads a torn .nii.gz as if it were whole."""
    image = volume_io.load(path, channels=1)
    return image[0].numpy(), image.affine.numpy()


# ---------------------------------------------------------------- what the card says


def read_protocol(folder: Path) -> dict[str, Any]:
    """How the label maps of a folder were made, as predict wrote it; {} where nothing says so. InputError for a file
    that predict did not write."""
    path = folder / PROTOCOL
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        for member in content["checkpoints"]:
            _ = [member[key] for key in ("checkpoint", "sha256", "fold", "init")]
        _ = [str(name) for name in content["cases"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not as Finetune.predict writes it ({error!r}); remove it, or predict again"
        ) from None
    return content


def protocol(
    config: EvaluateSettings, preset: Preset, made: Mapping[Path, dict[str, Any]], cases: list[str]
) -> dict[str, Any]:
    """How the predictions were made, where all folders agree, and how they are scored."""
    first, *others = made.values()
    common = {
        key: value
        for key, value in first.items()
        if key not in OF_A_FOLDER and all(key in other and other[key] == value for other in others)
    }
    members = [member for one in made.values() for member in one.get("checkpoints", [])]
    scored = {
        "preset": preset.name,
        "nsd_tolerance_mm": preset.nsd_tolerance,
        "labels_by": labels_by(config.labels, preset),
    }
    return common | scored | {"fold": sorted({m["fold"] for m in members}), "checkpoints": members, "cases": cases}


def notes(
    config: EvaluateSettings,
    preset: Preset,
    made: Mapping[Path, dict[str, Any]],
    pairs: Mapping[str, tuple[Path, Path]],
) -> list[str]:
    """What a reader of the scores must know."""
    lines = []
    author = labels_by(config.labels, preset)
    if author != "experts":
        lines.append(f"REFERENCE LABELS: {author}. These scores are agreement with them, not with the truth")
    if config.labels.is_file():
        missing = [case.name for case in read_cases(config.labels, config.data_root) if case.name not in pairs]
        lines += _about(missing, f"of {config.labels} have no label map, and are in no mean")
    for folder, content in made.items():
        if not content:
            lines.append(f"{folder} has no {PROTOCOL}: how its label maps were made is not known")
            continue
        here = [name for name, (path, _) in pairs.items() if path.parent == folder]
        lines += _about(
            [name for name in here if name not in content["cases"]], f"in {folder} are not of this prediction"
        )
        lines += _about(content.get("failed", []), "could not be predicted, and are in no mean")
        lines += _about([name for name in content.get("trained_on", []) if name in here], "TRAINED the network")
        if content.get("preset", preset.name) != preset.name:
            lines.append(f"{folder}: predicted by a network for preset {content['preset']}")
        for member in content["checkpoints"]:
            if member.get("leak"):
                lines.append(f"LEAK in fold {member['fold']}, {member['checkpoint']}: {member['leak']}")
            if member.get("selected") == "best":
                lines.append(
                    f"{member['checkpoint']} was picked by validation: on the validation cases its scores flatter it"
                )
    keys = {key for content in made.values() for key in content if key not in OF_A_FOLDER}
    first, *others = made.values()
    differing = sorted(key for key in keys if any(other.get(key) != first.get(key) for other in others))
    if differing:
        lines.append(f"the folders of label maps were not made alike: they differ in {', '.join(differing)}")
    return lines


def _about(cases: Sequence[str], what: str) -> list[str]:
    """A note that names up to five cases; none without a case."""
    names = ", ".join(cases[:5]) + (", ..." if len(cases) > 5 else "")
    return [f"{len(cases)} case(s) {what}: {names}"] if cases else []


def labels_by(labels: Path, preset: Preset) -> str:
    """Who made the reference labels: `labels_by` of the data set's own list, where it has that, else the preset's."""
    lists = [labels] if labels.is_file() else [labels / "dataset.json", labels.parent / "dataset.json"]
    for path in lists:
        try:
            listing = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(listing, dict) and isinstance(listing.get("labels_by"), str):
            return listing["labels_by"]
    return preset.labels_by


def draw_worst(
    config: EvaluateSettings, preset: Preset, pairs: dict[str, tuple[Path, Path]], scores: Sequence[Score]
) -> None:
    """worst/1-NAME.png, ...: cases of lowest mean Dice, reference above prediction. Those of an earlier card go."""
    for path in (config.out / "worst").glob("[0-9]*-*.png"):
        path.unlink()
    dice = {case: value for case, value in case_means(scores, "dice").items() if value is not None}
    for rank, case in enumerate(sorted(dice, key=dice.get)[: config.worst], start=1):
        found, reference, spacing = read_pair(*pairs[case], preset)
        image = picture_of(config.images, case, preset)
        if image is None or image.shape != reference.shape:
            image = np.zeros(reference.shape, np.float16)
        titles = (f"{case}: reference", f"prediction, mean Dice {dice[case]:.4f}")
        save_png(
            config.out / "worst" / f"{rank}-{case}.png",
            overlay(image, [reference, found], spacing, preset.foreground, titles),
        )


def picture_of(folders: Sequence[Path], case: str, preset: Preset) -> np.ndarray | None:
    """The image of a case (D, H, W) in [0, 1], RAS; None where no folder holds one of that name."""
    for path in (folder / f"{case}{ending}" for folder in folders for ending in (*ENDINGS, "")):
        if path.exists():
            return to_grey(volume_io.read_image(path, channels=preset.channels), preset)
    return None


if __name__ == "__main__":
    sys.exit(run_program(main))
