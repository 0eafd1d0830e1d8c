"""Build the cache of preprocessed volumes. Training programs build what is missing themselves.

    python generate_cache_files.py --datasets 1k --data_root data --cache_dir cache --workers 8
    python generate_cache_files.py --datalist data/sample_abdomen/dataset.json --section pretraining
    python generate_cache_files.py --datalist data/my_scans --spacing 1.5 --low -175 --high 250
    python generate_cache_files.py --preset BTCV --data_root data/BTCV      labels and settings of a fine-tuning preset
    sbatch --array=0-15 ... --shard $SLURM_ARRAY_TASK_ID/16                 several machines build one cache

A volume that cannot be used is logged in failures.jsonl with the reason, and the others are built. Use the settings of
the run that will read the cache: they are part of its key. The work is done in common/cache/build.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from common.cli import parse, run_program
from common.config import setting
from common.data.datalist import Case
from common.data.preprocessing import Preprocessing
from common.errors import InputError
from common.resources import duration
from common.runlog import print_main
from Pretrain.catalog import DataSettings


@dataclass(kw_only=True)
class CacheSettings(DataSettings):
    """Settings of the cache; the defaults are those of pretraining."""

    preset: str | None = setting(None, "a fine-tuning preset: its cases, labels and preprocessing")
    labels: bool = setting(False, "cache the labels of a list too")
    workers: int = setting(0, "worker processes; 0 works in this process", least=0, most=1024)
    shard: str = setting("0/1", "i/n: build every n-th volume, starting at the i-th (from 0)")

    dry_run: bool = setting(False, "print number, size and time without building; with --prune: without removing")
    verify: bool = setting(False, "compare every file of the cache with its checksum")
    prune: bool = setting(False, "remove the volumes that the given lists do not name; name all lists")
    report: bool = setting(False, "print shapes, spacings, intensities, foreground, and the files that were skipped")


def main() -> None:
    settings = parse(CacheSettings, description=__doc__)
    first, count = shard_of(settings.shard)
    if settings.verify:
        return verify(settings)
    if settings.preset:
        cases, preprocessing = read_preset(settings)
    else:
        cases, preprocessing = settings.cases(settings.labels), settings.preprocessing
    if settings.prune:
        return prune(settings, cases)
    cases = cases[first::count]
    if settings.dry_run:
        # slow to import, and not needed for --help
        from common.cache.maintenance import estimate

        return print_main(f"dry run: {estimate(cases, preprocessing, settings.cache_dir, settings.workers)}")
    build(settings, cases, preprocessing)


def shard_of(text: str) -> tuple[int, int]:
    """Return (i, n) of "i/n". InputError unless 0 <= i < n."""
    try:
        first, count = map(int, text.split("/"))
    except ValueError:
        first, count = -1, 0
    if not 0 <= first < count:
        raise InputError(f"--shard {text}: expected i/n with 0 <= i < n, e.g. 0/4")
    return first, count


def read_preset(settings: CacheSettings) -> tuple[list[Case], Preprocessing]:
    """Return the cases of a fine-tuning preset, labels mapped to its ids, and its preprocessing."""
    from Finetune.cases import find_cases, with_mapped_labels
    from Finetune.presets import load_preset

    preset = load_preset(settings.preset)
    if len(settings.datalist) > 1 or not (settings.datalist or settings.data_root):
        raise InputError(f"--preset {settings.preset}: expected --data_root, its folder, or one JSON as --datalist")
    data, root = (*settings.datalist, settings.data_root) if settings.datalist else (settings.data_root, None)
    cases = with_mapped_labels(find_cases(preset, data, root), preset, settings.cache_dir / "labels")
    return cases, preset.preprocessing


def verify(settings: CacheSettings) -> None:
    """Print the damaged volumes of the cache. InputError if there is one."""
    from common.cache import maintenance

    count, damaged = maintenance.verify(settings.cache_dir, settings.workers)
    for folder, problem in damaged.items():
        print_main(f"  {folder}: {problem}")
    if damaged:
        found = f"{len(damaged)} of {count} volumes are damaged"
        raise InputError(f"{settings.cache_dir}: {found}; delete them and build them again")
    print_main(f"verify: {count} volumes, all complete")


def prune(settings: CacheSettings, cases: Sequence[Case]) -> None:
    """Remove the volumes of the cache that are not of `cases`."""
    from common.cache import maintenance

    folders, size = maintenance.prune(settings.cache_dir, cases, remove=not settings.dry_run)
    did = "would remove" if settings.dry_run else "removed"
    print_main(f"prune: {did} {len(folders)} volumes, {size / 1e9:.2f} GB, that these lists do not name")


def build(settings: CacheSettings, cases: Sequence[Case], preprocessing: Preprocessing) -> None:
    """Build the missing volumes and print a summary. InputError if a volume cannot be used, unless it is allowed."""
    from common.cache import failures, maintenance
    from common.cache.build import build_missing

    result = build_missing(cases, preprocessing, settings.cache_dir, settings.workers, unique=settings.preset is None)
    skipped = settings.skipped()
    size = sum(maintenance.folder_bytes(volume.folder) for volume in result.volumes)
    text = f"cache: {len(result.volumes)} of {len(cases)} volumes in {settings.cache_dir}, {size / 1e9:.2f} GB; "
    text += f"{result.built} built in {duration(result.seconds)}"
    text += f", largest memory of a process {result.peak_memory / 2**30:.2f} GiB" if result.built else ""
    print_main(text + (f"; {len(skipped)} files or folders skipped" if skipped else ""))
    if settings.report:
        print_main(maintenance.describe_cache(result.volumes))
        for item in skipped:
            print_main(f"  skipped {item.path}: {item.reason}")
    if result.failures:
        print_main(failures.failure_table(result.failures))
        if not settings.allow_failures:
            failed = f"{len(result.failures)} of {len(cases)} volumes cannot be used"
            raise InputError(f"{failed}; the others are cached (--allow_failures makes this exit with 0)")


if __name__ == "__main__":
    sys.exit(run_program(main))
