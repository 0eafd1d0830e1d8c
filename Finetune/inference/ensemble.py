"""Fine-tuned checkpoints as one predictor: which file a run reports, ensembles, mirror images."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common import checkpoint
from common.config import from_dict, setting, to_dict
from common.errors import InputError
from common.files import file_sha256
from Finetune.architectures import load_finetuned
from Finetune.heads import Architecture
from Finetune.inference.sliding_window import Predictor, predictor
from Finetune.presets import Preset

# settings of the run that prediction uses
CONFIG = ("fold", "seed", "overlap", "blending")


@dataclass(frozen=True)
class RunRecord:
    """The part of a checkpoint's `args` that prediction uses."""

    training_cases: list[str]
    validation_cases: list[str]
    fold: int
    seed: int
    overlap: float = setting(0.5, least=0, below=1)
    blending: Literal["gaussian", "constant"] = "gaussian"
    init: str | None = None
    init_sha256: str | None = None
    selected: str | None = None
    step: int | None = None
    leak: str | None = None


def run_record(args: dict[str, Any], where: Path) -> RunRecord:
    """Return the record in a checkpoint's `args`. InputError if it is incomplete or has values of another type."""
    config = args.get("config")
    if not isinstance(config, dict):
        raise InputError(f"{where}: found {type(config).__name__} as 'config', expected the settings of its run")
    names = [field.name for field in fields(RunRecord)]
    values = {name: args[name] for name in names if name in args}
    return from_dict(values | {name: config[name] for name in CONFIG if name in config}, RunRecord, f"{where}: args")


# the checkpoint that --select best keeps
BEST = "checkpoint-best.pth"


@dataclass(frozen=True)
class Ensemble:
    """One network or several with the same classes, preprocessing and roi.

    `training_cases` trained any of them, `validation_cases` validate for all of them. `run` is the record of
    the first one, `members` what the protocol records of each.
    """

    models: list[nn.Module]
    preset: Preset
    roi: tuple[int, int, int]
    training_cases: set[str]
    validation_cases: list[str]
    members: list[dict[str, Any]]
    run: RunRecord


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`: a file itself, or the one that the run in this folder reports.

    A run reports its last checkpoint, or the best one after --select best.
    """
    if not path.is_dir():
        return path
    last = path / checkpoint.LAST
    if not last.is_file():
        raise InputError(f"{path}: found no {checkpoint.LAST}, expected a checkpoint or the folder of a run")
    args = checkpoint.load(last).get("args")
    config = args.get("config") if isinstance(args, dict) else None
    if not isinstance(config, dict) or config.get("select") != "best":
        return last
    if not (path / BEST).is_file():
        raise InputError(f"{path}: found no {BEST}, expected one after a run with --select best")
    return path / BEST


def load_ensemble(paths: Sequence[Path]) -> Ensemble:
    """Return the networks in the checkpoints.

    Raises:
        InputError: a checkpoint is not for segmentation, or they differ in classes, preprocessing or roi.
    """
    loaded = [load_finetuned(path) for path in paths]
    kinds = [_kind(path, preset, architecture) for path, (_, architecture, preset, _) in zip(paths, loaded)]
    for path, kind in zip(paths, kinds):
        if kind != kinds[0]:
            raise InputError(f"{path}: its classes, preprocessing or roi differ from those of {paths[0]}")
    _, architecture, preset, _ = loaded[0]
    records = [run_record(args, path) for path, (*_, args) in zip(paths, loaded)]
    validation = set.intersection(*(set(record.validation_cases) for record in records))
    return Ensemble(
        models=[model for model, *_ in loaded],
        preset=preset,
        roi=architecture.roi,
        training_cases={name for record in records for name in record.training_cases},
        validation_cases=[name for name in records[0].validation_cases if name in validation],
        members=[_member(path, found[1], record) for path, found, record in zip(paths, loaded, records)],
        run=records[0],
    )


def _kind(path: Path, preset: Preset, architecture: Architecture) -> tuple:
    if preset.task != "segmentation":
        hint = "the predictions of a classifier are in classification.csv of its run"
        raise InputError(f"{path}: found preset {preset.name} for {preset.task}, expected segmentation; {hint}")
    return preset.labels, preset.regions, preset.preprocessing, preset.channels, architecture.roi


def _member(path: Path, architecture: Architecture, record: RunRecord) -> dict[str, Any]:
    return {
        "checkpoint": str(path),
        "sha256": file_sha256(path),
        "architecture": to_dict(architecture),
        **{key: getattr(record, key) for key in ("init", "init_sha256", "selected", "step", "leak", "fold", "seed")},
        "labels": len(record.training_cases),
    }


def mean_logits(
    models: Sequence[nn.Module], device: torch.device, dtype: torch.dtype | None, flip_axes: Sequence[int] = ()
) -> Predictor:
    """Return the mean of the logits over models and mirror images, for the sliding window.

    There are 2 ** len(flip_axes) mirror images; axis 0 is D. It raises InputError when the logits are not finite.
    """
    predictors = [predictor(model, device, dtype) for model in models]
    choices = product((False, True), repeat=len(flip_axes))
    mirrors = [[2 + axis for axis, flip in zip(flip_axes, choice) if flip] for choice in choices]

    @torch.inference_mode()
    def predict(crops: Tensor) -> Tensor:
        crops = crops.to(device)
        total = sum(one(crops.flip(axes)).float().flip(axes) for one, axes in product(predictors, mirrors))
        # argmax would turn NaN into background
        if not torch.isfinite(total).all():
            raise InputError("the logits are not finite: the weights diverged, or --amp is too narrow (try off)")
        return total / (len(predictors) * len(mirrors))

    return predict
