"""Label maps for a folder of volumes, on each file's own grid.

    python -m Finetune.predict --checkpoint runs/btcv/checkpoint-last.pth --images DIR_or_LIST --out DIR

A checkpoint of main_finetune, or the folder of its run, is all that is needed: it holds network, preset and
preprocessing. Several checkpoints are an ensemble: the mean of their logits. Memory does not grow with the depth of a
volume times the number of classes (see inference/).
"""

import json
import math
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from common import checkpoint, files
from common.cli import parse, run_program
from common.config import setting, to_dict
from common.data import volume_io
from common.data.datalist import DATA_ROOT_HELP, Case, read_cases
from common.data.nifti import write_nifti
from common.distributed import setup
from common.errors import InputError
from common.files import check_writable, save_bytes
from common.runlog import print_main, progress
from common.training.parallel import autocast_dtype
from Finetune.architectures import load_finetuned
from Finetune.engine_finetune import predictor
from Finetune.evaluation.visualize import overlay, save_png
from Finetune.inference.resample import Grid, resample_logits
from Finetune.inference.sliding_window import Window, slabs, window_starts
from Finetune.presets import Preset

PROTOCOL = "predictions.json"
BEST = "checkpoint-best.pth"


@dataclass(kw_only=True)
class PredictSettings:
    """Settings of a prediction."""

    checkpoint: tuple[Path, ...] = setting(
        help="of main_finetune, or the folder of a run: its last one, or the best where the run was to --select it; "
        "several are an ensemble (folds, seeds)"
    )
    images: Path = setting(help="folder of NIfTI files or DICOM series, a text file of paths, or a Decathlon JSON")
    data_root: Path | None = setting(None, DATA_ROOT_HELP)
    out: Path = setting(help="folder for the label maps, one NAME.nii.gz per volume")
    cases: Literal["all", "validation"] = setting(
        "all", "validation: only the validation cases of the checkpoint (of an ensemble: those of every member)"
    )
    overlap: float | None = setting(None, "of the sliding window; none: the one that the checkpoint's run was given")
    blending: Literal["gaussian", "constant"] | None = setting(
        None, "of overlapping windows; the authors': constant; none: the one that the checkpoint's run was given"
    )
    sw_batch_size: int | None = setting(None, "windows per forward pass; none: 4 on CUDA, 1 on a CPU")
    flips: bool = setting(False, "mean over the 8 mirror images of each window: 8 times the work")
    probabilities: bool = setting(False, "also NAME_probabilities.nii: one channel per class, in steps of 1/255")
    overlays: bool = setting(True, "also overlays/NAME.png: three planes with the classes over the image")
    amp: Literal["auto", "bf16", "fp16", "off"] = setting("auto", "autocast; auto: bf16 on CUDA, off on a CPU")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA where there is one")


def main(argv: list[str] | None = None) -> None:
    config = parse(PredictSettings, argv, description=__doc__)
    run = setup(config.device)
    ensemble = load_ensemble([find_checkpoint(path) for path in config.checkpoint])
    window = choose_window(config, ensemble, run.device)
    cases = choose_cases(config, ensemble.validation_cases)
    check_writable(config.out)
    (config.out / PROTOCOL).unlink(missing_ok=True)  # of an earlier run: it must not vouch for label maps of this one
    models = [model.to(run.device) for model in ensemble.models]
    predict = mean_logits(models, run.device, autocast_dtype(config.amp, run.device), config.flips)
    failures = []
    for number, case in enumerate(cases, start=1):
        try:
            predict_case(
                case, f"{number}/{len(cases)} {case.name}", ensemble.preset, predict, window, run.device, config
            )
        except InputError as error:
            failures.append(case.name)
            print_main(f"error: {error}")
    done = [case.name for case in cases if case.name not in failures]
    protocol = describe(config, ensemble, window, done, failures)
    save_bytes(config.out / PROTOCOL, json.dumps(protocol, indent=2).encode())
    print_main(f"{len(cases) - len(failures)} of {len(cases)} label maps in {config.out}")
    if failures:
        raise InputError(f"{len(failures)} of {len(cases)} volumes gave no label map: {', '.join(failures)}")


