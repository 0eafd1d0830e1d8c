"""Published data sets for pretraining: one YAML each in Pretrain/datasets/, and lists of them (1k, 10k).

Adding a data set means adding a YAML. Only images are taken: files and folders that are called labels, masks or
segmentations are passed over.
"""

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import InputError, load_yaml, read_yaml, setting
from common.datalist import Case, find_volumes, stem
from common.logging import say

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
        say(f"{source.name}: {len(found)} of {source.count} found{_remark(source, root, len(found))}")
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
