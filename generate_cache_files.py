"""Volumes on disk -> cache on disk. Run once before training; the training programs fill what is missing themselves.

    python generate_cache_files.py --datasets 1k --data_root data --cache_dir cache --workers 8
    python generate_cache_files.py --datalist data/sample_abdomen/dataset.json --section pretraining
    python generate_cache_files.py --datalist data/my_scans --spacing 1.5 --low -175 --high 250
    python generate_cache_files.py --preset BTCV --data_root data/BTCV      labels and settings of a fine-tuning preset
    sbatch --array=0-15 ... --shard $SLURM_ARRAY_TASK_ID/16                 several machines fill one cache

A volume that cannot be used goes to a quarantine list, with the reason, and the rest goes on. Settings must be those of
the run that will read the cache: they are part of its key. The work is in common/cache/build.py.
"""

import sys
from dataclasses import dataclass

from common.cli import parse, run_program
from common.config import setting
from common.errors import InputError
from common.runlog import print_main
from Pretrain.catalog import DataSettings


@dataclass(kw_only=True)
class CacheSettings(DataSettings):
    """Settings of the cache; defaults are those of pretraining."""

    preset: str | None = setting(None, "a fine-tuning preset: its cases, labels and preprocessing")
    labels: bool = setting(False, "cache the labels of a list too")
    workers: int = setting(0, "processes; 0 works in this one")
    shard: str = setting("0/1", "i/n: of n processes that share the work, this is the i-th (from 0)")

    dry_run: bool = setting(False, "only say how many volumes, how many bytes, how long; with --prune: what would go")
    verify: bool = setting(False, "re-read every byte of the cache and compare checksums")
    prune: bool = setting(False, "remove entries of volumes that the given lists do not name; name all lists")
    report: bool = setting(False, "print the data set's shapes, spacings, intensities and foreground")


def main() -> None:
    settings = parse(CacheSettings, description=__doc__)
    first, count = shard_of(settings.shard)

    from common.cache import build, failures, maintenance  # slow to import: --help does not wait for it

    if settings.verify:
        return verify(settings)
    if settings.preset:
        cases, preprocessing = collect_preset(settings)
    else:
        cases, preprocessing = settings.cases(settings.labels), settings.preprocessing()
    if settings.prune:
        gone, freed = maintenance.prune(settings.cache_dir, cases, remove=not settings.dry_run)
        did = "would remove" if settings.dry_run else "removed"
        return print_main(f"prune: {did} {len(gone)} entries, {freed / 1e9:.2f} GB, that these lists do not name")
    cases = cases[first::count]
    if settings.dry_run:
        return print_main(
            f"dry run: {maintenance.estimate(cases, preprocessing, settings.cache_dir, settings.workers)}"
        )
    filled = build.fill_cache(
        cases, preprocessing, settings.cache_dir, settings.workers, unique=settings.preset is None
    )
    size = sum(maintenance.folder_bytes(entry.folder) for entry in filled.entries)
    print_main(
        f"cache: {len(filled.entries)} of {len(cases)} volumes in {settings.cache_dir}, {size / 1e9:.2f} GB; "
        f"{filled.built} made now in {maintenance.duration(filled.seconds)}"
        + (f", largest memory of a process {filled.peak_memory / 2**30:.2f} GiB" if filled.built else "")
    )
    if settings.report:
        print_main(maintenance.describe_cache(filled.entries))
    if filled.failures:
        print_main(failures.failure_table(filled.failures))
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


def collect_preset(settings: CacheSettings):
    from Finetune.cases import find_cases, with_mapped_labels
    from Finetune.presets import load_preset

    preset = load_preset(settings.preset)
    if len(settings.datalist) > 1 or not (settings.datalist or settings.data_root):
        raise InputError(f"preset {settings.preset}: needs --data_root, its folder, or one JSON as --datalist")
    data, root = (*settings.datalist, settings.data_root) if settings.datalist else (settings.data_root, None)
    cases = with_mapped_labels(find_cases(preset, data, root), preset, settings.cache_dir / "labels")
    return cases, preset.preprocessing


def verify(settings: CacheSettings) -> None:
    from common.cache import maintenance

    count, damaged = maintenance.verify(settings.cache_dir, settings.workers)
    for folder, wrong in damaged.items():
        print_main(f"  {folder}: {wrong}")
    if damaged:
        raise InputError(f"{settings.cache_dir}: {len(damaged)} of {count} entries are damaged; delete and refill them")
    print_main(f"verify: {count} entries, all whole")


if __name__ == "__main__":
    sys.exit(run_program(main))