# ---------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Ensemble:
    """One network or several that answer the same question."""

    models: list[nn.Module]
    preset: Preset
    roi: tuple[int, int, int]
    training_cases: set[str]  # of any member
    validation_cases: list[str]  # of every member
    members: list[dict[str, Any]]
    config: dict[str, Any]  # the settings of the first member's run


def find_checkpoint(path: Path) -> Path:
    """A checkpoint itself, or of the folder of a run the one that is reported: the last, unless the run was to select
    the best."""
    if not path.is_dir():
        return path
    last = path / checkpoint.LAST
    if not last.is_file():
        raise InputError(f"{path}: found no {checkpoint.LAST}, needs a checkpoint or the folder of a run")
    args = checkpoint.load(last).get("args")
    if not isinstance(args, dict) or not isinstance(args.get("config"), dict) or args["config"].get("select") != "best":
        return last
    if not (path / BEST).is_file():
        raise InputError(f"{path}: found no {BEST}, its run was to select the best checkpoint (--select best)")
    return path / BEST


def load_ensemble(paths: Sequence[Path]) -> Ensemble:
    """InputError unless all checkpoints segment, and share preset (classes and preprocessing) and roi."""
    models, members = [], []
    first = None
    for path in paths:
        model, architecture, preset, args = load_finetuned(path)
        if preset.task != "segmentation":
            raise InputError(
                f"{path}: its preset {preset.name} is for {preset.task}, there are no label maps to predict; "
                "main_finetune writes classification.csv"
            )
        kind = (preset.labels, preset.regions, preset.preprocessing, preset.channels, architecture.roi)
        if first is None:
            first = (kind, preset, architecture.roi, args["config"])
            training, validation = set(), list(args["validation_cases"])
        elif kind != first[0]:
            raise InputError(f"{path}: its classes, preprocessing or roi differ from those of {paths[0]}")
        training |= set(args["training_cases"])
        validation = [name for name in validation if name in set(args["validation_cases"])]
        models.append(model)
        members.append(
            {"checkpoint": str(path), "sha256": files.file_sha256(path), "architecture": to_dict(architecture)}
            | {key: args.get(key) for key in ("init", "init_sha256", "selected", "step", "leak")}
            | {"fold": args["config"]["fold"], "seed": args["config"]["seed"], "labels": len(args["training_cases"])}
        )
    _, preset, roi, config = first
    return Ensemble(models, preset, roi, training, validation, members, config)


def choose_window(config: PredictSettings, ensemble: Ensemble, device: torch.device) -> Window:
    """What is not given is as in the first member's run."""
    overlap = ensemble.config.get("overlap", 0.5) if config.overlap is None else config.overlap
    blending = config.blending or ensemble.config.get("blending", "gaussian")
    batch = (4 if device.type == "cuda" else 1) if config.sw_batch_size is None else config.sw_batch_size
    return Window(ensemble.roi, overlap, blending, batch)


def mean_logits(
    models: Sequence[nn.Module], device: torch.device, dtype: torch.dtype | None, flips: bool
) -> Callable[[Tensor], Tensor]:
    """What the sliding window calls: the mean of the logits over models and, if asked for, the 8 mirror images.
    InputError when they are not finite."""
    predictors = [predictor(model, device, dtype) for model in models]
    mirrors = [[axis for axis, flip in zip((2, 3, 4), choice) if flip] for choice in product((0, 1), repeat=3 * flips)]

    @torch.inference_mode()
    def predict(crops: Tensor) -> Tensor:
        total = 0.0
        for one, axes in product(predictors, mirrors):
            total = total + one(crops.flip(axes)).float().flip(axes)
        if not torch.isfinite(total).all():  # argmax would call it background
            raise InputError("the network's logits are not finite: diverged weights, or too narrow an --amp (try off)")
        return total / (len(predictors) * len(mirrors))

    return predict


