"""Volumes on disk -> cache on disk. Run once before training; the training programs fill what is missing themselves.

    python generate_cache_files.py --datasets 1k --data_root data --cache_dir cache --workers 8
    python generate_cache_files.py --datalist data/sample_abdomen/dataset.json --section pretraining
    python generate_cache_files.py --datalist data/my_scans --spacing 1.5 --low -175 --high 250
    python generate_cache_files.py --preset BTCV --data_root data/BTCV      labels and settings of a fine-tuning preset
    sbatch --array=0-15 ... --shard $SLURM_ARRAY_TASK_ID/16                 several machines fill one cache

A volume that cannot be used goes to a quarantine list, with the reason, and the rest goes on. Settings must be those of
the run that will read the cache: they are part of its key. The work is in common/cache.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import InputError, parse, run_program, setting
from common.logging import say


@dataclass(kw_only=True)
class CacheSettings:
    """Settings of the cache; defaults are those of pretraining."""

    datasets: tuple[str, ...] = setting((), "pretraining data sets or lists of Pretrain/datasets/, e.g. 1k, 10k, BTCV")
    datalist: tuple[Path, ...] = setting((), "Decathlon JSONs, folders of NIfTI or DICOM series, text files of paths")
    preset: str | None = setting(None, "a fine-tuning preset: its cases, labels and preprocessing")
    data_root: Path | None = setting(None, "folder of the data sets; what a list's paths are relative to")
    section: str = setting("training", "the section of a JSON list to read")
    labels: bool = setting(False, "cache the labels of a list too")
    cache_dir: Path = setting(Path("cache"), "the cache")
    workers: int = setting(0, "processes; 0 works in this one")
    shard: str = setting("0/1", "i/n: of n processes that share the work, this is the i-th (from 0)")

    spacing: tuple[float, float, float] | None = setting(None, "mm per voxel (D H W, or one for all); none: as scanned")
    intensity: Literal["window", "percentiles", "zscore"] = setting(
        "window", "window: low..high HU; percentiles: low..high of each case; zscore: per channel"
    )
    low: float = setting(-1000.0, "HU or percentile that becomes 0")
    high: float = setting(1000.0, "HU or percentile that becomes 1")
    foreground_threshold: float | None = setting(0.05, "crop to voxels above this, of the [0,1] scale; none: no crop")
    margin: int = setting(8, "voxels kept around the foreground")
    channels: int = setting(1, "channels of a volume; more than one: 4D NIfTI, channels last")
    dtype: Literal["int16", "uint8"] = setting("int16", "int16 keeps whole HU; uint8: half the bytes, 255 steps")

    allow_failures: bool = setting(False, "exit code 0 although some volumes cannot be used")
    dry_run: bool = setting(False, "only say how many volumes, how many bytes, how long; with --prune: what would go")
    verify: bool = setting(False, "re-read every byte of the cache and compare checksums")
    prune: bool = setting(False, "remove entries of volumes that the given lists do not name; name all lists")
    report: bool = setting(False, "print the data set's shapes, spacings, intensities and foreground")


def main() -> None:
    settings = parse(CacheSettings, description=__doc__)
    first, count = shard_of(settings.shard)

    from common import cache, quarantine, upkeep  # slow to import: --help does not wait for it
    from common.volumes import Preprocessing

    if settings.verify:
        return verify(settings)
    names = ("spacing", "intensity", "low", "high", "foreground_threshold", "margin", "channels", "dtype")
    cases, preprocessing = collect(settings, Preprocessing(**{name: getattr(settings, name) for name in names}))
    if settings.prune:
        gone, freed = upkeep.prune(settings.cache_dir, cases, remove=not settings.dry_run)
        did = "would remove" if settings.dry_run else "removed"
        return say(f"prune: {did} {len(gone)} entries, {freed / 1e9:.2f} GB, that these lists do not name")
    cases = cases[first::count]
    if settings.dry_run:
        return say(f"dry run: {upkeep.estimate(cases, preprocessing, settings.cache_dir, settings.workers)}")
    filled = cache.fill(cases, preprocessing, settings.cache_dir, settings.workers, unique=settings.preset is None)
    size = sum(upkeep.folder_bytes(entry.folder) for entry in filled.entries)
    say(
        f"cache: {len(filled.entries)} of {len(cases)} volumes in {settings.cache_dir}, {size / 1e9:.2f} GB; "
        f"{filled.built} made now in {upkeep.duration(filled.seconds)}"
        + (f", largest memory of a process {filled.peak_memory / 2**30:.2f} GiB" if filled.built else "")
    )
    if settings.report:
        say(upkeep.fingerprint(filled.entries))
    if filled.failures:
        say(quarantine.table(filled.failures))
        if not settings.allow_failures:
            failed = f"{len(filled.failures)} of {len(cases)} volumes cannot be used"
            raise InputError(f"{failed}; the others are cached (--allow_failures makes this exit with 0)")


def shard_of(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    try:
        first, count = map(int, text.split("/"))
    except ValueError:
        first, count = -1, 0
    if not 0 <= first < count:
        raise InputError(f"shard: found '{text}', needs i/n with 0 <= i < n, e.g. 0/4")
    return first, count


def collect(settings: CacheSettings, preprocessing):
    """(cases of all the lists, how they are preprocessed)."""
    from common.datalist import read_cases
    from common.sources import read_datasets, unlabelled

    if settings.preset:
        return collect_preset(settings)
    cases = read_datasets(settings.datasets, settings.data_root) if settings.datasets else []
    for datalist in settings.datalist:
        found = read_cases(datalist, settings.data_root, settings.section)
        cases += found if settings.labels else unlabelled(found)
    if not cases:
        raise InputError("no data: give --datasets, --datalist or --preset")
    return cases, preprocessing


def collect_preset(settings: CacheSettings):
    from Finetune.cases import find_cases, with_mapped_labels
    from Finetune.presets import load_preset

    preset = load_preset(settings.preset)
    if settings.data_root is None:
        raise InputError(f"preset {settings.preset}: needs --data_root, its folder")
    cases = with_mapped_labels(find_cases(preset, settings.data_root), preset, settings.cache_dir / "labels")
    return cases, preset.preprocessing


def verify(settings: CacheSettings) -> None:
    from common import upkeep

    count, damaged = upkeep.verify(settings.cache_dir, settings.workers)
    for folder, wrong in damaged.items():
        say(f"  {folder}: {wrong}")
    if damaged:
        raise InputError(f"{settings.cache_dir}: {len(damaged)} of {count} entries are damaged; delete and refill them")
    say(f"verify: {count} entries, all whole")


if __name__ == "__main__":
    sys.exit(run_program(main))
