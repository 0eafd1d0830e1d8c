"""How label maps were made: the protocol and the notes of a score card."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, one_line
from Finetune.presets import Preset

# written by Finetune.predict beside its label maps
PROTOCOL = "predictions.json"
# keys that may differ between folders of one cross-validation
PER_FOLDER = ("checkpoints", "cases", "failed", "trained_on")

Protocol = Mapping[str, Any]


def read_protocol(folder: Path) -> dict[str, Any]:
    """Return the protocol in a folder of label maps; {} where there is none.

    Raises:
        InputError: the file was not written by Finetune.predict.
    """
    path = folder / PROTOCOL
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        for member in content["checkpoints"]:
            _ = [member[key] for key in ("checkpoint", "sha256", "fold", "init")]
        _ = [str(name) for name in content["cases"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{'no ' * isinstance(error, KeyError)}{one_line(error)}; remove it, or predict again"
        raise InputError(f"{path}: not a protocol of Finetune.predict ({reason})") from None
    return content


def merged(protocols: Sequence[Protocol]) -> dict[str, Any]:
    """Return what all protocols have in common, and their checkpoints and folds."""
    different = differing_keys(protocols)
    shared = {k: v for k, v in protocols[0].items() if k not in PER_FOLDER and k not in different}
    members = [member for protocol in protocols for member in protocol.get("checkpoints", [])]
    return shared | {"fold": sorted({member["fold"] for member in members}), "checkpoints": members}


def differing_keys(protocols: Sequence[Protocol]) -> list[str]:
    """Return the keys whose values differ or are missing in some protocol, except those of `PER_FOLDER`."""
    first, *others = protocols
    keys = {key for protocol in protocols for key in protocol if key not in PER_FOLDER}
    missing = object()
    return sorted(key for key in keys if any(o.get(key, missing) != first.get(key, missing) for o in others))


def labels_by(labels: Path, preset: Preset) -> str:
    """Return who made the reference labels: `labels_by` of the data set's own list, else of the preset.

    Args:
        labels: a Decathlon JSON, or a folder with a dataset.json in it or beside it.
    """
    lists = [labels] if labels.is_file() else [labels / "dataset.json", labels.parent / "dataset.json"]
    for path in lists:
        try:
            listing = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(listing, dict) and isinstance(listing.get("labels_by"), str):
            return listing["labels_by"]
    return preset.labels_by


# ---------------------------------------------------------------- notes


def notes(
    protocols: Mapping[Path, Protocol], cases: Mapping[Path, Sequence[str]], author: str, preset: Preset
) -> list[str]:
    """Return what a reader of the scores must know about the label maps.

    Args:
        protocols: folder of label maps -> its protocol, {} where it has none.
        cases: folder of label maps -> the cases that are scored.
        author: who made the reference labels.
    """
    lines = []
    if author != "experts":
        lines.append(f"REFERENCE LABELS: {author}. These scores are agreement with them, not with the truth")
    for folder, protocol in protocols.items():
        lines += _folder_notes(folder, protocol, cases[folder], preset)
    if different := differing_keys(list(protocols.values())):
        lines.append(f"the folders of label maps were made with different settings: {', '.join(different)}")
    return lines


def _folder_notes(folder: Path, protocol: Protocol, cases: Sequence[str], preset: Preset) -> Iterator[str]:
    if not protocol:
        yield f"{folder} has no {PROTOCOL}: it is unknown how its label maps were made"
        return
    other = [name for name in cases if name not in protocol["cases"]]
    yield from about_cases(other, f"in {folder} were not made by this prediction")
    yield from about_cases(protocol.get("failed", []), "could not be predicted, and are in no mean")
    trained = [name for name in protocol.get("trained_on", []) if name in cases]
    yield from about_cases(trained, "TRAINED the network")
    if protocol.get("preset", preset.name) != preset.name:
        yield f"{folder}: predicted by a network for preset {protocol['preset']}"
    for member in protocol["checkpoints"]:
        if member.get("leak"):
            yield f"LEAK in fold {member['fold']}, {member['checkpoint']}: {member['leak']}"
        if member.get("selected") == "best":
            yield f"{member['checkpoint']} was picked by validation: its scores on the validation cases are optimistic"


def about_cases(cases: Sequence[str], text: str) -> list[str]:
    """Return a note that names the first five cases; none without a case."""
    names = ", ".join(cases[:5]) + (", ..." if len(cases) > 5 else "")
    return [f"{len(cases)} case(s) {text}: {names}"] if cases else []
