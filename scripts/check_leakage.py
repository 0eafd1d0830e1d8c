"""Was a validation case seen in pretraining? Found by content: name, format, compression and orientation play no part.

    python -m scripts.check_leakage --pretrain 1k --data_root data --finetune BTCV --data data/BTCV
    python -m scripts.check_leakage --pretrain runs/glmae/checkpoint-last.pth --finetune data/mine/dataset.json
    python -m scripts.check_leakage --pretrain 10k --finetune AMOS22_CT --data data/AMOS22 --exclude_leaks clean.txt

Compared are hashes of the voxels, so a scan that was resampled, cropped or rescaled before it was published again is
not recognised. Volumes that a cache knows are not read again. Exit code 0 also when there is an overlap.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import checkpoint
from common.cli import parse, run_program
from common.config import setting
from common.data.datalist import Case, read_cases
from common.errors import InputError
from common.files import save_bytes
from common.runlog import print_main, progress
from Finetune.cases import find_cases, split
from Finetune.leakage import overlap, pretrained_hashes
from Finetune.presets import load_preset
from Pretrain.catalog import read_datasets


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


def content_hashes(cases: Sequence[Case], cache_dir: Path, channels: int = 1) -> dict[str, str]:
    """Case name -> content hash. From the cache's index where it knows the file; otherwise the volume is read.

    A case that cannot be read is said and left out: it cannot have been trained on either.
    """
    from common.cache import hashing
    from common.data.volume_io import read_image

    cache_dir.mkdir(parents=True, exist_ok=True)
    index = hashing.HashIndex(cache_dir / "index.jsonl")
    hashes = {}
    for case in progress(cases, desc="compare", unit="volume"):
        if case.problem:
            print_main(f"  not compared: {case.problem}")
            continue
        known = index.file(case.image)
        if known is None or known.content is None:
            try:
                content = hashing.content_hash(read_image(case.image, channels))
                known = hashing.File(**(vars(hashing.fingerprint(case.image)) | {"content": content}))
            except InputError as error:
                print_main(f"  not compared: {error}")
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
        return print_main(str(overlap(seen, by_fold)))
    listed = pretraining_cases(settings)
    pretrained = content_hashes(listed, settings.cache_dir, channels)
    print_main(str(overlap(pretrained.values(), by_fold)))
    if settings.exclude_leaks:
        leaking = {content for cases_ in by_fold.values() for _, content in cases_}
        clean = [case for case in listed if not case.problem and pretrained.get(case.name) not in leaking]
        write_list(settings.exclude_leaks, clean)
        print_main(
            f"{settings.exclude_leaks}: {len(clean)} of {len(listed)} volumes, without any case of {settings.finetune}"
        )
        print_main(f"give it as --datalist {settings.exclude_leaks} --data_root {common_folder(clean)}")


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
    preset = load_preset(settings.finetune)
    cases = find_cases(preset, settings.data)
    folds = {}
    for fold in range(preset.folds):
        try:
            folds[fold] = [case.name for case in split(cases, preset, fold)[1]]
        except InputError:
            continue  # fewer cases than folds
    return cases, folds, preset.channels


def common_folder(cases: Sequence[Case]) -> str:
    """The deepest folder, links followed, that holds all images: the tightest root for a list of them."""
    return os.path.commonpath([os.path.dirname(os.path.realpath(case.image)) for case in cases]) if cases else "/"


def write_list(path: Path, cases: Sequence[Case]) -> None:
    """Write a text file of absolute paths, one per line. InputError when it cannot be written."""
    save_bytes(path, "".join(f"{case.image.absolute()}\n" for case in cases).encode())


if __name__ == "__main__":
    sys.exit(run_program(main))
