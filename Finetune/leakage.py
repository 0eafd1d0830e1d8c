"""Find validation cases that pretraining has seen, by the content of the volumes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.cache.volume import CachedVolume


@dataclass(frozen=True)
class Overlap:
    """The names of the cases in each fold, and of those that pretraining has seen."""

    folds: dict[int, list[str]]
    seen: dict[int, list[str]]

    def __str__(self) -> str:
        return "\n".join(
            f"fold {fold}: {len(self.seen[fold])} of {len(names)} cases seen in pretraining{_listed(self.seen[fold])}"
            for fold, names in sorted(self.folds.items())
        )


def _listed(names: Sequence[str]) -> str:
    return f": {', '.join(names)}" if names else ""


def overlap(pretrained: Iterable[str], folds: Mapping[int, Sequence[tuple[str, str]]]) -> Overlap:
    """Return the cases of each fold that were seen in pretraining.

    Args:
        pretrained: content hashes of the pretraining volumes.
        folds: fold -> (name, content hash) of its cases.
    """
    known = set(pretrained)
    return Overlap(
        {fold: [name for name, _ in cases] for fold, cases in folds.items()},
        {fold: [name for name, content in cases if content in known] for fold, cases in folds.items()},
    )


def pretrained_hashes(state: Mapping[str, Any]) -> list[str] | None:
    """Return the content hashes in a pretraining checkpoint of this repository, None for other checkpoints."""
    args = state.get("args")
    data = args.get("data") if isinstance(args, Mapping) else None
    return list(data) if isinstance(data, (list, tuple)) and all(isinstance(d, str) for d in data) else None


def card(
    state: Mapping[str, Any], training: Iterable[CachedVolume], validation: Iterable[CachedVolume]
) -> dict[str, Any]:
    """Return the overlap of a fine-tuning run with the checkpoint `state` that it starts from, for its score card.

    `known` is False if the checkpoint does not record its data; then only `text` is there.
    """
    hashes = pretrained_hashes(state)
    if hashes is None:
        return {"known": False, "text": "unknown: the checkpoint does not record what it was pretrained on"}
    folds = {fold: [(v.name, v.content_hash) for v in volumes] for fold, volumes in enumerate((training, validation))}
    found = overlap(hashes, folds)
    seen, count = found.seen[1], len(found.folds[1])
    text = f"{len(seen)} of {count} validation cases were seen in pretraining{_listed(seen)}"
    return {"known": True, "validation_seen": seen, "training_seen": found.seen[0], "text": text}
