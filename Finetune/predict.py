"""Predict label maps for a folder or list of volumes, in the space of each file.

    python -m Finetune.predict --checkpoint runs/btcv/checkpoint-last.pth --images DIR_or_LIST --out DIR

A checkpoint of main_finetune is enough: it holds network, preset and preprocessing. The folder of a run stands for its
last checkpoint, or for the best one after --select best. Several checkpoints are an ensemble (mean of their logits).
Memory does not grow with the depth of a volume times the number of classes (see inference/).
"""

import os
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch

from common.cli import parse, run_program
from common.config import setting
from common.data import volume_io
from common.data.datalist import DATA_ROOT_HELP, Case, read_cases
from common.distributed import setup
from common.environment import code_version
from common.errors import InputError
from common.files import check_writable
from common.runlog import print_main, progress
from common.training.parallel import autocast_dtype
from Finetune.evaluation.formats import write_json
from Finetune.evaluation.protocol import PROTOCOL
from Finetune.evaluation.visualize import overlay, save_png, to_grey
from Finetune.inference.ensemble import Ensemble, find_checkpoint, load_ensemble, mean_logits
from Finetune.inference.label_map import (
    file_space,
    keep_largest_components,
    label_map,
    probability_map,
    write_label_map,
)
from Finetune.inference.resample import Space, Where, resample_logits
from Finetune.inference.sliding_window import Predictor, Window, slabs, window_starts
from Finetune.presets import Preset


@dataclass(kw_only=True)
class PredictSettings:
    """Settings of a prediction."""

    checkpoint: tuple[Path, ...] = setting(help="checkpoint or folder of a run; several: an ensemble (folds, seeds)")
    images: Path = setting(help="folder of NIfTI files or DICOM series, a text file of paths, or a Decathlon JSON")
    data_root: Path | None = setting(None, DATA_ROOT_HELP)
    out: Path = setting(help="folder for the label maps, one NAME.nii.gz per volume")
    cases: Literal["all", "validation"] = setting("all", "validation: those that validate for every checkpoint")
    overlap: float | None = setting(None, "overlap of the sliding window; none: as in the run", least=0, below=1)
    blending: Literal["gaussian", "constant"] | None = setting(None, "blending of windows; none: as in the run")
    sw_batch_size: int | None = setting(None, "windows per forward pass; none: 4 on CUDA, 1 on a CPU", least=1)
    flips: bool = setting(
        False, "average over the mirror images of each window along the preset's flip_axes: up to 8 times the work"
    )
    largest_component: tuple[int, ...] = setting(
        (), "ids of which only the largest connected component is kept, in label maps and overlays", least=1, most=254
    )
    largest_foreground: bool = setting(
        False, "before --largest_component, keep only the largest connected component of all classes together"
    )
    probabilities: bool = setting(False, "also write NAME_probabilities.nii: one channel per class, steps of 1/255")
    overlays: bool = setting(True, "also write overlays/NAME.png: three planes with the classes over the image")
    amp: Literal["auto", "bf16", "fp16", "off"] = setting("auto", "autocast; auto: bf16 on CUDA, off on a CPU")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA if available")


def main(argv: list[str] | None = None) -> None:
    config = parse(PredictSettings, argv, description=__doc__)
    device = setup(config.device).device
    ensemble = load_ensemble([find_checkpoint(path) for path in config.checkpoint])
    check_ids(config.largest_component, ensemble.preset)
    window = choose_window(config, ensemble, device)
    cases = choose_cases(config, ensemble.validation_cases)
    check_writable(config.out)
    # the protocol of an earlier run does not apply to the label maps of this one
    (config.out / PROTOCOL).unlink(missing_ok=True)
    models = [model.to(device) for model in ensemble.models]
    flip_axes = ensemble.preset.augmentation.flip_axes if config.flips else ()
    predict = mean_logits(models, device, autocast_dtype(config.amp, device), flip_axes)
    failed = []
    for number, case in enumerate(cases, start=1):
        title = f"{number}/{len(cases)} {case.name}"
        try:
            predict_case(case, title, ensemble.preset, predict, window, config)
        except InputError as error:
            failed.append(case.name)
            print_main(f"error: {error}")
    done = [case.name for case in cases if case.name not in failed]
    write_json(config.out / PROTOCOL, describe(config, ensemble, window, done, failed))
    print_main(f"{len(done)} of {len(cases)} label maps in {config.out}")
    if failed:
        raise InputError(f"{len(failed)} of {len(cases)} volumes have no label map: {', '.join(failed)}")


def choose_window(config: PredictSettings, ensemble: Ensemble, device: torch.device) -> Window:
    """Return the sliding window. Settings that are not given are those of the first member's run."""
    overlap = ensemble.run.overlap if config.overlap is None else config.overlap
    blending = config.blending or ensemble.run.blending
    return Window(ensemble.roi, overlap, blending, config.sw_batch_size or (4 if device.type == "cuda" else 1))


