"""Settings of the data, and the published data sets for pretraining: one YAML each in Pretrain/datasets/.

A data set is added by a YAML; a list (1k, 10k) is a YAML with names of data sets. Files and folders that are named as
labels, masks or segmentations are left out.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import group, load_yaml, nearest, read_yaml, setting
from common.data.datalist import DATA_ROOT_HELP, Case, Skipped, find_volumes, read_cases, skipped_text, stem
from common.data.preprocessing import Preprocessing
from common.errors import InputError
from common.runlog import print_main

DATASETS = Path(__file__).parent / "datasets"
# patterns of file names, lower case
LABEL_FILES = ("*label*", "*mask*", "*_seg.*", "*segmentation*", "*-seg.*")


@dataclass(kw_only=True)
class DataSettings:
    """Settings of the data that the cache and the programs share."""

    datasets: tuple[str, ...] = setting((), "pretraining data sets or lists of Pretrain/datasets/, e.g. 1k, 10k, BTCV")
    datalist: tuple[Path, ...] = setting((), "Decathlon JSONs, folders of NIfTI or DICOM series, text files of paths")
    data_root: Path | None = setting(None, f"folder of the data sets; {DATA_ROOT_HELP}")
    section: str = setting("training", "the section of a JSON list to read")
    cache_dir: Path = setting(Path("cache"), "folder of the cache; volumes that are missing are added at the start")
    allow_failures: bool = setting(False, "continue without volumes that cannot be used, and print the reasons")
    preprocessing: Preprocessing = group(Preprocessing, "Preprocessing (part of the key of a cached volume)")

    def cases(self, labels: bool = False) -> list[Case]:
        """Return the volumes of all data sets and lists. InputError if there are none.

        Args:
            labels: keep the labels of the lists.
        """
        cases = read_datasets(self.datasets, self.data_root) if self.datasets else []
        for datalist in self.datalist:
            found = read_cases(datalist, self.data_root, self.section)
            cases += found if labels else [replace(case, label=None) for case in found]
        if not cases:
            raise InputError("no data: expected --datasets or --datalist")
        return cases

    def skipped(self) -> list[Skipped]:
        """Return the files and folders of the data sets and lists that are not read."""
        root = Path(self.data_root or "data")
        found = [item for source in load_all(self.datasets) for item in find(source, root)[1]]
        return found + [item for path in self.datalist if path.is_dir() for item in find_volumes(path)[1]]


# ---------------------------------------------------------------- published data sets


@dataclass(frozen=True)
class Source:
    """A published data set: where to get it, its licence, the files to use, and the number of volumes."""

    name: str
    description: str
    where: str = setting(help="address, and how to get access")
    licence: str = setting(help="as far as known; the source decides")
    citation: str = setting(help="publication to cite")
    folders: tuple[str, ...] = setting(help="folder in the data root; the first that exists is used")
    layout: str = setting(help="description of the files in the folder")
    count: int = setting(help="number of volumes in the papers' tables")
    published: int | None = setting(None, "number of volumes at the source; none: not verified", least=1)
    include: tuple[str, ...] = setting(("*",), "patterns of paths relative to the folder")
    exclude: tuple[str, ...] = setting((), "patterns of paths to leave out")
    modality: str = "CT"


@dataclass(frozen=True)
class SourceList:
    """Several data sets under one name."""

    name: str
    description: str
    datasets: tuple[str, ...] = setting(help="names of data sets")


def available() -> list[str]:
    """Return the names of the data sets and lists of this repository."""
    return sorted(path.stem for path in DATASETS.glob("*.yaml"))


def load(name: str, within: tuple[Path, ...] = ()) -> list[Source]:
    """Return the data sets of a name in Pretrain/datasets/, or of a custom YAML file.

    Args:
        within: the lists that name it, from the outermost.

    Raises:
        InputError: there is no such name or file, the YAML is not valid, or a list contains itself.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else DATASETS / f"{name}.yaml"
    if not path.is_file():
        near = nearest(name, available())
        hint = f"did you mean {near}? " if near else ""
        raise InputError(f"--datasets {name}: {hint}expected a YAML or one of {', '.join(available())}")
    if "datasets" not in (load_yaml(path) or {}):
        return [read_yaml(path, Source)]
    if path in within:
        raise InputError(f"{path}: this list contains itself, expected other data sets and lists")
    return [source for part in read_yaml(path, SourceList).datasets for source in load(part, (*within, path))]


def read_datasets(names: Sequence[str], data_root: str | Path | None = None) -> list[Case]:
    """Return the images of data sets and lists, and print how many of each were found ("BTCV: 24 of 24 found").

    Raises:
        InputError: no volume was found.
    """
    root = Path(data_root or "data")
    if not root.is_dir():
        raise InputError(f"--data_root {root}: no such folder")
    sources = load_all(names)
    cases = []
    for source in sources:
        found, skipped = find(source, root)
        print_main(f"{source.name}: {len(found)} of {source.count} found{_remark(source, root, len(found))}")
        if skipped:
            print_main(f"{source.name}: {skipped_text(skipped)}")
        cases += found
    if not cases:
        names, layouts = zip(*((s.name, f"{s.name}: {s.layout}") for s in sources))
        raise InputError(f"{root}: found no volume of {', '.join(names)}; expected {'; '.join(layouts)}")
    return cases


def load_all(names: Sequence[str]) -> list[Source]:
    """Return the data sets of several names, each once."""
    return list({source.name: source for name in names for source in load(name)}.values())


def find(source: Source, root: Path) -> tuple[list[Case], list[Skipped]]:
    """Return the images of a data set in `root`, with the name of the set in theirs, and what was skipped."""
    folder = next((root / name for name in source.folders if (root / name).is_dir()), None)
    return ([], []) if folder is None else find_in(source, folder)


def find_in(source: Source, folder: Path) -> tuple[list[Case], list[Skipped]]:
    """Return the images of a data set in its own folder, and what was skipped, as `find`."""
    cases = []
    volumes, skipped = find_volumes(folder)
    for path in volumes:
        inside = path.relative_to(folder).as_posix()
        if _matches(path.name.lower(), LABEL_FILES):
            skipped.append(Skipped(path, "named as a label"))
        elif not _matches(inside, source.include) or _matches(inside, source.exclude):
            skipped.append(Skipped(path, f"left out by the YAML of {source.name}"))
        else:
            cases.append(Case(f"{source.name}/{inside[: -len(path.name)]}{stem(path)}", path))
    return cases, skipped


def _remark(source: Source, root: Path, found: int) -> str:
    if found == source.count:
        return ""
    if found:
        return f", {abs(found - source.count)} {'more' if found > source.count else 'fewer'} than the papers' tables"
    return f" in {root}/{source.folders[0]}; expected {source.layout}; get it from {source.where}, {source.licence}"


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
