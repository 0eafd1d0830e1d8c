"""Which volumes: a Decathlon JSON, a folder of NIfTI files or DICOM series, or a text file of paths."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import dicom
from common.config import InputError

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


def read_cases(source: str | Path, root: str | Path | None = None, section: str = "training") -> list[Case]:
    """The cases of a list, in its order.

    `source`: a JSON in the Decathlon's layout, of which `section` is read; a folder, searched for NIfTI files and DICOM
    series; or a text file with one path per line (`#` begins a comment). Relative paths start from `root`, without it
    from the folder of the list. Names are made unique by the folders above.
    InputError for a list that is missing, empty or malformed. A path that leaves the root and a file listed twice are
    problems of their case.
    """
    source = Path(source)
    try:
        is_folder = source.is_dir()
        text = None if is_folder else source.read_text()
    except OSError as error:
        raise InputError(f"{source}: the data list cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{source}: found a binary file, needs a JSON or text list, or a folder") from None
    if is_folder:
        cases = [Case(stem(path), path) for path in find_volumes(source)]
    elif source.suffix.lower() == ".json":
        cases = _from_json(text, source, Path(root or source.parent), section)
    else:
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
        base = Path(root or source.parent)
        cases = [_case(base, line, source) for line in lines if line]
    if not cases:
        where = f", section '{section}'" if source.suffix.lower() == ".json" else ""
        raise InputError(f"{source}{where}: the data list is empty, needs at least one volume")
    return _unique_names(cases, source)


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


def _from_json(text: str, source: Path, root: Path, section: str) -> list[Case]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source}: not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get(section), list):
        lists = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
        raise InputError(f"{source}: found no list '{section}', allowed: {', '.join(lists) or 'none in this file'}")
    return [_json_case(item, f"{source}: {section}[{i}]", source, root) for i, item in enumerate(content[section])]


def _json_case(item: Any, where: str, source: Path, root: Path) -> Case:
    if isinstance(item, str):
        item = {"image": item}
    if not isinstance(item, dict) or not isinstance(item.get("image"), str):
        raise InputError(f"{where}: found {item!r}, needs a path or a mapping with 'image' (one path)")
    label, fold = item.get("label"), item.get("fold")
    if label is not None and not isinstance(label, str):
        raise InputError(f"{where}: found the label {label!r}, needs one path")
    if fold is not None and (not isinstance(fold, int) or isinstance(fold, bool)):
        raise InputError(f"{where}: found the fold {fold!r}, needs a whole number")
    return _case(root, item["image"], source, label, fold, item.get("name"))


def _case(
    root: Path, image: str, source: Path, label: str | None = None, fold: int | None = None, name: Any = None
) -> Case:
    """Paths start from `root`; an absolute one is taken as it is, a relative one may not climb out."""
    problem = None
    for text in filter(None, (image, label)):
        if not Path(text).is_absolute() and ".." in Path(os.path.normpath(text)).parts:
            problem = f"{source}: found the path '{text}', which leaves {root}; relative paths must stay inside"
    return Case(str(name or stem(image)), root / image, label and root / label, fold, problem)


def _unique_names(cases: list[Case], source: Path) -> list[Case]:
    """Cases of one name in different folders (every series called CT) get the names of the folders above as well."""
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
        names = [f"{parent}_{name}" if count[name] > 1 else name for parent, name in zip(parents, names)]
    return [replace(case, name=name) for name, case in zip(names, cases)]
