"""Sections of scores: a score card of segmentation or classification with its worst cases, and the rows of a sweep."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.report import page
from common.report.curves import Series, chart, dots_per_row
from common.report.page import Html, counted, decimals, message, number, tag, tile
from common.report.runs import RunFolder, Scores

COUNTS = ("present", "missed", "false_positives", "absent")
HEADINGS = {"dice": "Dice", "nsd": "NSD", "hd95": "HD95, mm", "false_positives": "false pos."}
# cases in the table of the worst
WORST = 6
# runs of a sweep that are listed
MAX_PARTS = 200


def interval(value: Sequence[float] | None) -> str | None:
    """Return a 95 % interval as text, None where there is none."""
    return f"95 % interval {decimals(value[0])} to {decimals(value[1])}" if value else None


# ---------------------------------------------------------------- score cards


def score_tiles(scores: Scores | None) -> list[Html]:
    """Return the score of the first screen."""
    if scores is None or not scores.card:
        return []
    card = scores.card
    if scores.of_classes:
        value = card.get("scores", {}).get("accuracy")
        return [tile("accuracy", decimals(value), interval(card.get("accuracy_ci95")))]
    dice = mean_of(card, "dice")
    return [tile(f"Dice, {counted(card.get('cases'), 'case')}", decimals(dice.get("mean")), interval(dice.get("ci95")))]


def mean_of(card: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    return card.get("mean", {}).get(metric) or {}


def score_section(run: RunFolder) -> Html | None:
    """Return the score card: notes, classes, dots per case, and the worst cases with their pictures."""
    scores = run.scores
    if scores is None or not scores.card:
        return None
    if scores.of_classes:
        return page.section("Scores", classification(scores))
    card = scores.card
    notes = [message(str(note)) for note in card.get("notes", ())]
    per_case = dots_per_row("Dice of every case, and the mean of each class", dots(scores))
    rules = tag("ul", *(tag("li", rule) for rule in card.get("rules", ())))
    protocol = page.pairs((key, text_of(value)) for key, value in card.get("protocol", {}).items())
    pictures = [page.picture(path, path.stem) for path in scores.worst]
    return page.section(
        "Scores",
        *notes,
        page.cards(class_table(card), per_case, uneven=True),
        tag("h3", "Worst cases"),
        tag("div", worst_table(scores), class_="card"),
        page.cards(*pictures),
        page.folded("Rules and protocol", rules, protocol),
    )


def class_table(card: Mapping[str, Any]) -> Html:
    metrics = list(card.get("mean", {}))
    header = ["", *(HEADINGS.get(name, name) for name in (*metrics, *COUNTS))]
    overall = {name: mean_of(card, name).get("mean") for name in metrics} | card.get("counts", {})
    lines = [*card.get("classes", {}).items(), ("mean of cases", overall)]
    rows = [[name, *score_cells(line, metrics)] for name, line in lines]
    return page.table(header, rows, numbers=True)


def score_cells(values: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """Return the metrics of a line, those in mm with one decimal, and its counts."""
    found = [decimals(values.get(name), 1 if name.startswith("hd") else 3) for name in metrics]
    return found + [number(values.get(name)) for name in COUNTS]


def dots(scores: Scores) -> list[tuple[str, list[float]]]:
    """Return the Dice of every case, per class."""
    values: dict[str, list[float]] = {}
    for row in scores.rows:
        dice = to_float(row.get("dice"))
        values.setdefault(str(row.get("name")), []).extend([] if math.isnan(dice) else [dice])
    return list(values.items())


def to_float(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def worst_table(scores: Scores) -> Html:
    """Return the cases of lowest mean Dice with what is wrong in them."""
    cases: dict[str, list[dict[str, str]]] = {}
    for row in scores.rows:
        cases.setdefault(str(row.get("case")), []).append(row)
    means = {}
    for case, rows in cases.items():
        values = [value for row in rows if not math.isnan(value := to_float(row.get("dice")))]
        if values:
            means[case] = sum(values) / len(values)
    lines = []
    for case in sorted(means, key=means.get)[:WORST]:
        lowest = min(cases[case], key=lambda row: (math.isnan(to_float(row.get("dice"))), to_float(row.get("dice"))))
        lines.append([case, decimals(means[case]), f"{lowest.get('name')} {decimals(to_float(lowest.get('dice')))}"])
        lines[-1].append(", ".join(f"{row.get('name')}: {row.get('status')}" for row in cases[case] if is_wrong(row)))
    has_wrong = any(line[-1] for line in lines)
    header = ["case", "mean Dice", "lowest class", *(["missed or not there"] if has_wrong else [])]
    return page.table(header, [line[: len(header)] for line in lines])


def is_wrong(row: Mapping[str, str]) -> bool:
    """Return whether a class was missed, or predicted where it is not."""
    return row.get("status") not in ("scored", "absent")


def classification(scores: Scores) -> Html:
    """Return accuracy and AUC, and the cases that are wrong."""
    values = page.pairs((name, number(value)) for name, value in scores.card.get("scores", {}).items())
    wrong = [row for row in scores.rows if row.get("class") != row.get("predicted")]
    rows = [(row.get("case"), row.get("class"), row.get("predicted")) for row in wrong]
    title = tag("h3", f"Wrong: {len(wrong)} of {len(scores.rows)} cases")
    listed = tag("div", page.table(["case", "class", "predicted"], rows), class_="card") if rows else None
    return page.join([tag("div", values, class_="card"), title, listed])


def text_of(value: Any) -> str:
    """Return a plain value as text, without the braces of JSON where it is a list."""
    if isinstance(value, list):
        return ", ".join(text_of(item) for item in value)
    if isinstance(value, dict):
        return "; ".join(f"{key} {text_of(item)}" for key, item in value.items())
    return "-" if value in (None, "") else str(value)


# ---------------------------------------------------------------- sweeps


def sweep_tiles(run: RunFolder) -> list[Html]:
    """Return the best row, and how many runs are done."""
    rows = [row for row in run.sweep.get("rows", ()) if row.get("score") is not None]
    done = sum(part_is_done(part) for part in run.parts.values())
    tiles = [tile("runs with scores", f"{done} of {len(run.parts)}", "so far, of those that have a folder")]
    if rows:
        best = max(rows, key=lambda row: row["score"])
        note = f"{row_name(best)}, {counted(best.get('count'), 'label')}"
        tiles.insert(0, tile(f"best {run.sweep.get('score', 'score')}", decimals(best["score"]), note))
        tiles.append(tile("seeds", str(len(run.sweep.get("seeds", ()))), f"{run.sweep.get('updates')} updates each"))
    return tiles


def part_is_done(part: RunFolder) -> bool:
    return part.scores is not None


def sweep_verdict(run: RunFolder) -> list[Html]:
    failed = run.sweep.get("failed") or {}
    lines = [message(f"{name} failed: {reason}") for name, reason in failed.items()]
    missing = sum(row.get("missing") or 0 for row in run.sweep.get("rows", ()))
    if run.sweep and not failed and not missing:
        lines.append(message("Every run of the sweep is done.", "good"))
    elif missing:
        lines.append(message(f"Without scores yet: {counted(missing, 'run')}.", "note"))
    return lines


def row_name(row: Mapping[str, Any]) -> str:
    return f"{row.get('model')} {row.get('init')}"


def sweep_chart(run: RunFolder) -> Html | None:
    """Return the score against the number of labels, with intervals."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(run.sweep.get("rows", ()), key=lambda row: row.get("count") or 0):
        if row.get("score") is not None:
            groups.setdefault(row_name(row), []).append(row)
    curves = []
    for colour, (name, rows) in enumerate(groups.items()):
        points = [(float(row["count"]), float(row["score"])) for row in rows]
        bands = [tuple(row.get("ci95") or (row["score"], row["score"])) for row in rows]
        curves.append(Series(name, points, colour, band=bands))
    return chart(str(run.sweep.get("score", "score")), curves, xlabel="training cases with labels", log_x=True)


