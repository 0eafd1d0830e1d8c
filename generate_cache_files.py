"""Volumes on disk -> cache on disk. Run once before training, or let the training programs fill what is missing.

    python generate_cache_files.py --datalist data/sample_abdomen/dataset.json --section pretraining
    python generate_cache_files.py --datalist data/my_scans --spacing 1.5 --low -175 --high 250

The work is in common/cache.py. Settings must be those of the run that will read the cache: they are part of its key.
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

    datalist: Path = setting(help="a Decathlon JSON, a folder of NIfTI files or DICOM series, or a text file of paths")
    data_root: Path | None = setting(None, "what the list's paths are relative to; none: the list's own folder")
    section: str = setting("training", "the section of a JSON list to read")
    labels: bool = setting(False, "cache the labels too (fine-tuning)")
    cache_dir: Path = setting(Path("cache"), "the cache")
    workers: int = setting(0, "processes; 0 works in this one")

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


def main() -> None:
    settings = parse(CacheSettings, description=__doc__)
    from dataclasses import replace

    from common import cache  # slow to import: only what is needed for --help comes before
    from common.datalist import read_cases
    from common.volumes import Preprocessing

    names = ("spacing", "intensity", "low", "high", "foreground_threshold", "margin", "channels", "dtype")
    preprocessing = Preprocessing(**{name: getattr(settings, name) for name in names})
    cases = read_cases(settings.datalist, settings.data_root, settings.section)
    if not settings.labels:
        cases = [replace(case, label=None) for case in cases]
    filled = cache.fill(cases, preprocessing, settings.cache_dir, settings.workers)
    say(
        f"cache: {len(filled.entries)} of {len(cases)} volumes in {settings.cache_dir} "
        f"({filled.built} made now, {filled.seconds:.1f} s)"
    )
    for case, reason in filled.failures:
        say(f"  not used: {case.name}: {reason}")
    if filled.failures and not settings.allow_failures:
        raise InputError(f"{len(filled.failures)} of {len(cases)} volumes cannot be used (--allow_failures goes on)")


if __name__ == "__main__":
    sys.exit(run_program(main))
