"""Score label maps against reference labels, in the space of the label files.

    python -m Finetune.evaluate --predictions DIR --labels DIR --preset NAME --out DIR
    python -m Finetune.evaluate --compare CARD_A CARD_B --out DIR

Writes the score card: scores.csv (a row per case and class), scores.json (numbers, rules, protocol), scores.txt (the
table), dice.png (box plots) and worst/ (pictures of the worst cases, reference above prediction). Several folders of
predictions are the folds of one cross-validation. In a folder, reference labels are named like the predictions or as
the preset pairs them; a Decathlon JSON has the label of every case.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import parse, run_program
from common.config import setting
from common.data import geometry, volume_io
from common.data.datalist import DATA_ROOT_HELP, ENDINGS, Case, read_cases, stem
from common.errors import InputError
from common.files import check_writable
from common.runlog import print_main, progress
from Finetune.cases import label_for, map_values
from Finetune.evaluation import protocol
from Finetune.evaluation.comparison import compare, comparison_table
from Finetune.evaluation.formats import write_json
from Finetune.evaluation.metrics import Score, case_means, score_case
from Finetune.evaluation.report import box_plots, write_card
from Finetune.evaluation.visualize import overlay, save_png, to_grey
from Finetune.presets import Preset, load_preset

# case -> (label map, reference label)
Pairs = dict[str, tuple[Path, Path]]


@dataclass(kw_only=True)
class EvaluateSettings:
    """Settings of an evaluation."""

    out: Path = setting(help="folder for the score card")
    predictions: tuple[Path, ...] = setting((), "folder of label maps; several are the folds of one cross-validation")
    labels: Path | None = setting(None, "folder of reference label maps, or a Decathlon JSON with labels")
    data_root: Path | None = setting(None, DATA_ROOT_HELP)
    preset: str | None = setting(None, "data set: a name in Finetune/datasets/, or the path of a custom YAML")
    images: tuple[Path, ...] = setting((), "folders of images for the pictures; without its image a case is on black")
    worst: int = setting(3, "number of worst cases to draw", least=0)
    compare: tuple[Path, ...] = setting((), "two folders of score cards: write paired differences, second minus first")


def main(argv: list[str] | None = None) -> None:
    config = parse(EvaluateSettings, argv, description=__doc__)
    if config.compare:
        compare_cards(config)
        return
    for name in ("predictions", "labels", "preset"):
        if not getattr(config, name):
            expected = "--predictions, --labels, --preset and --out, or --compare and --out"
            raise InputError(f"--{name}: missing; expected {expected}")
    for folder in config.images:
        if not folder.is_dir():
            raise InputError(f"--images {folder}: expected a folder")
    preset = load_preset(config.preset)
    if preset.task != "segmentation":
        raise InputError(f"--preset {preset.name}: is for {preset.task}, whose scores main_finetune writes")
    evaluate(config, preset)


def compare_cards(config: EvaluateSettings) -> None:
    if len(config.compare) != 2 or config.predictions:
        raise InputError(f"--compare: found {len(config.compare)} folder(s), expected two and no --predictions")
    result = compare(*config.compare)
    write_json(config.out / "compare.json", result)
    print_main(comparison_table(result))


def evaluate(config: EvaluateSettings, preset: Preset) -> None:
    """Score the label maps in `config.predictions` and write the card to `config.out`."""
    listed = None
    if config.labels.is_file():
        listed = {case.name: case for case in read_cases(config.labels, config.data_root)}
    pairs = find_pairs(config.predictions, config.labels, listed, preset)
    protocols = {folder: protocol.read_protocol(folder) for folder in config.predictions}
    check_writable(config.out)
    scores: list[Score] = []
    for name, (prediction, label) in progress(pairs.items(), desc="score", unit="case"):
        predicted, reference, spacing = read_pair(prediction, label, preset)
        scores += score_case(name, predicted, reference, spacing, preset.scored(), preset.nsd_tolerance)
    author = protocol.labels_by(config.labels, preset)
    scored = {"preset": preset.name, "nsd_tolerance_mm": preset.nsd_tolerance, "labels_by": author}
    made = protocol.merged(list(protocols.values()))
    cases = {folder: [name for name, (path, _) in pairs.items() if path.parent == folder] for folder in protocols}
    unscored = [name for name in listed or () if name not in pairs]
    notes = protocol.about_cases(unscored, f"of {config.labels} have no label map, and are in no mean")
    notes += protocol.notes(protocols, cases, author, preset)
    print_main(write_card(config.out, scores, made | scored | {"cases": list(pairs)}, notes))
    box_plots(config.out / "dice.png", scores)
    draw_worst(config, preset, pairs, scores)
    print_main(f"score card in {config.out}")


# ---------------------------------------------------------------- pairs of files


def find_pairs(predictions: Sequence[Path], labels: Path, listed: dict[str, Case] | None, preset: Preset) -> Pairs:
    """Return case -> (label map, reference label).

    Args:
        predictions: folders of label maps.
        labels: folder of reference labels, or the list that has the cases `listed` (name -> case).

    Raises:
        InputError: a label map has no reference label or is its own, a case is found twice, or there is no label map.
    """
    if not labels.exists():
        raise InputError(f"--labels {labels}: no such folder or list")
    pairs: Pairs = {}
    for path in label_maps(predictions):
        name = stem(path)
        if name in pairs:
            raise InputError(f"{path}: found {name} also in {pairs[name][0].parent}, expected each case once")
        label = label_for(preset, name, labels) if listed is None else label_in_list(listed.get(name))
        if label is None:
            raise InputError(f"{path}: found no label for it in {labels}")
        if os.path.realpath(label) == os.path.realpath(path):
            raise InputError(f"{path}: found as its own label, expected other files in --labels than in --predictions")
        pairs[name] = (path, label)
    if not pairs:
        raise InputError(f"{', '.join(map(str, predictions))}: found no label map (NAME.nii.gz, .nii, .mha, ...)")
    return pairs


def label_maps(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield the label maps in the folders, without hidden files and probabilities."""
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"--predictions {folder}: no such folder")
        for path in sorted(folder.iterdir()):
            hidden = path.name.startswith(".") or stem(path).endswith("_probabilities")
            if path.name.lower().endswith(ENDINGS) and not hidden:
                yield path


