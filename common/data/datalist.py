"""Lists of volumes: a Decathlon JSON, a folder of NIfTI files or DICOM series, or a text file of paths."""

import errno
import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.data import dicom
from common.errors import InputError, one_line
from common.files import naming_errors
from common.runlog import print_main

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
# a folder is skipped if all words of its name are among these, so that a scan in seg_dicom4qi/ is read
LABEL_WORDS = {"label", "mask", "seg", "segmentation", "annotation"}
LABEL_WORDS |= {f"{word}s" for word in LABEL_WORDS}
OTHER_WORDS = {"map", "maps", "tr", "ts", "va", "train", "training", "test", "testing", "val", "validation"}
# number of parent folders that may be added to a name to make it unique
MAX_PARENTS = 7
DATA_ROOT_HELP = "folder that relative paths of a list start from; none or /: the folder of the list"


@dataclass(frozen=True)
class Case:
    """A volume of a list, with its label and fold if the list has them.

    `problem` is the reason why the volume cannot be used, if the list alone shows it.
    """

    name: str
    image: Path
    label: Path | None = None
    fold: int | None = None
    problem: str | None = None


def read_cases(source: str | Path, root: str | Path | None = None, section: str = "training") -> list[Case]:
    """Return the cases of a list, in its order.

    Args:
        source: a JSON file in the layout of the Medical Segmentation Decathlon; a folder, which is searched for image
            files and DICOM series (what is skipped is printed); or a text file with one path per line, where `#`
            starts a comment.
        root: folder that relative paths start from; None or "/" is the folder of the list. Absolute paths are taken as
            they are, and links are followed.
        section: the section of a JSON file to read.

    Returns:
        Cases with unique names. A name that occurs more than once is prefixed with the names of the parent folders. A
        file that is listed twice is a case with a `problem`.

    Raises:
        InputError: the list is missing, empty or malformed, or a name cannot be the name of a file.
    """
    source = Path(source)
    base = source.parent if root is None or os.path.abspath(root) == os.sep else Path(root)
    if source.is_dir():
        volumes, skipped = find_volumes(source)
        cases = [Case(stem(path), path) for path in volumes]
        if skipped:
            print_main(f"{source}: {skipped_text(skipped)}")
    elif source.suffix.lower() == ".json":
        cases = _read_json(source, base, section)
    else:
        lines = [line.split("#")[0].strip() for line in _read_text(source).splitlines()]
        cases = [Case(stem(line), base / line) for line in lines if line]
    if not cases:
        where = f", section '{section}'" if source.suffix.lower() == ".json" else ""
        raise InputError(f"{source}{where}: found an empty data list, expected at least one volume")
    return _with_unique_names(_with_repeats_marked(cases, source), source)


def _read_text(source: Path) -> str:
    try:
        with naming_errors(source, "the data list cannot be read"):
            if source.is_char_device():
                raise OSError(errno.EINVAL, "a device, not a file")
            return source.read_text()
    except UnicodeDecodeError:
        raise InputError(f"{source}: found a binary file, expected a JSON or text list, or a folder") from None


def stem(path: str | Path) -> str:
    """Return the name of a file without its image ending (.nii.gz, ...), or the name of a DICOM folder."""
    name = Path(path).name
    return next((name[: -len(ending)] for ending in ENDINGS if name.lower().endswith(ending)), name)


# ---------------------------------------------------------------- folders


@dataclass(frozen=True, order=True)
class Skipped:
    """A file or folder that is not read, and the reason."""

    path: Path
    reason: str


def find_volumes(folder: Path) -> tuple[list[Path], list[Skipped]]:
    """Return the image files and DICOM folders under `folder`, and what was skipped, both sorted.

    Folders of labels (labelsTr, masks, ...) are skipped. Links to folders are followed; each folder is read once.

    Raises:
        InputError: a folder cannot be read.
    """
    volumes: list[Path] = []
    skipped: list[Skipped] = []
    named_as_file: list[Path] = []
    visited: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        state = os.stat(place)
        if (state.st_dev, state.st_ino) in visited:
            folders.clear()
            continue
        visited.add((state.st_dev, state.st_ino))
        found, ignored = _volumes_in(Path(place), files)
        volumes += found
        skipped += ignored
        skipped += [Skipped(Path(place, name), "named as a folder of labels") for name in folders if _is_labels(name)]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _is_labels(name))
        named_as_file += [Path(place, name) for name in folders if name.lower().endswith(ENDINGS)]
    # an unpacked archive may be a folder x.nii.gz with a file x.nii.gz
    empty = [path for path in named_as_file if not any(volume.is_relative_to(path) for volume in volumes)]
    skipped += [Skipped(path, "a folder named as a file") for path in empty]
    return sorted(volumes), sorted(skipped)


