"""Which volumes: a Decathlon JSON, a folder of NIfTI files or DICOM series, or a text file of paths.

A list has a root, which its paths cannot leave: not by `..`, not as absolute paths, not through links.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.data import dicom
from common.errors import InputError

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
LABEL_FOLDERS = ("label", "mask", "seg", "annotation")  # how the names of folders with labels begin


@dataclass(frozen=True)
class Case:
    """One volume of a list, with its label file and its fold where the list names them."""

    name: str
    image: Path
    label: Path | None = None
    fold: int | None = None
    problem: str | None = None  # why it cannot be used, when the list alone tells


def read_cases(
    source: str | Path, root: str | Path | None = None, section: str = "training", flag: str = "data_root"
) -> list[Case]:
    """The cases of a list, in its order.

    `source`: a JSON in the Decathlon's layout, of which `section` is read; a folder, searched for NIfTI files and DICOM
    series; or a text file with one path per line (`#` begins a comment). Names are made unique by the folders above.

    `root`: where relative paths start, and what no path may leave once its links are followed. "/" lets every path
    pass; relative ones then start from the list's folder. A folder is a root itself, its links may also lead to `root`.
    None: the list's folder. `flag`: the setting that names the root, for messages.

    InputError for a list that is missing, empty or malformed, of which all paths leave the root, or with a name that
    cannot be a file's. Single paths that leave the root and files listed twice are problems of their case.
    """
    source = Path(source)
    rules = _Root.of(source, root, flag)
    try:
        is_folder = source.is_dir()
        text = None if is_folder else source.read_text()
    except OSError as error:
        raise InputError(f"{source}: the data list cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{source}: found a binary file, needs a JSON or text list, or a folder") from None
    if is_folder:
        cases = [Case(stem(path), path, problem=rules.problem(path)) for path in find_volumes(source)]
    elif source.suffix.lower() == ".json":
        cases = _from_json(text, rules, section)
    else:
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
        cases = [_case(rules, line) for line in lines if line]
    if not cases:
        where = f", section '{section}'" if source.suffix.lower() == ".json" else ""
        raise InputError(f"{source}{where}: the data list is empty, needs at least one volume")
    if all(case.problem for case in cases):
        raise InputError(f"{source}: none of its {len(cases)} paths can be used; {cases[0].problem}")
    return _unique_names(cases, source)


@dataclass(frozen=True)
class _Root:
    """Where the relative paths of `source` start (`base`), and the folders, links followed, that its paths must stay in
    (`fences`)."""

    source: Path
    base: Path
    fences: tuple[str, ...]
    flag: str

    @classmethod
    def of(cls, source: Path, root: str | Path | None, flag: str) -> "_Root":
        own = source if source.is_dir() else source.parent
        root = own if root is None else root
        fences = {os.path.realpath(root)} | ({os.path.realpath(own)} if own == source else set())
        anywhere = os.path.abspath(root) == os.sep
        return cls(source, own if anywhere else Path(root), tuple(sorted(fences)), flag)

    def problem(self, path: str | Path) -> str | None:
        """Why a path of the list must not be followed; None where it may."""
        for place in _with_links(self.base / path):
            target = Path(os.path.realpath(place))
            if not any(target.is_relative_to(fence) for fence in self.fences):
                return (
                    f"{path}: leaves the root {' and '.join(self.fences)}; --{self.flag} FOLDER names another, "
                    f"--{self.flag} / allows every path (of {self.source}; leads to {target})"
                )
        return None


def _with_links(path: Path) -> Iterator[Path]:
    """The path, and the links in it where it is the folder of a series."""
    yield path
    try:
        entries = list(os.scandir(path)) if path.is_dir() else []
    except OSError:  # is said when the volume is read
        entries = []
    yield from (Path(entry.path) for entry in entries if entry.is_symlink())


def stem(path: str | Path) -> str:
    """The name of a case: the file's name without .nii.gz and the like, or the name of a DICOM folder."""
    name = Path(path).name
    return next((name[: -len(ending)] for ending in ENDINGS if name.lower().endswith(ending)), name)


