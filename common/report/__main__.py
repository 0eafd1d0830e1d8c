"""Make one HTML file of a pretraining run, a fine-tuning run or a sweep: it holds its pictures and loads nothing.

    python -m common.report RUN_DIR
    python -m common.report RUN_DIR --out page.html --watch 30

Shown is what the folder holds: settings beside their defaults, curves, health, speed, reconstructions, scores with the
worst cases, machine and versions, and what to cite.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NoReturn

from common.cli import run_program
from common.errors import InputError
from common.files import save_bytes
from common.report import details, health, page, results, training
from common.report.page import Html, tag
from common.report.runs import RunFolder, read_run, signature
from common.runlog import print_main

PAGE = "report.html"
# seconds between two looks at the folder
WATCH = 10.0


class Parser(argparse.ArgumentParser):
    """A parser whose errors are those of the other programs: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the arguments")


def main(argv: list[str] | None = None) -> None:
    name = Path(sys.argv[0]).name
    name = "python -m common.report" if name == "__main__.py" else name
    parser = Parser(name, description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"page to write (default: RUN_DIR/{PAGE})")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=WATCH,
        metavar="SECONDS",
        help=f"write it again whenever the run has written something, looking every SECONDS (default: {WATCH:g})",
    )
    given = parser.parse_args(argv)
    out = given.out or given.run_dir / PAGE
    if given.watch is not None and not 0.1 <= given.watch <= 86400:
        raise InputError(f"--watch {given.watch:g}: must be from 0.1 to 86400 seconds")
    write_page(given.run_dir, out, given.watch)
    print_main(str(out))
    if given.watch is not None:
        watch(given.run_dir, out, given.watch)


def watch(folder: Path, out: Path, seconds: float) -> None:
    """Write the page again whenever a file of the run has changed, until Ctrl-C. The last page does not refresh."""
    print_main(f"watching {folder} every {seconds:g} s; Ctrl-C ends")
    shown = signature(folder, out)
    try:
        while True:
            time.sleep(seconds)
            found = signature(folder, out)
            if found != shown:
                try:
                    write_page(folder, out, seconds)
                    shown = found
                except InputError as error:
                    # the run may be moving its files; the page stays as it was
                    print_main(f"warning: {error}")
    finally:
        write_page(folder, out)


def write_page(folder: Path, out: Path, refresh: float | None = None) -> None:
    """Write the page of the run in `folder` to `out`, completely or not at all.

    Args:
        refresh: seconds after which the browser loads the page again, None: never.

    Raises:
        InputError: the folder is no run, or the page cannot be written.
    """
    run = read_run(folder)
    save_bytes(out, page.document(title(run), body(run), refresh).encode())


def title(run: RunFolder) -> str:
    """Return what the page is about."""
    if run.kind == "sweep":
        preset = run.sweep.get("preset", run.path.resolve().name)
        return f"{preset}, fold {run.sweep['fold']}" if "fold" in run.sweep else str(preset)
    if run.kind == "scores":
        return str(run.scores.card.get("preset") or run.scores.card.get("protocol", {}).get("preset", "Scores"))
    return str(run.about.get("title") or run.settings.get("preset") or f"{run.settings.get('method', '')} {run.kind}")


def body(run: RunFolder) -> Html:
    """Return the first screen and the sections that the run has."""
    sections = [
        results.score_section(run),
        results.sweep_section(run),
        training.reconstruction_section(run),
        training.curves_section(run),
        health.health_section(run),
        training.speed_section(run),
        details.settings_section(run),
        details.environment_section(run),
        details.citation_section(run),
    ]
    return page.join([first_screen(run), *sections, footer(run)])


def first_screen(run: RunFolder) -> Html:
    """Return what was trained, the result, the messages on its health, and the main curve."""
    kinds = {"sweep": "Sweep", "scores": "Score card", "pretraining": "Pretraining", "fine-tuning": "Fine-tuning"}
    if run.kind == "sweep":
        tiles, lines, curve = results.sweep_tiles(run), results.sweep_verdict(run), results.sweep_chart(run)
    elif run.kind == "scores":
        tiles, lines, curve = results.score_tiles(run.scores), [], None
    else:
        tiles = [*results.score_tiles(run.scores), *training.result_tiles(run)]
        lines, curve = health.messages(run), training.main_chart(run)
    left = tag(
        "div",
        tag("p", kinds.get(run.kind, run.kind), class_="kicker"),
        tag("h1", title(run)),
        tag("p", summary(run), class_="quiet"),
        tag("div", *tiles, class_="tiles"),
        *lines,
    )
    return tag("header", left, curve, class_="first" if curve else "first single")


def summary(run: RunFolder) -> str:
    """Return one line: network, size, data."""
    about, record = run.about, run.record
    parts = [about.get("network") or run.settings.get("model")]
    if (count := record.get("trained_parameters")) and run.kind != "sweep":
        parts.append(f"{count / 1e6:.3g} million parameters")
    if "training_volumes" in about:
        parts.append(f"{about['training_volumes']} training volumes, {about['held_out_volumes']} held out")
    if "training_cases" in about and run.kind != "sweep":
        parts.append(f"{about['training_cases']} training and {about['validation_cases']} validation cases")
        start = str(about.get("initial_weights"))
        parts.append("random weights at the start" if start == "scratch" else f"starts from {start}")
    if run.sweep:
        parts.append(f"{len(run.sweep.get('test_cases', ()))} test cases")
    return " · ".join(str(part) for part in parts if part)


def footer(run: RunFolder) -> Html:
    made = time.strftime("%Y-%m-%d %H:%M")
    absent = [tag("p", f"Not shown: {problem}.") for problem in run.problems]
    return tag("footer", *absent, tag("p", f"Made from {run.path} by python -m common.report, {made}."))


if __name__ == "__main__":
    sys.exit(run_program(main))
