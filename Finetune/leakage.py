"""Find validation cases that pretraining has seen, by the content of the volumes."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cache.volume import CachedVolume
from Finetune.contract import recorded_args
from Finetune.data import Volumes
from Finetune.presets import Preset


def overlap_report(pretrained: Iterable[str], folds: Mapping[int, Sequence[tuple[str, str]]]) -> str:
    """Return a line per fold with the number and the names of its cases that were seen in pretraining.

    Args:
        pretrained: content hashes of the pretraining volumes.
        folds: fold -> (name, content hash) of its cases.
    """
    known, lines = set(pretrained), []
    for fold, cases in sorted(folds.items()):
        seen = [name for name, content in cases if content in known]
        listed = f": {', '.join(seen)}" if seen else ""
        lines.append(f"fold {fold}: {len(seen)} of {len(cases)} cases seen in pretraining{listed}")
    return "\n".join(lines)


def pretrained_hashes(state: Mapping[str, Any]) -> list[str] | None:
    """Return the content hashes in a pretraining checkpoint of this repository, None for other checkpoints."""
    args = state.get("args")
    data = args.get("data") if isinstance(args, Mapping) else None
    return list(data) if isinstance(data, (list, tuple)) and all(isinstance(d, str) for d in data) else None


def seen_cases(state: Mapping[str, Any], volumes: Iterable[CachedVolume]) -> list[str] | None:
    """Return the names of the volumes that a checkpoint was pretrained on, None if it does not record its data."""
    hashes = pretrained_hashes(state)
    return None if hashes is None else [volume.name for volume in volumes if volume.content_hash in hashes]


def leak_of(fold: int, preset: Preset, init: Path | None, validation: Volumes) -> str:
    """Return a warning if pretraining has seen validation cases, or may have; else "".

    Cases are compared by the content of the volumes if the checkpoint lists its data, else by what the preset states.
    """
    if init is None:
        return ""
    # resolve and load_encoder have verified the file
    seen = seen_cases({"args": recorded_args(init)}, validation)
    if seen is not None:
        found = f"{len(seen)} of {len(validation)} validation cases were seen in pretraining: {', '.join(seen)}"
        return found if seen else ""
    # the folds of a list may hold other cases than those of the preset
    if fold in preset.clean_folds and {volume.name for volume in validation} <= set(preset.validation):
        return ""
    return preset.leak or "unknown: the checkpoint does not record what it was pretrained on"
