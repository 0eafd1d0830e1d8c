"""Find validation cases that pretraining has seen, by the content of the volumes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.cache.volume import CachedVolume


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
