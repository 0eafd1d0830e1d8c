"""Fault injection: real training processes are killed, signalled, given a full disk or a damaged checkpoint, and then
started again.

    python -m tests.reliability.driver --table table.md        about 3 minutes on two cores

Each trial must end as the undisturbed run with the same settings: the same weights, optimizer state, log lines and
TensorBoard points, bit for bit. Otherwise the exit code is 1. The times and places of the faults are drawn from a fixed
seed, but what a run is doing at a given time depends on the speed of the machine.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from tests.reliability.report import options, report
from tests.reliability.scenarios import Bench, prepare
from tests.reliability.trials import TRIALS, Trial

SLOTS = 2


def run_all(bench: Bench, trials: list[Trial]) -> list[dict]:
    """Run each trial in a forked process, `SLOTS` at a time, and return the results."""
    waiting, running, results = list(enumerate(trials)), {}, {}
    while waiting or running:
        while waiting and len(running) < SLOTS:
            number, trial = waiting.pop(0)
            pid = os.fork()
            if pid == 0:
                os._exit(run_one(bench, number, trial))
            running[pid] = number
        pid, _ = os.wait()
        if pid in running:
            number = running.pop(pid)
            results[number] = json.loads((bench.folder / f"result-{number}.json").read_text())
            print(json.dumps(results[number]), flush=True)
    return [results[number] for number in sorted(results)]


def run_one(bench: Bench, number: int, trial: Trial) -> int:
    """Run a trial and write its result to a file."""
    began, result = time.monotonic(), {"fault": trial.fault, "run": trial.run}
    try:
        result |= {"ok": True, "note": trial.act(bench, bench.folder / f"trial-{number}", number) or ""}
    except BaseException as error:
        traceback.print_exc()
        result |= {"ok": False, "note": f"{type(error).__name__}: {error}"[:2000]}
    result["seconds"] = round(time.monotonic() - began, 1)
    (bench.folder / f"result-{number}.json").write_text(json.dumps(result))
    return 0


def table(results: list[dict]) -> str:
    """Return a Markdown table with one row per fault and run."""
    rows: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        rows.setdefault((result["fault"], result["run"]), []).append(result)
    lines = ["| fault | run | trials | ended as undisturbed | observed |", "|---|---|---|---|---|"]
    for (fault, run), found in rows.items():
        seen = [r["note"].splitlines()[0] for r in found if r["note"]]
        notes = "; ".join(seen if len(set(seen)) > 1 else seen[:1])
        lines.append(f"| {fault} | {run} | {len(found)} | {sum(r['ok'] for r in found)} | {notes} |")
    return "\n".join(lines)


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--only", default="", help="run the trials whose fault or run contains this text")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(given.keep or Path(scratch))
        trials = [t for t in TRIALS if given.only in t.fault or given.only in t.run]
        prepare(bench, {t.reference for t in trials})
        results = run_all(bench, trials)
    report(table(results), f"{len(results)} trials in ", began, given.table)
    return 0 if all(r["ok"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
