"""Whether the encoder learns: the messages of the first screen, and the section with measures and warnings."""

from collections.abc import Sequence

from common.report import page
from common.report.curves import Series, chart
from common.report.epochs import HEALTH, MONITOR, as_float, last, names, series
from common.report.page import Html, counted, message, number, tag
from common.report.runs import Line, RunFolder

# title of a chart -> the names that it shows, by their beginning and their last part
CHARTS = {
    "PSNR above the patch mean, dB": (HEALTH, ("over_mean",)),
    "PSNR above position alone, dB": (HEALTH, ("over_position",)),
    "Features after the norm, shares": (f"{HEALTH}norm/", ("constant", "position", "volume", "content")),
    "Teacher": (MONITOR, ("entropy", "entropy_of_mean", "kl")),
}


def messages(run: RunFolder) -> list[Html]:
    """Return the lines that say whether the run is healthy: what is wrong, or that nothing is."""
    shown = [message(str(run.about["leak"]))] if run.about.get("leak") else []
    if run.skipped:
        skipped = counted(len(run.skipped), "update")
        shown.append(message(f"Skipped as not finite or a spike: {skipped}, see anomalies.jsonl."))
    measured = max((line["epoch"] for line in run.log if any(name.startswith(HEALTH) for name in line)), default=None)
    now = [line for line in run.warnings if line["epoch"] == measured]
    shown += [message(f"Health, epoch {line['epoch'] + 1}: {line.get('text', '')}") for line in now]
    return shown or [no_warning_message(run, measured is not None)]


def no_warning_message(run: RunFolder, measured: bool) -> Html:
    """Return what can be said about a run without warnings.

    Args:
        measured: whether the log has measures of health.
    """
    begins = run.about.get("health_checked_from_update")
    if not run.log:
        return message("No epoch is done yet.", "note")
    if not measured:
        return message("No update was skipped.", "good")
    if begins is not None and run.steps < begins:
        return message(f"Health is not checked yet: the checks start at update {begins:,}.", "note")
    earlier = {line.get("kind") for line in run.warnings}
    note = f"; {counted(len(earlier), 'kind')} of warning earlier" if earlier else ""
    return message(f"No warning: all values are in their ranges{note}.", "good")


def health_section(run: RunFolder) -> Html | None:
    """Return the measures of learning over the epochs and per block, the warnings, and the last values."""
    found = names(run, HEALTH, MONITOR)
    if not found:
        return None
    charts = [over_epochs(run, title, *chosen) for title, chosen in CHARTS.items()]
    charts += [per_block(run, measure) for measure in ("content", "participation_ratio")]
    values = page.table(["measure", "last value"], [(name, number(last(run, name), 5)) for name in found], numbers=True)
    count, held_out = run.about.get("health_volumes"), run.about.get("held_out_volumes")
    volumes = f"Measured on {count} {'held-out' if held_out else 'training'} volumes, the same after every epoch."
    return page.section(
        "Health",
        tag("p", volumes, class_="quiet") if count else None,
        page.cards(*charts),
        warnings_table(run),
        page.folded(f"All {len(found)} values", values),
    )


def over_epochs(run: RunFolder, title: str, prefix: str, endings: Sequence[str]) -> Html | None:
    """Return a chart of the names that start with `prefix` and whose last part is one of `endings`."""
    chosen = [name for name in names(run, prefix) if name.split("/")[-1] in endings]
    # one measure of several views, or several measures
    part = 1 if len(endings) == 1 else -1
    return chart(title, [series(run, name, name.split("/")[part], index) for index, name in enumerate(chosen)])


def per_block(run: RunFolder, measure: str) -> Html | None:
    """Return a measure of the features per block, in the first and the last epoch that has it."""
    blocks = [name for name in names(run, f"{HEALTH}block") if name.endswith(f"/{measure}")]
    lines = [line for line in run.log if any(name in line for name in blocks)]
    curves = []
    for index, line in enumerate(lines[:1] + lines[1:][-1:]):
        points = [(float(position), as_float(line.get(name))) for position, name in enumerate(blocks, start=1)]
        curves.append(Series(f"epoch {line['epoch'] + 1}", points, index))
    return chart(f"{measure.replace('_', ' ').capitalize()} per block", curves, xlabel="block")


def warnings_table(run: RunFolder) -> Html | None:
    """Return each kind of warning with the epochs in which it was given."""
    kinds: dict[str, list[Line]] = {}
    for line in run.warnings:
        kinds.setdefault(str(line.get("kind")), []).append(line)
    rows = [(kind, epochs_of(lines), lines[-1].get("text")) for kind, lines in kinds.items()]
    return tag("div", page.table(["warning", "epochs", "last text"], rows), class_="card") if rows else None


def epochs_of(lines: Sequence[Line]) -> str:
    """Return in how many epochs, from which to which."""
    epochs = sorted(line["epoch"] + 1 for line in lines)
    return str(epochs[0]) if len(epochs) == 1 else f"{len(epochs)}, from {epochs[0]} to {epochs[-1]}"