# ---------------------------------------------------------------- cases


def choose_cases(config: PredictSettings, validation: Sequence[str]) -> list[Case]:
    """The volumes of `config.images`. InputError when there is none, or a label map could be taken for an image, or
    would be written over one."""
    images, out = config.images.resolve(), config.out.resolve()
    if config.images.is_dir() and out.is_relative_to(images):
        raise InputError(f"out: found {config.out}, which is in --images {config.images}; needs a folder outside it")
    cases = read_cases(config.images, config.data_root)
    if config.cases == "validation" and not validation:
        raise InputError("cases: no case validates for every checkpoint; predict each fold with its own checkpoint")
    if config.cases == "validation":
        cases = [case for case in cases if case.name in set(validation)]
    if not cases:
        wanted = f" called {', '.join(validation)}" if config.cases == "validation" else ""
        raise InputError(f"{config.images}: found no volume{wanted}")
    names = [case.name for case in cases]
    double = next((name for name in names if names.count(name) > 1), None)
    if double:
        raise InputError(f"{config.images}: two volumes are called {double}, their label maps would be one file")
    for case in cases:
        if out / f"{case.name}.nii.gz" == case.image.resolve():
            raise InputError(f"out: found {config.out}, where the label map of {case.image} would be written over it")
    return cases


def predict_case(
    case: Case,
    title: str,
    preset: Preset,
    predict: Callable[[Tensor], Tensor],
    window: Window,
    device: torch.device,
    config: PredictSettings,
) -> None:
    """One volume: read, preprocess, slide, put back, write."""
    if case.problem:
        raise InputError(case.problem)
    image = volume_io.read_image(case.image, channels=preset.channels)
    prepared, _ = preset.preprocessing.apply(image)
    own = own_grid(case.image, image)
    source = Grid(tuple(prepared.shape[1:]), np.asarray(prepared.affine, dtype=np.float64))
    shown = to_grey(image, preset) if config.overlays else None
    del image
    labels = np.zeros(own.shape, np.uint8)
    with ExitStack() as stack:
        probabilities = None
        if config.probabilities:
            path = config.out / f"{case.name}_probabilities.nii"
            probabilities = stack.enter_context(Probabilities(path, own, preset))

        def emit(where: tuple[slice, slice, slice], logits: Tensor) -> None:
            labels[where] = label_map(logits, preset).numpy()
            if probabilities:
                probabilities.put(where, logits)

        total = len(window_starts(prepared.shape[1:], window))
        with progress(total=total, desc=f"predict {title}", unit="window") as bar:
            tensor = torch.as_tensor(prepared.as_tensor())
            resample_logits(slabs(tensor, predict, window, device, bar.update), source, own, emit)
        write_label_map(config.out / f"{case.name}.nii.gz", labels, own, case.image)
    if shown is not None:
        canonical = nib.as_closest_canonical(nib.Nifti1Image(labels, own.affine))
        spacing = np.linalg.norm(canonical.affine[:3, :3], axis=0)
        names = preset.foreground
        pixels = overlay(shown, [np.asarray(canonical.dataobj)], spacing, names, [case.name])
        save_png(config.out / "overlays" / f"{case.name}.png", pixels)


def own_grid(path: Path, image: Tensor) -> Grid:
    """The grid of the file itself: what its header says for NIfTI, what the reader found for other formats."""
    if is_nifti(path):
        header = nib.load(path)
        return Grid(tuple(header.shape[:3]), np.asarray(header.affine, dtype=np.float64))
    shape = tuple(int(n) for n in image.meta["spatial_shape"][:3])
    return Grid(shape, np.asarray(image.meta["original_affine"], dtype=np.float64))


def is_nifti(path: Path) -> bool:
    return path.name.endswith((".nii", ".nii.gz"))