def label_in_list(case: Case | None) -> Path | None:
    """Return the label of a case in a list, None where it has none. InputError if its paths cannot be used."""
    if case and case.label and case.problem:
        raise InputError(case.problem)
    return case.label if case else None


def read_pair(prediction: Path, label: Path, preset: Preset) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Return both label maps as ids (D, H, W) uint8, RAS by flips and swaps of axes, and their spacing in mm.

    Raises:
        InputError: a file cannot be read, or the two differ in space.
    """
    predicted, reference = (volume_io.load(path, channels=1) for path in (prediction, label))
    affine = reference.affine.numpy()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if predicted.shape != reference.shape:
        found, expected = tuple(predicted.shape[1:]), tuple(reference.shape[1:])
        raise InputError(f"{prediction}: found the shape {found}, expected {expected} as in {label}")
    shift = geometry.corner_distance(predicted.affine.numpy(), affine, predicted.shape[1:])
    if shift > 0.1 * spacing.min():
        raise InputError(f"{prediction}: found a shift of {shift:.3g} mm to {label}, expected under 0.1 voxels")
    ids = map_values(predicted[0].numpy(), preset, prediction, or_ids=True)
    return ids, map_values(reference[0].numpy(), preset, label), tuple(spacing.tolist())


# ---------------------------------------------------------------- pictures


def draw_worst(config: EvaluateSettings, preset: Preset, pairs: Pairs, scores: Sequence[Score]) -> None:
    """Draw the cases of lowest mean Dice to worst/1-NAME.png, ..., and remove the pictures of an earlier card."""
    for path in (config.out / "worst").glob("[0-9]*-*.png"):
        path.unlink()
    dice = {case: value for case, value in case_means(scores, "dice").items() if value is not None}
    for rank, case in enumerate(sorted(dice, key=dice.get)[: config.worst], start=1):
        predicted, reference, spacing = read_pair(*pairs[case], preset)
        image = find_image(config.images, case, preset)
        if image is None or image.shape != reference.shape:
            image = np.zeros(reference.shape, np.float16)
        titles = (f"{case}: reference", f"prediction, mean Dice {dice[case]:.4f}")
        pixels = overlay(image, [reference, predicted], spacing, preset.foreground, titles)
        save_png(config.out / "worst" / f"{rank}-{case}.png", pixels)


def find_image(folders: Sequence[Path], case: str, preset: Preset) -> np.ndarray | None:
    """Return the image of a case (D, H, W) in [0, 1], RAS; None if no folder has a file of its name."""
    for path in (folder / f"{case}{ending}" for folder in folders for ending in (*ENDINGS, "")):
        if path.exists():
            return to_grey(volume_io.read_image(path, channels=preset.channels), preset)
    return None


if __name__ == "__main__":
    sys.exit(run_program(main))
