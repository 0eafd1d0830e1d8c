"""Sections of what makes a run repeatable: settings beside the recipe's and the defaults, machine, what to cite."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import load_mapping, shown
from common.errors import InputError
from common.report import page
from common.report.page import Html, tag
from common.report.runs import RunFolder

CITATION = Path(__file__).resolve().parents[2] / "CITATION.cff"
# differs between any two runs, and says nothing about them
OUT_DIR = "out_dir"


def settings_section(run: RunFolder) -> Html | None:
    """Return the settings that differ from the recipe's and from their defaults, and all others on request."""
    if run.kind == "sweep":
        return sweep_settings_section(run)
    rows = run.record.get("settings", [])
    if not rows:
        listed = page.pairs((name, value_text(value)) for name, value in run.settings.items())
        return page.section("Settings", tag("div", listed, class_="card")) if run.settings else None
    recipe = run.record.get("recipe")
    other = [row for row in rows if "recipe" in row and row["value"] != row["recipe"]]
    required = [row for row in rows if "default" not in row]
    changed = [row for row in rows if "default" in row and row["value"] != row["default"]]
    same = [row for row in rows if "default" in row and row["value"] == row["default"]]
    listed = page.pairs((row["name"], value_text(row["value"])) for row in required)
    return page.section(
        "Settings",
        page.cards(compared(other, "recipe", recipe)) if recipe else None,
        page.cards(
            compared(changed, "default", "the defaults"),
            page.join([tag("h3", "Have no default"), listed]) if required else None,
            uneven=True,
        ),
        page.folded(f"{len(same)} settings have their defaults", *grouped(same)),
    )


def sweep_settings_section(run: RunFolder) -> Html | None:
    """Return the settings of the runs of a sweep: those that differ between them, those that all share and that differ
    from their defaults, and on request what the sweep's --settings gave."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for part in run.parts.values():
        for row in part.record.get("settings", []):
            found.setdefault(row["name"], []).append(row)
    values = {name: list(dict.fromkeys(value_text(row["value"]) for row in rows)) for name, rows in found.items()}
    varied = [
        (tag("code", name), ", ".join(values[name])) for name in found if len(values[name]) > 1 and name != OUT_DIR
    ]
    shared = [rows[0] for name, rows in found.items() if len(values[name]) == 1 and "default" in rows[0]]
    changed = [row for row in shared if row["value"] != row["default"]]
    given = [(name, value_text(value)) for name, value in run.sweep.get("settings", {}).items()]
    return page.section(
        "Settings",
        page.cards(
            page.join([tag("h3", "Differ between the runs"), page.table(["setting", "values"], varied)])
            if varied
            else None,
            compared(changed, "default", "the defaults in all runs", "all runs") if found else None,
        ),
        page.folded("Given by the file of --settings", page.cards(page.pairs(given))) if given else None,
    )


def compared(rows: Sequence[Mapping[str, Any]], other: str, name: str, here: str = "this run") -> Html:
    """Return settings beside what they are elsewhere: the value `other` of a row, in what is called `name`."""
    cells = [(tag("code", row["name"]), value_text(row["value"]), value_text(row[other])) for row in rows]
    title = tag("h3", f"{len(rows) or 'None'} {'differs' if len(rows) < 2 else 'differ'} from {name}")
    return page.join([title, page.table(["setting", here, other], cells) if rows else None])


def grouped(rows: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Return settings under the headings that --help gives them."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append((row["name"], value_text(row["value"])))
    titled = (page.join([tag("h3", title), page.pairs(members)]) for title, members in groups.items())
    return [page.cards(*titled)] if groups else []


def value_text(value: Any) -> str:
    """Return a setting as the command line takes it."""
    return "(none)" if value in ("", []) else shown(value)


def environment_section(run: RunFolder) -> Html | None:
    """Return machine, versions, processes and commit."""
    found, plan = run.record.get("environment", {}), run.record.get("plan", {})
    used = {"started": run.record.get("started"), "device": plan.get("device"), "processes": plan.get("processes")}
    used |= {"trained parameters": f"{count:,}" if (count := run.record.get("trained_parameters")) else None}
    # the runs of a sweep have started one after the other
    used = {} if run.kind == "sweep" else used
    lists = [[(name, str(value)) for name, value in part.items() if value is not None] for part in (used, found)]
    return page.section("Environment", page.cards(*(page.pairs(part) for part in lists if part)))


# ---------------------------------------------------------------- citation


def citation_section(run: RunFolder) -> Html | None:
    """Return the papers of the run's method, of all methods where it is not known, and this software."""
    try:
        citation = load_mapping(CITATION)
    except InputError:
        return None
    papers = citation.get("references", [])
    method = run.about.get("method")
    chosen = [paper for paper in papers if method in paper.get("keywords", ())] or papers
    commit = run.record.get("environment", {}).get("code")
    software = f"{citation.get('title')}, version {citation.get('version')}" + (f", commit {commit}" if commit else "")
    intro = "Please cite the paper of the method" if len(chosen) == 1 else "Please cite the papers of the methods used"
    items = [*(tag("li", *reference(paper)) for paper in chosen), tag("li", f"{software}.")]
    return page.section("How to cite", tag("p", f"{intro}, and this software.", class_="quiet"), tag("ul", *items))


def reference(paper: Mapping[str, Any]) -> list[Any]:
    """Return a reference as in a bibliography, with its DOI as a link."""
    names = (author.get("name") or f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    place = f"{paper.get('journal')}, {paper.get('year')}"
    doi = paper.get("doi")
    link = [" ", tag("a", f"doi:{doi}", href=f"https://doi.org/{doi}")] if doi else []
    return [f"{', '.join(names).replace(', and others', ' and others')}. {paper['title']}. {place}.", *link]