def find_volumes(folder: Path) -> list[Path]:
    """Image files and DICOM folders under `folder`, sorted; label folders (labelsTr, masks, ...) are passed over.

    Links to folders are followed once each, so that a loop of links ends.
    """
    return sorted(_walk(folder, set()))


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        state = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
    if (state.st_dev, state.st_ino) in seen:
        return
    seen.add((state.st_dev, state.st_ino))
    plain = [entry for entry in entries if not entry.name.startswith(".")]
    volumes = [Path(entry.path) for entry in plain if entry.name.lower().endswith(ENDINGS) and not _is_dir(entry)]
    yield from volumes
    if not volumes and any(dicom.is_dicom_file(Path(entry.path)) for entry in plain if not _is_dir(entry)):
        yield folder
    for entry in plain:
        if _is_dir(entry) and not entry.name.lower().startswith(LABEL_FOLDERS):
            yield from _walk(Path(entry.path), seen)


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _from_json(text: str, rules: _Root, section: str) -> list[Case]:
    source = rules.source
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source}: not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get(section), list):
        lists = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
        raise InputError(f"{source}: found no list '{section}', allowed: {', '.join(lists) or 'none in this file'}")
    return [_json_case(item, f"{source}: {section}[{i}]", rules) for i, item in enumerate(content[section])]


def _json_case(item: Any, where: str, rules: _Root) -> Case:
    if isinstance(item, str):
        item = {"image": item}
    if not isinstance(item, dict) or not isinstance(item.get("image"), str):
        raise InputError(f"{where}: found {item!r}, needs a path or a mapping with 'image' (one path)")
    label, fold, name = item.get("label"), item.get("fold"), item.get("name")
    if label is not None and not isinstance(label, str):
        raise InputError(f"{where}: found the label {label!r}, needs one path")
    if fold is not None and (not isinstance(fold, int) or isinstance(fold, bool)):
        raise InputError(f"{where}: found the fold {fold!r}, needs a whole number")
    if name is not None and not isinstance(name, str):
        raise InputError(f"{where}: found the name {name!r}, needs text")
    return _case(rules, item["image"], label, fold, name)


def _case(rules: _Root, image: str, label: str | None = None, fold: int | None = None, name: str | None = None) -> Case:
    problem = rules.problem(image) or (label and rules.problem(label)) or None
    return Case(name or stem(image), rules.base / image, label and rules.base / label, fold, problem)


def _unique_names(cases: list[Case], source: Path) -> list[Case]:
    """Cases of one name in different folders (every series called CT) get the names of the folders above as well.

    A name becomes the name of a file: InputError for one that could lead out of the folder it is written to.
    """
    seen: set[Path] = set()
    for number, case in enumerate(cases):
        if case.image in seen:
            cases[number] = replace(case, problem=f"{source}: found {case.image} twice, each volume may be listed once")
        seen.add(case.image)
    names = [case.name for case in cases]
    for level in range(1, 8):
        count: dict[str, int] = {}
        for name in names:
            count[name] = count.get(name, 0) + 1
        if max(count.values()) == 1:
            break
        parents = [case.image.parents[level - 1].name if len(case.image.parents) >= level else "" for case in cases]
        parents = [parent.lstrip(".") for parent in parents]
        names = [f"{parent}_{name}" if count[name] > 1 else name for parent, name in zip(parents, names)]
    for name, case in zip(names, cases):
        if not name.isprintable() or not name or name[0] == "." or "/" in name or "\\" in name:
            raise InputError(
                f"{source}: found the name {name!r} for {case.image}; a name becomes a file's: "
                "it may not contain / or \\ or control characters, nor begin with a dot"
            )
    return [replace(case, name=name) for name, case in zip(names, cases)]
