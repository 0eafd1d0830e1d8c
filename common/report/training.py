"""Sections of a training run: numbers of the first screen, curves, speed, reconstructions."""

import statistics

from common.report import page
from common.report.curves import chart
from common.report.epochs import HEALTH, VALIDATION, last, losses, names, other_volumes, series, views
from common.report.page import Html, counted, decimals, message, number, tag, tile
from common.report.runs import RunFolder
from common.resources import duration

# share of the time above which waiting for data is pointed out (our choice)
LONG_WAIT = 0.2
# curves in the chart of the validation
MAX_SCORES = 12


# ---------------------------------------------------------------- at a glance


def result_tiles(run: RunFolder) -> list[Html]:
    """Return the numbers of the first screen: result, loss, epochs, time."""
    tiles = []
    if (dice := last(run, "val/dice")) is not None and run.scores is None:
        cases = run.about.get("validation_cases")
        tiles.append(tile("Dice in validation", decimals(dice), counted(cases, "case") if cases else None))
    for kind in views(run)[:2]:
        value = decimals(last(run, f"{HEALTH}{kind}/over_mean"), 2)
        tiles.append(
            tile(f"{kind} PSNR", f"{value} dB", f"relative to predicting each patch by its mean, {other_volumes(run)}")
        )
    if found := losses(run):
        first = next(line[found[0]] for line in run.log if found[0] in line)
        tiles.append(tile(f"loss {found[0]}", number(last(run, found[0]), 3), f"from {number(first, 3)}"))
    done, planned = run.epochs
    note = f"{run.steps:,} updates" + ("" if planned in (None, done) else remaining(run, planned - done))
    tiles.append(tile("epochs", f"{done} of {planned}" if planned else str(done), note))
    tiles.append(tile("time", duration(sum(line.get("seconds", 0.0) for line in run.log)), speed_note(run)))
    return tiles


def remaining(run: RunFolder, epochs: int) -> str:
    seconds = [line["seconds"] for line in run.log[-5:] if "seconds" in line]
    return f", about {duration(epochs * statistics.mean(seconds))} more" if seconds else ""


def speed_note(run: RunFolder) -> str | None:
    rates = [line["volumes_per_second"] for line in run.log if "volumes_per_second" in line]
    return f"{number(statistics.median(rates), 3)} volumes/s" if rates else None


def main_chart(run: RunFolder) -> Html | None:
    """Return the curve of the first screen: scores in validation where there are any, else the first losses."""
    if any("val/dice" in line for line in run.log):
        return chart("Dice in validation", [series(run, "val/dice", "mean")])
    charts = loss_charts(run)
    return charts[0] if charts else None


# ---------------------------------------------------------------- sections


def loss_charts(run: RunFolder) -> list[Html]:
    """Return charts of the losses, those of reconstruction in the first, with held-out values dashed."""
    found = losses(run)
    reconstruction = [name for name in found if name.startswith("rec_")]
    groups = {"Reconstruction loss": reconstruction, "Other losses": [n for n in found if n not in reconstruction]}
    if not reconstruction:
        groups = {"Training loss": found}
    charts = []
    for title, members in groups.items():
        curves = []
        for colour, name in enumerate(members):
            curves.append(series(run, name, name, colour))
            curves.append(series(run, f"{HEALTH}{name}", f"{name}, {other_volumes(run)}", colour, dashed=True))
        charts.append(chart(title, curves))
    return [one for one in charts if one is not None]


def curves_section(run: RunFolder) -> Html | None:
    scores = names(run, VALIDATION)[:MAX_SCORES]
    more = [
        chart("Validation", [series(run, name, name.removeprefix(VALIDATION), i) for i, name in enumerate(scores)]),
        chart("Learning rate", [series(run, "lr", "lr")]),
        chart("Gradient norm", [series(run, "grad_norm", "grad_norm")]),
    ]
    return page.section("Curves", page.cards(*loss_charts(run), *more))


def speed_section(run: RunFolder) -> Html | None:
    """Return throughput and the wait for data."""
    waits = [line["data_wait"] for line in run.log if "data_wait" in line]
    charts = page.cards(
        chart("Volumes per second", [series(run, "volumes_per_second", "over all processes")]),
        chart("Share of the time waiting for data", [series(run, "data_wait", "data wait", 1)]),
        chart("Seconds per epoch, validation included", [series(run, "seconds", "seconds", 2)]),
    )
    wait = statistics.median(waits) if waits else 0.0
    advice = message(f"The process waits for data {wait:.0%} of the time: raise --workers.")
    return page.section("Speed", advice if wait > LONG_WAIT else None, charts)


def reconstruction_section(run: RunFolder) -> Html | None:
    """Return the last reconstruction, and the first on request."""
    if not run.reconstructions:
        return None
    undone = run.settings.get("norm_pix_loss", True)
    text = (
        "Per kind of view three planes: the view, the patches that the encoder sees, the reconstruction of the others, "
        "and its absolute error."
    )
    text += " Predictions are of normalised patches, shown with mean and spread of the true patch." * bool(undone)
    (first, first_path), (epoch, path) = run.reconstructions[0], run.reconstructions[-1]
    earlier = page.folded(f"After epoch {first + 1}", page.picture(first_path, f"after epoch {first + 1}", large=True))
    return page.section(
        "Reconstructions",
        tag("p", text, class_="quiet"),
        tag("div", page.picture(path, f"after epoch {epoch + 1}", large=True), class_="card"),
        earlier if epoch != first else None,
    )