def check_ids(ids: tuple[int, ...], preset: Preset) -> None:
    """Raise InputError unless all ids are classes of the preset."""
    for number in ids:
        if number not in preset.foreground:
            expected = ", ".join(map(str, preset.foreground))
            raise InputError(f"--largest_component {number}: expected ids of preset {preset.name}, {expected}")


# ---------------------------------------------------------------- cases


def choose_cases(config: PredictSettings, validation: list[str]) -> list[Case]:
    """Return the volumes to predict.

    Raises:
        InputError: there is none, two have the same name, or label maps would be written over or among images.
    """
    if config.images.is_dir() and config.out.resolve().is_relative_to(config.images.resolve()):
        raise InputError(f"--out {config.out}: is in --images {config.images}, expected a folder outside it")
    cases, wanted = read_cases(config.images, config.data_root), ""
    if config.cases == "validation":
        if not validation:
            reason = "no case validates for every checkpoint; predict each fold with its own checkpoint"
            raise InputError(f"--cases validation: {reason}")
        cases, wanted = [case for case in cases if case.name in validation], f" called {', '.join(validation)}"
    if not cases:
        raise InputError(f"{config.images}: found no volume{wanted}")
    check_targets(cases, config)
    return cases


def check_targets(cases: list[Case], config: PredictSettings) -> None:
    """Raise InputError if two label maps would be the same file, or one would replace an image."""
    name, count = Counter(case.name for case in cases).most_common(1)[0]
    if count > 1:
        raise InputError(f"{config.images}: found two volumes called {name}, expected one per label map")
    for case in cases:
        if config.out.resolve() / f"{case.name}.nii.gz" == Path(os.path.realpath(case.image)):
            raise InputError(f"--out {config.out}: the label map of {case.image} would replace the image")


def predict_case(
    case: Case, title: str, preset: Preset, predict: Predictor, window: Window, config: PredictSettings
) -> None:
    """Predict one volume and write its label map, and its probabilities and overlay where asked for."""
    if case.problem:
        raise InputError(case.problem)
    image = volume_io.read_image(case.image, channels=preset.channels)
    prepared, _ = preset.preprocessing.apply(image)
    space = file_space(image)
    grey = to_grey(image, preset) if config.overlays else None
    # frees the memory of the image before the logits need it
    del image
    labels = np.zeros(space.shape, np.uint8)
    path = config.out / f"{case.name}_probabilities.nii"
    with probability_map(path, space, preset) if config.probabilities else nullcontext() as write_probabilities:

        def emit(where: Where, logits: torch.Tensor) -> None:
            labels[where] = label_map(logits, preset).numpy()
            if write_probabilities:
                write_probabilities(where, logits)

        tensor = torch.as_tensor(prepared.as_tensor())
        source = Space(tuple(prepared.shape[1:]), np.asarray(prepared.affine, dtype=np.float64))
        total = len(window_starts(source.shape, window))
        with progress(total=total, desc=f"predict {title}", unit="window") as bar:
            resample_logits(slabs(tensor, predict, window, bar.update), source, space, emit)
        keep_largest_components(labels, config.largest_component, config.largest_foreground)
        write_label_map(config.out / f"{case.name}.nii.gz", labels, space, case.image)
    if grey is not None:
        draw_overlay(config.out / "overlays" / f"{case.name}.png", grey, labels, space, preset)


def draw_overlay(path: Path, grey: np.ndarray, labels: np.ndarray, space: Space, preset: Preset) -> None:
    """Draw `labels` (D, H, W), with the axes of the file, over their image `grey` (D, H, W), RAS, from 0 to 1."""
    canonical = nib.as_closest_canonical(nib.Nifti1Image(labels, space.affine))
    spacing = np.linalg.norm(canonical.affine[:3, :3], axis=0)
    title = path.name.removesuffix(".png")
    save_png(path, overlay(grey, [np.asarray(canonical.dataobj)], spacing, preset.foreground, [title]))


# ---------------------------------------------------------------- protocol


def describe(
    config: PredictSettings, ensemble: Ensemble, window: Window, cases: list[str], failed: list[str]
) -> dict[str, Any]:
    """Return how the label maps were made. Finetune.evaluate copies it to the score card."""
    return {
        "preset": ensemble.preset.name,
        "checkpoints": ensemble.members,
        "spacing": list(ensemble.preset.spacing) if ensemble.preset.spacing else None,
        "roi": list(ensemble.roi),
        "overlap": window.overlap,
        "blending": window.blending,
        "flips": config.flips,
        "largest_component": list(config.largest_component),
        "largest_foreground": config.largest_foreground,
        "ensemble": len(ensemble.members),
        "code_version": code_version(),
        "cases": cases,
        "failed": failed,
        "trained_on": [name for name in cases if name in ensemble.training_cases],
    }


if __name__ == "__main__":
    sys.exit(run_program(main))
