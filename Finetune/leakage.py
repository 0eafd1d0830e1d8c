"""Validation cases that pretraining has seen, found by the content of the volumes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Overlap:
    """The cases of each fold, and those of them that were seen in pretraining."""

    folds: dict[int, list[str]]
    seen: dict[int, list[str]]

    def __str__(self) -> str:
        lines = []
        for fold, names in sorted(self.folds.items()):
            seen = self.seen[fold]
            lines.append(f"fold {fold}: {len(seen)} of {len(names)} cases seen in pretraining" + _named(seen))
        return "\n".join(lines)


def _named(seen: Sequence[str]) -> str:
    return f": {', '.join(seen)}" if seen else ""


def overlap(pretrained: Iterable[str], folds: Mapping[int, Sequence[tuple[str, str]]]) -> Overlap:
    """`pretrained`: content hashes; `folds`: fold -> (name, content hash) of its cases."""
    known = set(pretrained)
    return Overlap(
        {fold: [name for name, _ in cases] for fold, cases in folds.items()},
        {fold: [name for name, content in cases if content in known] for fold, cases in folds.items()},
    )


def pretrained_hashes(state: Mapping[str, Any]) -> list[str] | None:
    """The content hashes that one of our pretraining checkpoints carries; None for a checkpoint of another origin."""
    args = state.get("args")
    data = args.get("data") if isinstance(args, Mapping) else None
    return list(data) if isinstance(data, (list, tuple)) and all(isinstance(d, str) for d in data) else None


def card(state: Mapping[str, Any], training: Iterable[Any], validation: Iterable[Any]) -> dict[str, Any]:
    """What the score card says of a fine-tuning run that starts from the checkpoint `state`.

    `training` and `validation` are cached entries. {"known": False} when the checkpoint does not tell its data.
    """
    hashes = pretrained_hashes(state)
    if hashes is None:
        return {"known": False, "text": "unknown: the checkpoint does not tell what it was pretrained on"}
    parts = [(e.name, e.content_hash) for e in training], [(e.name, e.content_hash) for e in validation]
    found = overlap(hashes, dict(enumerate(parts)))
    seen, count = found.seen[1], len(found.folds[1])
    text = f"{len(seen)} of {count} validation cases were seen in pretraining" + _named(seen)
    return {"known": True, "validation_seen": seen, "training_seen": found.seen[0], "text": text}