def sweep_section(run: RunFolder) -> Html | None:
    """Return the rows of the sweep, and its runs."""
    columns = ("scratch", "dynunet")
    present = [name for name in columns if any(row.get(f"minus_{name}") for row in run.sweep.get("rows", ()))]
    header = ["head", "initialisation", "labels", "score", "95 % interval", "seeds"]
    header += [f"minus {name}" for name in present]
    rows = [sweep_row(row, present) for row in run.sweep.get("rows", ())]
    results = tag("div", page.table(header, rows), class_="card") if rows else None
    lines = [part_row(name, part) for name, part in list(run.parts.items())[:MAX_PARTS]]
    listed = page.table(["run", "epochs", "state"], lines) if lines else None
    return page.section("Results", results, page.folded(counted(len(run.parts), "run"), listed))


def sweep_row(row: Mapping[str, Any], compared: Sequence[str]) -> list[str]:
    seeds = [value for value in row.get("seeds", {}).values() if value is not None]
    ends = row.get("ci95")
    cells = [*(text_of(row.get(name)) for name in ("model", "init", "count")), decimals(row.get("score"))]
    cells += [f"{decimals(ends[0])} to {decimals(ends[1])}" if ends else "-", str(len(seeds))]
    for name in compared:
        delta = row.get(f"minus_{name}")
        ends = delta and delta.get("ci95")
        text = f"{delta['difference']:+.3f}" if delta else "-"
        cells.append(f"{text} ({ends[0]:+.3f} to {ends[1]:+.3f})" if ends else text)
    return cells


def part_row(name: str, part: RunFolder) -> tuple[str, str, str]:
    done, planned = part.epochs
    state = "scored" if part_is_done(part) else "trained" if done == planned else "not finished"
    return name, f"{done} of {planned}", state
