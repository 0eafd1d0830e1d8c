"""Published data sets for pretraining: one YAML each in Pretrain/datasets/, and lists of them (1k, 10k).

Adding a data set means adding a YAML. Only images are taken: files and folders that are called labels, masks or
segmentations are passed over.
"""

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.config import load_yaml, read_yaml, setting
from common.data.datalist import Case, find_volumes, stem
from common.errors import InputError
from common.runlog import print_main

DATASETS = Path(__file__).parents[1] / "Pretrain" / "datasets"
LABEL_FILES = ("*label*", "*mask*", "*_seg.*", "*segmentation*", "*-seg.*")  # file names, lower case


@dataclass(frozen=True)
class Source:
    """A published data set: where to get it, its licence, what of its folder is taken, how much there should be."""

    name: str
    description: str
    where: str = setting(help="address, and what it takes to get it")
    licence: str = setting(help="as far as we know; the source decides")
    citation: str = setting(help="whom to cite")
    folders: tuple[str, ...] = setting(help="folder below the data root; the first that exists is taken")
    layout: str = setting(help="what the folder looks like, in words")
    count: int = setting(help="volumes that the papers' tables give")
    include: tuple[str, ...] = setting(("*",), "patterns of paths relative to the folder")
    exclude: tuple[str, ...] = setting((), "patterns of paths that are left out")
    modality: str = "CT"


@dataclass(frozen=True)
class SourceList:
    """Several data sets under one name."""

    name: str
    description: str
    datasets: tuple[str, ...] = setting(help="names of data sets")


def available() -> list[str]:
    return sorted(path.stem for path in DATASETS.glob("*.yaml"))


def load(name: str) -> list[Source]:
    """The data sets of one of our names, or of a YAML of one's own. InputError says what is wrong with it."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else DATASETS / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, available(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"datasets: found '{name}', {hint}allowed: {', '.join(available())}, or the path of a YAML")
    if "datasets" not in (load_yaml(path) or {}):
        source = read_yaml(path, Source)
        outside = next((f for f in source.folders if Path(f).is_absolute() or ".." in Path(f).parts), None)
        if outside:
            raise InputError(f"{path}: folders: found '{outside}', needs folders below the data root")
        return [source]
    return [source for part in read_yaml(path, SourceList).datasets for source in load(part)]


def read_datasets(names: Sequence[str], data_root: str | Path | None = None) -> list[Case]:
    """The images of data sets and lists, told with how many were expected ("BTCV: 24 of 24 found").

    A set that is not there is said and left out; InputError when nothing is found at all.
    """
    root = Path(data_root or "data")
    if not root.is_dir():
        raise InputError(f"data_root {root}: no such folder")
    sources = {source.name: source for name in names for source in load(name)}
    cases = []
    for source in sources.values():
        found = find(source, root)
        print_main(f"{source.name}: {len(found)} of {source.count} found{_remark(source, root, len(found))}")
        cases += found
    if not cases:
        wanted = "; ".join(f"{s.name}: {s.layout}" for s in sources.values())
        raise InputError(f"{root}: found no volume of {', '.join(sources)}; expected {wanted}")
    return cases


def find(source: Source, root: Path) -> list[Case]:
    """The images of one data set below `root`, sorted by path, named after the set."""
    folder = next((root / name for name in source.folders if (root / name).is_dir()), None)
    if folder is None:
        return []
    cases = []
    for path in find_volumes(folder):
        inside = path.relative_to(folder).as_posix()
        if _matches(inside, source.include) and not _matches(inside, source.exclude) and not _is_label(path):
            cases.append(Case(f"{source.name}/{inside[: -len(path.name)]}{stem(path)}", path))
    return cases


def _remark(source: Source, root: Path, found: int) -> str:
    if found == source.count:
        return ""
    if found:
        return f", {abs(found - source.count)} {'more' if found > source.count else 'fewer'} than the papers' tables"
    return f" in {root}/{source.folders[0]}; expected {source.layout}; get it from {source.where}, {source.licence}"


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _is_label(path: Path) -> bool:
    return _matches(path.name.lower(), LABEL_FILES)


def unlabelled(cases: Sequence[Case]) -> list[Case]:
    """The cases without their labels: what pretraining takes."""
    return [replace(case, label=None) for case in cases]


# ---------------------------------------------------------------- datasettings
# Which volumes, and how they are preprocessed: the settings that the cache's writer and its readers share.

if TYPE_CHECKING:
    from common.data.datalist import Case
    from common.data.preprocessing import Preprocessing


@dataclass(kw_only=True)
class DataSettings:
    """Settings of the data. All from `spacing` on are part of the cache's key. Defaults are those of pretraining."""

    datasets: tuple[str, ...] = setting((), "pretraining data sets or lists of Pretrain/datasets/, e.g. 1k, 10k, BTCV")
    datalist: tuple[Path, ...] = setting((), "Decathlon JSONs, folders of NIfTI or DICOM series, text files of paths")
    data_root: Path | None = setting(
        None,
        "folder of the data sets; what a list's paths are relative to and may not leave, none: the list's folder; "
        "/ lets them lead anywhere, relative ones from the list's folder",
    )
    section: str = setting("training", "the section of a JSON list to read")
    cache_dir: Path = setting(Path("cache"), "the cache; a program adds what is missing at its start")
    allow_failures: bool = setting(False, "go on without the volumes that cannot be used, with a table of the reasons")

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

    def preprocessing(self) -> "Preprocessing":
        from common.data.preprocessing import Preprocessing  # slow to import: --help does not wait for it

        names = ("spacing", "intensity", "low", "high", "foreground_threshold", "margin", "channels", "dtype")
        return Preprocessing(**{name: getattr(self, name) for name in names})

    def cases(self, labels: bool = False) -> "list[Case]":
        """The volumes of all data sets and lists, without labels unless asked for. InputError where none is named."""
        from common.data.datalist import read_cases
        from Pretrain.catalog import read_datasets, unlabelled

        cases = read_datasets(self.datasets, self.data_root) if self.datasets else []
        for datalist in self.datalist:
            found = read_cases(datalist, self.data_root, self.section)
            cases += found if labels else unlabelled(found)
        if not cases:
            raise InputError("no data: give --datasets or --datalist")
        return cases
