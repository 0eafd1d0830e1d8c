"""Check a downloaded data set against what is published, and make the layout that its recipe expects by links.

    python -m scripts.prepare BTCV --source /downloads/RawData
    python -m scripts.prepare TCIAcovid19 --source /downloads/manifest --check    only check
    python -m scripts.prepare --list    all data sets: where they are, their licences, and what is used of them

NAME is a preset of Finetune/datasets/ or a data set of Pretrain/datasets/; the YAML states what is published. Nothing
is downloaded or copied, and --source is not changed. When something is missing or wrong, nothing is made. The same
command again makes what is not there yet.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli import parse, run_program
from common.config import did_you_mean, setting
from common.errors import InputError
from common.files import naming_errors
from common.runlog import print_main
from Finetune import presets
from Finetune.presets import Preset, load_preset
from Pretrain import catalog
from Pretrain.catalog import Source
from scripts.published import Findings, check_contents, inspect, inspect_source

# missing files that are named; of the others only the number is printed
NAMED = 5


@dataclass(kw_only=True)
class PrepareSettings:
    """Settings of the check and of the links."""

    name: str | None = setting(None, "the data set; also as the first word, without --name")
    source: Path | None = setting(None, "folder of the unpacked download")
    out: Path | None = setting(None, "folder of the links; none: data/NAME, where the recipe looks")
    check: bool = setting(False, "only check")
    allow_missing: bool = setting(False, "make the links of what is there, also when published files are missing")
    list: bool = setting(False, "print the table of all data sets, and stop")


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    named_first = words and not words[0].startswith("-")
    settings = parse(PrepareSettings, ["--name", *words] if named_first else words, __doc__)
    if settings.list:
        return print_main(table())
    data = load(settings.name)
    source = settings.source
    if source is None or not source.is_dir():
        raise InputError(f"--source {source or ''}: expected the folder of the download; {advice(data)}")
    out = place(data, settings.out)
    found = inspect_source(data, source) if isinstance(data, Source) else inspect(data, source)
    check_contents(found, data if isinstance(data, Preset) else None)
    refuse(found, data, settings.allow_missing)
    links = {out: found.links[data.folders[0]]} if isinstance(data, Source) else at(out, found.links)
    new = missing_links(links)
    if not settings.check:
        make_links(new)
    report(data, out, found, len(new), settings.check)


def load(name: str | None) -> Preset | Source:
    """Return the preset or the pretraining data set of that name; of both, the preset. InputError if there is none."""
    known = names()
    if name not in known:
        hint = did_you_mean(name or "", known)
        raise InputError(f"{name or 'NAME'}: unknown data set; {hint}expected one of {', '.join(known)}")
    return load_preset(name) if name in presets.available() else catalog.load(name)[0]


def names() -> list[str]:
    """Return the names of the data sets that are published: presets first, without lists of several data sets."""
    published = [name for name in presets.available() if load_preset(name).published]
    sources = [name for name in catalog.available() if [source.name for source in catalog.load(name)] == [name]]
    return list(dict.fromkeys([*published, *sources]))


def advice(data: Preset | Source) -> str:
    """Return where a data set is to be had, and what of it is used."""
    if isinstance(data, Source):
        return f"get {data.name} from {data.where}; licence: {data.licence}; expected {data.layout}"
    published = data.published
    return f"get {data.name} from {published.where}; licence: {published.licence}; expected {published.contents}"


def refuse(found: Findings, data: Preset | Source, allow_missing: bool) -> None:
    """Print what is missing or wrong. InputError if anything is wrong, or is missing and that is not allowed."""
    problems = found.wrong + ([] if allow_missing else found.missing)
    if allow_missing and found.missing:
        print_main(f"warning: {named(found.missing)}")
    if allow_missing and not found.links:
        problems = found.missing
    if problems:
        raise InputError(f"{named(problems)}; {advice(data)}" if found.missing else named(problems))


def named(problems: Sequence[str]) -> str:
    """Return the first problems, and the number of all when there are more."""
    rest = len(problems) - NAMED
    return "; ".join(problems[:NAMED]) + (f"; and {rest} more ({len(problems)} in all)" if rest > 0 else "")


# ---------------------------------------------------------------- links


def place(data: Preset | Source, out: Path | None) -> Path:
    """Return the folder of the links.

    Raises:
        InputError: a pretraining set would not be found under this name, or the volumes that are made of the links
            would be written through them.
    """
    if isinstance(data, Preset):
        converted = Path("data") / data.name
        if not data.published.convert:
            return out or converted
        if out and os.path.abspath(out) == os.path.abspath(converted):
            raise InputError(f"--out {out}: this is the folder of the volumes that are made of them, expected another")
        return out or converted.with_name(f"{data.name}_pictures")
    out = out or Path("data") / data.folders[0]
    if out.name not in data.folders:
        expected = f"expected a folder called {' or '.join(data.folders)}, such as {out / data.folders[0]}"
        raise InputError(f"--out {out}: {data.name} is not looked for under this name; {expected}")
    return out


def at(out: Path, links: Mapping[str, Path]) -> dict[Path, Path]:
    """Return the links with their places below `out`. InputError for one that would be elsewhere."""
    for name in links:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise InputError(f"{name}: a path that leaves the folder of the data set, expected one inside it")
    return {out / name: target for name, target in links.items()}


def missing_links(links: Mapping[Path, Path]) -> dict[Path, Path]:
    """Return the links that are not there yet. InputError where something else has the name of one."""
    new = {}
    for path, target in links.items():
        if not os.path.lexists(path):
            new[path] = target
        elif not path.exists() or not os.path.samefile(path, target):
            raise InputError(f"{path}: is there already and is not {target}; remove it, or give another --out")
    return new


def make_links(links: Mapping[Path, Path]) -> None:
    """Make symbolic links to the absolute paths of their targets. When one cannot be made, those before are removed."""
    made: list[Path] = []
    try:
        for path, target in links.items():
            with naming_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(os.path.abspath(target))
            made.append(path)
    except BaseException:
        for path in made:
            path.unlink()
        raise


def report(data: Preset | Source, out: Path, found: Findings, new: int, only_check: bool) -> None:
    """Print what was found and made, and the next command."""
    state = "complete" if found.compared else "not compared with the published number, which is not known here"
    state = "incomplete" if found.missing else state
    count = f"{len(found.pairs)} volumes" if found.pairs else f"{found.scans} scans in {len(found.links)} folders"
    if found.more:
        print_main(f"note: {named(found.more)}")
    if only_check:
        return print_main(f"{data.name}: {count}, {state}; nothing was written (--check)")
    print_main(
        f"{data.name}: {count}, {state}; {new} links made, {max(0, len(found.links) - new)} were there, in {out}"
    )
    print_main(f"next: {next_command(data, out)}")


def next_command(data: Preset | Source, out: Path) -> str:
    """Return the command that uses the data set."""
    if isinstance(data, Source):
        root = shlex.quote(str(out.parent))
        return f"python generate_cache_files.py --datasets {data.name} --data_root {root} --cache_dir cache"
    folder = shlex.quote(str(out))
    if data.published.convert:
        return data.published.convert.format(out=folder)
    return f"DATA={folder} bash scripts/{data.name}/run.sh --init scratch"


# ---------------------------------------------------------------- table of the documents


def table() -> str:
    """Return the data sets as a table in Markdown, as in docs/data.md."""
    titles = ("data set", "used for", "where", "licence", "layout", "published", "command")
    rows = [titles, ["---"] * len(titles), *(row(load(name)) for name in names())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(data: Preset | Source) -> Sequence[str]:
    """Return the cells of a data set."""
    command = f"`python -m scripts.prepare {data.name} --source DIR`"
    if isinstance(data, Source):
        number = f"{data.published:,} volumes" if data.published else "number not verified"
        return f"`{data.name}`", "pretraining", data.where, data.licence, data.layout, number, command
    use = "both" if data.name in catalog.available() else "fine-tuning"
    published = data.published
    cases = len(published.all_ids()) or sum(published.cases)
    number = f"{cases} cases" if cases else ""
    not_verified = f"not verified: {published.unverified}" if published.unverified else ""
    number = "; ".join(filter(None, (number, not_verified)))
    return f"`{data.name}`", use, published.where, published.licence, published.contents, number, command


if __name__ == "__main__":
    sys.exit(run_program(main))