def _raise_unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _is_labels(name: str) -> bool:
    """Return whether a folder has the name of a folder of labels: labelsTr, segmentation_masks, seg, ..."""
    words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)}
    return bool(words & LABEL_WORDS) and words <= LABEL_WORDS | OTHER_WORDS


def _volumes_in(folder: Path, files: list[str]) -> tuple[list[Path], list[Skipped]]:
    """Return the volumes directly in a folder: its image files, or itself if it has DICOM files only."""
    visible = [folder / name for name in sorted(files) if not name.startswith(".")]
    images = [path for path in visible if path.name.lower().endswith(ENDINGS)]
    has_series = any(dicom.is_dicom_file(path) for path in visible if path not in images)
    if images and has_series:
        return images, [Skipped(folder, "DICOM files beside image files")]
    return [folder] if has_series else images, []


def skipped_text(skipped: Sequence[Skipped], limit: int = 3) -> str:
    """Return the number of skipped files and folders, and up to `limit` of them with the reasons."""
    named = [f"{item.path} ({item.reason})" for item in skipped[:limit]]
    named += [f"{len(skipped) - limit} more"] if len(skipped) > limit else []
    return f"skipped {len(skipped)} files or folders: {', '.join(named)}"


# ---------------------------------------------------------------- JSON


def _read_json(source: Path, base: Path, section: str) -> list[Case]:
    text = _read_text(source)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not JSON, or nested too deeply ({one_line(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get(section), list):
        lists = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
        expected = f"one of the sections {', '.join(lists)}" if lists else "a mapping with lists of volumes"
        raise InputError(f"{source}: found no list '{section}', expected {expected}")
    return [_json_case(item, f"{source}: {section}[{i}]", base) for i, item in enumerate(content[section])]


def _json_case(item: Any, where: str, base: Path) -> Case:
    if isinstance(item, str):
        item = {"image": item}
    if not isinstance(item, dict) or not isinstance(item.get("image"), str):
        raise InputError(f"{where}: found {reprlib.repr(item)}, expected a path or a mapping with 'image' (one path)")
    for key, kind, expected in (("label", str, "one path"), ("fold", int, "a whole number"), ("name", str, "text")):
        value = item.get(key)
        if value is not None and type(value) is not kind:
            raise InputError(f"{where}: found the {key} {reprlib.repr(value)}, expected {expected}")
    label, name = item.get("label"), item.get("name")
    return Case(name or stem(item["image"]), base / item["image"], label and base / label, item.get("fold"))


# ---------------------------------------------------------------- names


def _is_encodable(path: Path | None) -> bool:
    try:
        return path is None or bool(os.fsencode(path))
    except UnicodeEncodeError:
        return False


def _with_repeats_marked(cases: list[Case], source: Path) -> list[Case]:
    seen: set[Path] = set()
    marked = []
    for case in cases:
        problem = f"{source}: found {case.image} twice, expected it once" if case.image in seen else None
        marked.append(replace(case, problem=problem))
        seen.add(case.image)
    return marked


def _with_unique_names(cases: list[Case], source: Path) -> list[Case]:
    """Prefix names that occur more than once, e.g. series that are all called CT, with names of their folders."""
    names = [case.name for case in cases]
    for level in range(MAX_PARENTS):
        count = Counter(name for name, case in zip(names, cases) if not case.problem)
        if max(count.values()) == 1:
            break
        parents = [case.image.parents[level].name if len(case.image.parents) > level else "" for case in cases]
        names = [f"{p.lstrip('.')}_{name}" if count[name] > 1 else name for p, name in zip(parents, names)]
    for name, case in zip(names, cases):
        for path in (case.image, case.label):
            # JSON may hold half of a surrogate pair
            if "\0" in str(path) or not _is_encodable(path):
                found = f"a NUL character or a surrogate in the path {str(path)!r}"
                raise InputError(f"{source}: found {found}, expected the path of a file")
        # outputs are written to files of this name, which must not leave their folder
        if not name.isprintable() or not name or name[0] == "." or "/" in name or "\\" in name:
            expected = "without / or \\ or control characters, and not starting with a dot"
            raise InputError(f"{source}: found the name {name!r} for {case.image}, expected a file's name: {expected}")
    return [replace(case, name=name) for name, case in zip(names, cases)]
