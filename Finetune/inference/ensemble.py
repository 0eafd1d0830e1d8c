"""Fine-tuned checkpoints as one predictor: which file a run reports, ensembles, mirror images."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint
from common.config import to_dict
from common.errors import InputError
from common.files import file_sha256
from Finetune.architectures import load_finetuned
from Finetune.heads import Architecture
from Finetune.inference.sliding_window import Predictor, predictor
from Finetune.presets import Preset

# the checkpoint that --select best keeps
BEST = "checkpoint-best.pth"


@dataclass(frozen=True)
class Ensemble:
    """One network or several with the same classes, preprocessing and roi.

    `training_cases` trained any of them, `validation_cases` validate for all of them. `config` holds the settings of
    the run of the first one, `members` what the protocol records of each.
    """

    models: list[nn.Module]
    preset: Preset
    roi: tuple[int, int, int]
    training_cases: set[str]
    validation_cases: list[str]
    members: list[dict[str, Any]]
    config: dict[str, Any]


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
    _, architecture, preset, first = loaded[0]
    every_args = [args for *_, args in loaded]
    validation = set.intersection(*(set(args["validation_cases"]) for args in every_args))
    return Ensemble(
        models=[model for model, *_ in loaded],
        preset=preset,
        roi=architecture.roi,
        training_cases={name for args in every_args for name in args["training_cases"]},
        validation_cases=[name for name in first["validation_cases"] if name in validation],
        members=[_member(path, architecture, args) for path, (_, architecture, _, args) in zip(paths, loaded)],
        config=first["config"],
    )


def _kind(path: Path, preset: Preset, architecture: Architecture) -> tuple:
    if preset.task != "segmentation":
        hint = "the predictions of a classifier are in classification.csv of its run"
        raise InputError(f"{path}: found preset {preset.name} for {preset.task}, expected segmentation; {hint}")
    return preset.labels, preset.regions, preset.preprocessing, preset.channels, architecture.roi


def _member(path: Path, architecture: Architecture, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "checkpoint": str(path),
        "sha256": file_sha256(path),
        "architecture": to_dict(architecture),
        **{key: args.get(key) for key in ("init", "init_sha256", "selected", "step", "leak")},
        "fold": args["config"]["fold"],
        "seed": args["config"]["seed"],
        "labels": len(args["training_cases"]),
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
