"""Find validation cases that pretraining has seen, by their voxels, whatever their name, format or orientation.

    python -m scripts.check_leakage --pretrain 1k --data_root data --finetune BTCV --data data/BTCV
    python -m scripts.check_leakage --pretrain runs/glmae/checkpoint-last.pth --finetune data/mine/dataset.json
    python -m scripts.check_leakage --pretrain 10k --finetune AMOS22_CT --data data/AMOS22 --exclude_leaks clean.txt

Hashes of the voxels are compared, so a scan that was resampled, cropped or rescaled before it was published again is
not found. Volumes that are in the cache are not read again. The exit code is 0 with and without an overlap.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common import checkpoint
from common.cache import hashing
from common.cli import parse, run_program
from common.config import setting
from common.data import volume_io
from common.data.datalist import DATA_ROOT_HELP, Case, read_cases
from common.errors import InputError
from common.files import save_bytes
from common.runlog import print_main, progress
from Finetune.cases import find_cases, folds_of
from Finetune.evaluation.statistics import grouped
from Finetune.leakage import overlap_report, pretrained_hashes
from Finetune.presets import load_preset
from Pretrain.catalog import read_datasets


@dataclass(kw_only=True)
class LeakSettings:
    """Settings of the leakage check."""

    pretrain: str = setting(help="pretraining data: a name of Pretrain/datasets/, a data list, or a checkpoint")
    data_root: Path | None = setting(None, f"folder of the data sets; {DATA_ROOT_HELP}")
    section: str = setting("training", "the section of a JSON list of pretraining volumes")
    finetune: str = setting(help="fine-tuning data: a preset, or a Decathlon JSON with folds")
    data: Path | None = setting(None, f"folder of the preset's data, or of a JSON: {DATA_ROOT_HELP}")
    cache_dir: Path = setting(Path("cache"), "folder of the cache, whose index is used and extended")
    exclude_leaks: Path | None = setting(None, "write the pretraining list without the overlap to this text file")


def content_hashes(cases: Sequence[Case], cache_dir: Path, channels: int = 1) -> dict[str, str]:
    """Return the content hash of each case, from the index of the cache, or by reading the volume.

    A case that cannot be read is printed and left out. It cannot have been trained on either.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    index = hashing.HashIndex(cache_dir / "index.jsonl")
    hashes = {}
    for case in progress(cases, desc="compare", unit="volume"):
        if case.problem:
            print_main(f"  not compared: {case.problem}")
            continue
        record = index.get(case.image)
        if record is None or record.content is None:
            try:
                content = hashing.content_hash(volume_io.read_image(case.image, channels))
                record = replace(hashing.file_record(case.image), content=content)
            except InputError as error:
                print_main(f"  not compared: {error}")
                continue
            index.add([vars(record)])
        hashes[case.name] = record.content
    return hashes


def main() -> None:
    settings = parse(LeakSettings, description=__doc__)
    cases, folds, channels = finetuning_folds(settings)
    contents = content_hashes(cases, settings.cache_dir, channels)
    by_fold = {fold: [(name, contents[name]) for name in names if name in contents] for fold, names in folds.items()}
    if settings.pretrain.endswith(".pth"):
        if settings.exclude_leaks:
            raise InputError("--exclude_leaks: a checkpoint has no list to write, expected a list as --pretrain")
        seen = pretrained_hashes(checkpoint.load(settings.pretrain))
        if seen is None:
            raise InputError(f"{settings.pretrain}: found a checkpoint without a record of its pretraining data")
        return print_main(overlap_report(seen, by_fold))
    listed = pretraining_cases(settings)
    pretrained = content_hashes(listed, settings.cache_dir, channels)
    print_main(overlap_report(pretrained.values(), by_fold))
    if settings.exclude_leaks:
        leaking = {content for cases_ in by_fold.values() for _, content in cases_}
        clean = [case for case in listed if not case.problem and pretrained.get(case.name) not in leaking]
        save_bytes(settings.exclude_leaks, "".join(f"{case.image.absolute()}\n" for case in clean).encode())
        text = f"{len(clean)} of {len(listed)} volumes, without any case of {settings.finetune}"
        print_main(f"{settings.exclude_leaks}: {text}")


def pretraining_cases(settings: LeakSettings) -> list[Case]:
    """Return the volumes of a list or a data set."""
    if Path(settings.pretrain).exists() and not settings.pretrain.endswith((".yaml", ".yml")):
        return read_cases(settings.pretrain, settings.data_root, settings.section)
    return read_datasets([settings.pretrain], settings.data_root)


def finetuning_folds(settings: LeakSettings) -> tuple[list[Case], dict[int, list[str]], int]:
    """Return (cases, fold -> names, channels) of a Decathlon JSON, or of a preset."""
    if settings.finetune.endswith(".json"):
        cases = read_cases(settings.finetune, settings.data)
        folds, channels = grouped(cases, lambda case: -1 if case.fold is None else case.fold), 1
    else:
        if settings.data is None:
            raise InputError(f"--finetune {settings.finetune}: expected --data, the folder of this preset's data")
        preset = load_preset(settings.finetune)
        cases = find_cases(preset, settings.data)
        folds, channels = folds_of(cases, preset), preset.channels
    return cases, {fold: [case.name for case in part] for fold, part in folds.items()}, channels


if __name__ == "__main__":
    sys.exit(run_program(main))
