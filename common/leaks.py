"""Was a validation case seen in pretraining? Found by content: name, format, compression and orientation play no part.

    python -m common.leaks --pretrain 1k --data_root data --finetune BTCV --data data/BTCV
    python -m common.leaks --pretrain runs/glmae/checkpoint-last.pth --finetune data/sample_abdomen/dataset.json
    python -m common.leaks --pretrain 10k --finetune AMOS22_CT --data data/AMOS22 --exclude_leaks clean.txt

Compared are hashes of the voxels, so a scan that was resampled, cropped or rescaled before it was published again is
not recognised. Volumes that a cache knows are not read again. Exit code 0 also when there is an overlap.
"""

import importlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import checkpoint
from common.config import InputError, parse, run_program, setting
from common.datalist import Case, read_cases
from common.logging import progress, say
from common.sources import read_datasets


@dataclass(kw_only=True)
class LeakSettings:
    """Settings of the leak guard."""

    pretrain: str = setting(help="what was pretrained on: a name of Pretrain/datasets/, a data list, or a checkpoint")
    data_root: Path | None = setting(None, "folder of the pretraining data; root of a data list's paths, / is any")
    section: str = setting("training", "the section of a JSON list of pretraining volumes")
    finetune: str = setting(help="what is fine-tuned on: a preset, or a Decathlon JSON with folds")
    data: Path | None = setting(None, "folder of the preset's data; root of a JSON's paths, / is any")
    cache_dir: Path = setting(Path("cache"), "a cache that knows volumes already, and learns the others")
    exclude_leaks: Path | None = setting(None, "write the pretraining list without the overlap to this text file")


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


def content_hashes(cases: Sequence[Case], cache_dir: Path, channels: int = 1) -> dict[str, str]:
    """Case name -> content hash. From the cache's index where it knows the file; otherwise the volume is read.

    A case that cannot be read is said and left out: it cannot have been trained on either.
    """
    from common import identity
    from common.volumes import read_image

    cache_dir.mkdir(parents=True, exist_ok=True)
    index = identity.Index(cache_dir / "index.jsonl")
    hashes = {}
    for case in progress(cases, desc="compare", unit="volume"):
        if case.problem:
            say(f"  not compared: {case.problem}")
            continue
        known = index.file(case.image)
        if known is None or known.content is None:
            try:
                content = identity.content_hash(read_image(case.image, channels))
                known = identity.File(**(vars(identity.fingerprint(case.image)) | {"content": content}))
            except InputError as error:
                say(f"  not compared: {error}")
                continue
            index.add([known])
        hashes[case.name] = known.content
    return hashes


def main() -> None:
    settings = parse(LeakSettings, description=__doc__)
    cases, folds, channels = finetuning_folds(settings)
    contents = content_hashes(cases, settings.cache_dir, channels)
    by_fold = {fold: [(name, contents[name]) for name in names if name in contents] for fold, names in folds.items()}
    if settings.pretrain.endswith(".pth"):
        if settings.exclude_leaks:
            raise InputError("exclude_leaks: a checkpoint has no list to clean, give --pretrain a list")
        seen = pretrained_hashes(checkpoint.load(settings.pretrain))
        if seen is None:
            raise InputError(f"{settings.pretrain}: this checkpoint does not tell what it was pretrained on")
        return say(str(overlap(seen, by_fold)))
    listed = pretraining_cases(settings)
    pretrained = content_hashes(listed, settings.cache_dir, channels)
    say(str(overlap(pretrained.values(), by_fold)))
    if settings.exclude_leaks:
        leaking = {content for cases_ in by_fold.values() for _, content in cases_}
        clean = [case for case in listed if not case.problem and pretrained.get(case.name) not in leaking]
        write_list(settings.exclude_leaks, clean)
        say(f"{settings.exclude_leaks}: {len(clean)} of {len(listed)} volumes, without any case of {settings.finetune}")
        say(f"give it as --datalist {settings.exclude_leaks} --data_root {common_folder(clean)}")


def pretraining_cases(settings: LeakSettings) -> list[Case]:
    if Path(settings.pretrain).exists() and not settings.pretrain.endswith((".yaml", ".yml")):
        return read_cases(settings.pretrain, settings.data_root, settings.section)
    return read_datasets([settings.pretrain], settings.data_root)


def finetuning_folds(settings: LeakSettings) -> tuple[list[Case], dict[int, list[str]], int]:
    """(cases, fold -> names, channels) of a Decathlon JSON, or of a preset."""
    if settings.finetune.endswith(".json"):
        cases = read_cases(settings.finetune, settings.data, flag="data")
        folds: dict[int, list[str]] = {}
        for case in cases:
            folds.setdefault(-1 if case.fold is None else case.fold, []).append(case.name)
        return cases, folds, 1
    if settings.data is None:
        raise InputError(f"finetune {settings.finetune}: needs --data, the folder of this preset's data")
    # Presets belong to Finetune, which common must not import; this program asks for it by name when it is told to.
    presets, finder = importlib.import_module("Finetune.presets"), importlib.import_module("Finetune.cases")
    preset = presets.load_preset(settings.finetune)
    cases = finder.find_cases(preset, settings.data)
    folds = {}
    for fold in range(preset.folds):
        try:
            folds[fold] = [case.name for case in finder.split(cases, preset, fold)[1]]
        except InputError:
            continue  # fewer cases than folds
    return cases, folds, preset.channels


def common_folder(cases: Sequence[Case]) -> str:
    """The deepest folder, links followed, that holds all images: the tightest root for a list of them."""
    return os.path.commonpath([os.path.dirname(os.path.realpath(case.image)) for case in cases]) if cases else "/"


def write_list(path: Path, cases: Sequence[Case]) -> None:
    """A text file of absolute paths, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text("".join(f"{case.image.absolute()}\n" for case in cases))
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    sys.exit(run_program(main))