def label_map(logits: Tensor, preset: Preset) -> Tensor:
    """Logits (K, d, h, w) -> ids (d, h, w) uint8. Overlapping regions are painted from the largest to the smallest; a
    voxel gets the id that is in its region and in none of the smaller ones."""
    if not preset.regions:
        return logits.argmax(dim=0).to(torch.uint8)
    ids = torch.zeros(logits.shape[1:], dtype=torch.uint8)
    order = sorted(enumerate(preset.regions.values()), key=lambda item: -len(item[1]))
    for position, (channel, members) in enumerate(order):
        smaller = {number for _, other in order[position + 1 :] for number in other if set(other) < set(members)}
        ids[logits[channel] > 0] = min(set(members) - smaller or members)
    return ids


def write_label_map(path: Path, labels: np.ndarray, grid: Grid, source: Path) -> None:
    """A NIfTI file with the geometry of its source: the same header fields where the source is NIfTI, its affine
    otherwise."""
    if is_nifti(source):
        header = nib.load(source).header.copy()
        image = nib.Nifti1Image(labels, None, header)
        image.header.set_data_dtype(np.uint8)
        image.header["cal_min"] = image.header["cal_max"] = 0
    else:
        image = nib.Nifti1Image(labels, grid.affine)
        image.header.set_xyzt_units("mm")
    write_nifti(path, image)


def to_grey(image: Tensor, preset: Preset) -> np.ndarray:
    """The first channel (D, H, W) in [0, 1], half precision, for pictures."""
    pixels = image.as_tensor()[0]
    if preset.intensity == "window":
        low, high = preset.low, preset.high
    else:
        sample = pixels.flatten()[:: max(1, pixels.numel() // 100_000)]
        low, high = torch.quantile(sample, torch.tensor([0.005, 0.995])).tolist()
    return ((pixels - low) / max(high - low, 1e-6)).clamp(0, 1).half().numpy()


class Probabilities:
    """A NIfTI file (D, H, W, K) of 8-bit probabilities, written in place through the disk, so that it never has to fit
    in memory. A context: `path` is there when it was left without an exception, else nothing is."""

    def __init__(self, path: Path, grid: Grid, preset: Preset):
        self.path, self.sigmoid = path, bool(preset.regions)
        self.temporary = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
        shape = (*grid.shape, preset.out_channels)
        header = nib.Nifti1Image(np.zeros((1, 1, 1, 1), np.uint8), grid.affine).header
        header.set_data_shape(shape)
        header.set_slope_inter(1 / 255, 0)
        header["vox_offset"] = 352
        try:
            with open(self.temporary, "wb") as file:
                file.write(header.binaryblock + b"\0" * 4)
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a SIGBUS in the middle
                    os.posix_fallocate(file.fileno(), 0, 352 + math.prod(shape))
            self.values = np.memmap(self.temporary, np.uint8, "r+", offset=352, shape=shape, order="F")
        except OSError as error:
            self.temporary.unlink(missing_ok=True)
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        if not self.sigmoid:
            self.values[..., 0] = 255  # background, where nothing will be put

    def put(self, where: tuple[slice, slice, slice], logits: Tensor) -> None:
        share = logits.sigmoid() if self.sigmoid else logits.softmax(dim=0)
        self.values[where] = (share * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()

    def __enter__(self) -> "Probabilities":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.values.flush()
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- protocol


def describe(
    config: PredictSettings, ensemble: Ensemble, window: Window, cases: list[str], failed: list[str]
) -> dict[str, Any]:
    """How these label maps were made; evaluate copies it onto the score card."""
    return {
        "preset": ensemble.preset.name,
        "checkpoints": ensemble.members,
        "spacing": list(ensemble.preset.spacing) if ensemble.preset.spacing else None,
        "roi": list(ensemble.roi),
        "overlap": window.overlap,
        "blending": window.blending,
        "flips": config.flips,
        "ensemble": len(ensemble.members),
        "code_version": code_version(),
        "cases": cases,
        "failed": failed,
        "trained_on": [name for name in cases if name in ensemble.training_cases],
    }


def code_version() -> str:
    """The commit of the checkout, with -dirty where files differ from it; "unknown" where there is none."""
    describe = ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]  # no tag: the hash itself
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(run_program(main))
