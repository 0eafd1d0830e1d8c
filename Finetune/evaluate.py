"""Label maps against references, in the space of the label files: the score card.

    python -m Finetune.evaluate --predictions DIR --labels DIR --preset NAME --out DIR
    python -m Finetune.evaluate --compare CARD_A CARD_B --out DIR

Writes scores.csv (a row per case and class), scores.json (numbers, rules, protocol), scores.txt (the table), dice.png
(box plots) and worst/ (the worst cases, reference above prediction). Several folders of predictions are the folds of
one cross-validation.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from common import volumes
from common.config import InputError, parse, run_program, setting
from common.datalist import ENDINGS, stem
from common.logging import progress, say
from Finetune.cases import label_for, map_values
from Finetune.files import save_bytes, writable
from Finetune.metrics import Score, case_means, score_case
from Finetune.pictures import overlay, save_png
from Finetune.predict import PROTOCOL, to_grey
from Finetune.presets import Preset, load_preset
from Finetune.scorecard import box_plots, compare, compare_table, write_card


@dataclass(kw_only=True)
class EvaluateSettings:
    """Settings of an evaluation."""

    out: Path = setting(help="folder for the score card")
    predictions: tuple[Path, ...] = setting((), "folder of label maps; several are the folds of one cross-validation")
    labels: Path | None = setting(
        None, "folder of reference label maps, named as the predictions or as the preset pairs them"
    )
    preset: str | None = setting(None, "data set: a name of Finetune/datasets/, or the path of a YAML of one's own")
    images: Path | None = setting(None, "folder of the images, to draw the worst cases on; none: on the labels alone")
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
        say(compare_table(result))
        return
    for name in ("predictions", "labels", "preset"):
        if not getattr(config, name):
            raise InputError(
                f"--{name}: missing; needs --predictions, --labels, --preset and --out, or --compare and --out"
            )
    evaluate(config, load_preset(config.preset))


def evaluate(config: EvaluateSettings, preset: Preset) -> None:
    pairs = find_pairs(config.predictions, config.labels, preset)
    writable(config.out)
    scores: list[Score] = []
    for name, (prediction, label) in progress(pairs.items(), desc="score", unit="case"):
        found, reference, spacing = read_pair(prediction, label, preset)
        scores += score_case(name, found, reference, spacing, preset.scored(), preset.nsd_tolerance)
    table = write_card(config.out, scores, protocol(config, preset, list(pairs)), notes(config, preset))
    box_plots(config.out / "dice.png", scores)
    draw_worst(config, preset, pairs, scores)
    say(table)
    say(f"score card in {config.out}")


# ---------------------------------------------------------------- files


def find_pairs(predictions: Sequence[Path], labels: Path, preset: Preset) -> dict[str, tuple[Path, Path]]:
    """case -> (prediction, label). InputError for a prediction without a label, a case found twice, or nothing at
    all."""
    pairs: dict[str, tuple[Path, Path]] = {}
    for folder in (*predictions, labels):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
    for folder in predictions:
        for path in sorted(folder.iterdir()):
            name = stem(path)
            if not path.name.endswith(ENDINGS) or path.name.startswith(".") or name.endswith("_probabilities"):
                continue
            if name in pairs:
                raise InputError(f"{path}: {name} is in {pairs[name][0].parent} as well, a case is scored once")
            label = label_for(preset, name, labels)
            if label is None:
                raise InputError(f"{path}: found no label for it in {labels}")
            pairs[name] = (path, label)
    if not pairs:
        raise InputError(f"{', '.join(map(str, predictions))}: found no label map (.nii.gz, .nii or .nrrd)")
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
    corners = np.array([[0, 0, 0, 1], [*found.shape, 1]]).T
    shift = np.abs((found_affine - affine) @ corners).max()
    if shift > 0.1 * spacing.min():
        raise InputError(
            f"{prediction}: lies up to {shift:.3g} mm off its label {label}, at most a tenth of a voxel is allowed"
        )
    unmapped = {number: number for number in preset.labels}
    known = map_values(found, preset, prediction) if not set(np.unique(found).tolist()) <= set(unmapped) else found
    return known.astype(np.uint8), map_values(reference, preset, label), tuple(spacing.tolist())


def read_map(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(values (D, H, W), affine) of a label map, brought to RAS by flips and swaps of axes alone."""
    try:
        image = nib.as_closest_canonical(nib.load(path))
        values = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    if values.ndim != 3:
        raise InputError(f"{path}: found the shape {values.shape}, needs a 3D label map")
    return values, image.affine


# ---------------------------------------------------------------- what the card says


def protocol(config: EvaluateSettings, preset: Preset, cases: list[str]) -> dict[str, Any]:
    """How the predictions were made, as predict wrote it, and how they are scored."""
    made = []
    for folder in config.predictions:
        try:
            made.append(json.loads((folder / PROTOCOL).read_text()))
        except (OSError, ValueError):
            made.append({})
    common = {
        key: made[0][key]
        for key in made[0]
        if key not in ("checkpoints", "cases") and all(m.get(key) == made[0][key] for m in made)
    }
    members = [member for one in made for member in one.get("checkpoints", [])]
    scored = {
        "preset": preset.name,
        "nsd_tolerance_mm": preset.nsd_tolerance,
        "labels_by": labels_by(config.labels, preset),
    }
    return common | scored | {"fold": sorted({m["fold"] for m in members}), "checkpoints": members, "cases": cases}


def notes(config: EvaluateSettings, preset: Preset) -> list[str]:
    """What a reader of the scores must know."""
    lines = []
    author = labels_by(config.labels, preset)
    if author != "experts":
        lines.append(f"REFERENCE LABELS: {author}. These scores are agreement with them, not with the truth")
    for folder in config.predictions:
        path = folder / PROTOCOL
        if not path.is_file():
            lines.append(f"{folder} has no {PROTOCOL}: how its label maps were made is not known")
            continue
        for member in json.loads(path.read_text()).get("checkpoints", []):
            if member.get("leak"):
                lines.append(f"LEAK in fold {member['fold']}, {member['checkpoint']}: {member['leak']}")
            if member.get("selected") == "best":
                lines.append(
                    f"{member['checkpoint']} was picked by validation: on the validation cases its scores flatter it"
                )
    return lines


def labels_by(labels: Path, preset: Preset) -> str:
    """Who made the reference labels: what the data set's own list says (`labels_by`, as common.sample_data writes it),
    else the preset."""
    for folder in (labels, labels.parent):
        try:
            listing = json.loads((folder / "dataset.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(listing, dict) and isinstance(listing.get("labels_by"), str):
            return listing["labels_by"]
    return preset.labels_by


def draw_worst(
    config: EvaluateSettings, preset: Preset, pairs: dict[str, tuple[Path, Path]], scores: Sequence[Score]
) -> None:
    """worst/1-NAME.png, ...: cases of lowest mean Dice, reference above prediction."""
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


def picture_of(folder: Path | None, case: str, preset: Preset) -> np.ndarray | None:
    """The image of a case (D, H, W) in [0, 1], RAS; None without a folder of images, or where it holds none of that
    name."""
    for path in (folder / f"{case}{ending}" for ending in (*ENDINGS, "") if folder):
        if path.exists():
            return to_grey(volumes.read_image(path, channels=preset.channels), preset)
    return None


if __name__ == "__main__":
    sys.exit(run_program(main))
