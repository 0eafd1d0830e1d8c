"""A run over days, shortened: a fault at a random update about every 100 updates, and the use of memory, open files and
shared memory over the run.

    python -m tests.reliability.long_run --table table.md                 5,000 updates, about 20 minutes on two cores
    python -m tests.reliability.long_run --table table.md --updates 600   as in CI, about 2 minutes

The faults are SIGKILL, SIGTERM, a full disk, and a truncated or altered checkpoint. The run must end as the undisturbed
one: the same weights, optimizer state, log lines and TensorBoard points, bit for bit. What a process uses is sampled in
the undisturbed run, which is a single process, and in every process of the disturbed one, and must not grow. Otherwise
the exit code is 1.
"""

import ctypes
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import checkpoint
from common.signals import EXIT_REQUEUE
from tests.helpers import ct, write_nifti
from tests.reliability.difference import difference
from tests.reliability.processes import Job
from tests.reliability.report import options, report
from tests.reliability.scenarios import Bench, check_exit, mount, stop_own_group, updates_done

# name of scenarios.RUNS -> more flags
RUNS = {"GL-MAE": "", "MiM": "--num_mid 1"}
PER_EPOCH = 100
FLAGS = f"--batch_size 1 --samples_per_epoch {PER_EPOCH} --workers 1 --log_every 10 --save_every 10 --save_minutes 0.01"
FAULTS = ("SIGKILL", "SIGKILL to the training process only", "SIGTERM", "full disk", "truncated file", "altered file")
SAMPLE_EVERY = 10
# a line through fewer samples mostly follows their noise
LEAST_PROCESSES = 20
# share of the updates of a process before its use counts as steady
WARM_UP = 0.2
# in which the growth is measured
PARTS = 3
FILLER = "filler"
CLONE_NEWNS = 0x20000
UNITS = {"memory": "MB", "memory of the worker": "MB", "open files": "", "shared memory": "MB"}


@dataclass(frozen=True)
class Plan:
    """A long run: a name of RUNS, its number of updates, and the seed of its faults."""

    bench: Bench
    name: str
    updates: int
    seed: int

    def start(self, out: Path, fault: str | None = None, at: int = 0) -> Job:
        """Start or resume the run, with a fault after update `at`."""
        epochs = ["--epochs", str(self.updates // PER_EPOCH)]
        more = [*FLAGS.split(), *RUNS[self.name].split(), *epochs]
        return self.bench.job(self.name, out, *more, inject=partial(watch, out.with_suffix(".jsonl"), fault, at))


# ---------------------------------------------------------------- within a training process


def watch(samples: Path, fault: str | None, at: int, rank: int) -> None:
    """Sample what the process uses, and cause the fault after update `at`."""
    from common.training.trainer import Trainer

    inner = Trainer.save_or_stop

    def save_or_stop(self, at_end):
        step = self.state.step
        if step % SAMPLE_EVERY == 0:
            with open(samples, "a") as file:
                file.write(json.dumps({"process": os.getpid(), "step": step} | usage()) + "\n")
        if fault and step == at:
            cause(fault, self.out_dir)
        inner(self, at_end)

    Trainer.save_or_stop = save_or_stop


def usage() -> dict[str, float]:
    """Return what this process and its data worker use."""
    workers = [child.pid for child in multiprocessing.active_children()]
    shared = os.statvfs("/dev/shm")
    return {
        "memory": resident(os.getpid()),
        "memory of the worker": sum(map(resident, workers)),
        "open files": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), *workers)),
        "shared memory": (shared.f_blocks - shared.f_bfree) * shared.f_frsize / 1e6,
    }


def resident(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def cause(fault: str, out: Path) -> None:
    if fault == "SIGTERM":
        stop_own_group(signal.SIGTERM)
    elif fault == "full disk":
        fill(out)
    elif fault == "SIGKILL to the training process only":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        os.killpg(os.getpid(), signal.SIGKILL)


def fill(folder: Path) -> None:
    """Use all space of the file system of `folder`."""
    with open(folder / FILLER, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


# ---------------------------------------------------------------- the runs


def undisturbed(plan: Plan) -> Path:
    """Make the run in one process, and return its folder."""
    out = plan.bench.reference(plan.name)
    finish(plan.start(out))
    return out


def disturbed(plan: Plan, can_fill: bool) -> tuple[Path, Counter]:
    """Make the run with faults, and return its folder and how often each of them occurred."""
    out, rng, counts = plan.bench.folder / f"disturbed/{plan.name}", random.Random(plan.seed), Counter()
    faults = [fault for fault in FAULTS if can_fill or fault != "full disk"]
    out.mkdir(parents=True)
    if can_fill and not mount(out, 200_000_000):
        raise AssertionError(f"cannot mount a tmpfs on {out}")
    # What the program prints goes to another disk, as a scheduler's log does.
    (out / "output-rank0.txt").symlink_to(out.with_suffix(".txt"))
    at = rng.randint(50, 150)
    while at < plan.updates:
        fault = rng.choice(faults)
        disturb(plan, out, fault, at, rng)
        counts[fault] += 1
        at += rng.randint(50, 150)
    finish(plan.start(out))
    return out, counts


def disturb(plan: Plan, out: Path, fault: str, at: int, rng: random.Random) -> None:
    """Resume the run until the fault has ended it, and remove the cause."""
    job = plan.start(out, fault, at)
    check_exit(job, {"SIGTERM": EXIT_REQUEUE, "full disk": 2}.get(fault, -signal.SIGKILL))
    if fault == "SIGTERM":
        assert updates_done(out) == at, (updates_done(out), at)
    elif fault == "full disk":
        (out / FILLER).unlink()
        assert "cannot be written" in job.output() or "No space" in job.output(), job.output()[-2000:]
    elif "file" in fault:
        damage(out / checkpoint.LAST, fault, rng)


def damage(path: Path, fault: str, rng: random.Random) -> None:
    """Truncate the file, or flip a bit of it, unless it is the only checkpoint."""
    if not path.with_name(checkpoint.PREVIOUS).exists():
        return
    data = bytearray(path.read_bytes())
    if fault == "truncated file":
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    # The file may have a second name, which must keep its content.
    path.unlink()
    path.write_bytes(data)


def finish(job: Job) -> None:
    codes = job.wait(seconds=3600)
    assert codes == [0], f"exit codes {codes}:\n{job.output()[-3000:]}"


# ---------------------------------------------------------------- trends


@dataclass(frozen=True)
class Trend:
    """A line through samples: its mean, its growth from the first to the last sample, and the deviation from it.

    `flat` tells whether it does not grow, over all samples or in some third of them: what is never freed grows in every
    third, while a memory allocator takes more in a few steps and then keeps it.
    """

    mean: float
    growth: float
    deviation: float
    flat: bool


def trend(x: list[float], y: list[float]) -> Trend:
    """Fit a line by least squares."""
    whole, thirds = line(x, y), zip(np.array_split(x, PARTS), np.array_split(y, PARTS))
    flat = is_flat(*whole, 0.01) or any(is_flat(*line(*third), 0.01 / PARTS) for third in thirds)
    return Trend(*whole, flat)


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean, the growth and the deviation."""
    slope, start = np.polyfit(x, y, 1)
    deviation = np.std(np.asarray(y) - (slope * np.asarray(x) + start))
    return float(np.mean(y)), float(slope * (max(x) - min(x))), float(deviation)


def is_flat(mean: float, growth: float, deviation: float, share: float) -> bool:
    """Return whether the growth is at most twice the deviation, or `share` of the mean."""
    return growth <= max(2 * deviation, share * mean)


def within_a_process(samples: list[dict]) -> dict[str, Trend]:
    """Return the trend of each use over the updates of one process, after its warm-up."""
    steady = [sample for sample in samples if sample["step"] > WARM_UP * samples[-1]["step"]]
    return {use: trend([s["step"] for s in steady], [s[use] for s in steady]) for use in UNITS}


def across_processes(samples: list[dict]) -> dict[str, Trend]:
    """Return the trend of each use over the processes of a run, each at its last sample; none over too few of them."""
    last = list({sample["process"]: sample for sample in samples}.values())
    if len(last) < LEAST_PROCESSES:
        return {}
    return {use: trend(list(range(len(last))), [s[use] for s in last]) for use in UNITS}


def read(out: Path) -> list[dict]:
    """Return the samples of the run in `out`."""
    return [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- the program


def own_mounts() -> bool:
    """Give this process its own mounts and an empty /dev/shm, so that other programs do not use it. Return whether that
    is permitted."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNS) != 0:
        return False
    private = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True)
    return private.returncode == 0 and mount(Path("/dev/shm"), 4_000_000_000)


def run_one(plan: Plan, isolated: bool) -> dict:
    """Make both runs, and return what differs, the faults and the trends."""
    began = time.monotonic()
    reference = undisturbed(plan)
    out, counts = disturbed(plan, can_fill=isolated)
    trends = {"within one process": within_a_process(read(reference)), "across processes": across_processes(read(out))}
    result = {"found": difference(out, reference), "counts": counts, "seconds": time.monotonic() - began}
    rows = {where: {use: vars(t) for use, t in of.items()} for where, of in trends.items()}
    return result | {"trends": rows}


def run_in_fork(plan: Plan, isolated: bool, target: Path) -> int:
    """Run `run_one` in a forked process, which writes the result to `target`, and return its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            target.write_text(json.dumps(run_one(plan, isolated)))
            code = 0
        except BaseException as error:
            print(f"{plan.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return pid


def table(results: dict[str, dict], updates: int) -> str:
    """Return the faults and the trends as two Markdown tables."""
    lines = ["| run | updates | faults | ended as undisturbed |", "|---|---|---|---|"]
    for name, result in results.items():
        faults = ", ".join(f"{number} {fault}" for fault, number in sorted(result["counts"].items()))
        lines.append(f"| {name} | {updates:,} | {faults} | {'no: ' + result['found'] if result['found'] else 'yes'} |")
    lines += [
        "",
        "| run | samples | use | mean | growth over the run | deviation | flat |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for where, uses in result["trends"].items():
            for use, t in uses.items():
                numbers = " | ".join(f"{t[key]:.2f} {UNITS[use]}".strip() for key in ("mean", "growth", "deviation"))
                lines.append(f"| {name} | {where} | {use} | {numbers} | {'yes' if t['flat'] else 'NO'} |")
    return "\n".join(lines)


def run_all(folder: Path, updates: int, seed: int, isolated: bool) -> dict[str, dict]:
    """Make all runs side by side, and return the results by name."""
    bench = Bench(folder)
    for number in range(3):
        write_nifti(folder / f"scans/scan{number}.nii.gz", ct((40, 36, 30 + 4 * number), seed=number))
    targets = {name: folder / f"{name}.json" for name in RUNS}
    pids = [run_in_fork(Plan(bench, name, updates, seed), isolated, target) for name, target in targets.items()]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    for name in RUNS if isolated else ():
        subprocess.run(["umount", "-l", str(folder / f"disturbed/{name}")], capture_output=True)
    if any(codes):
        raise SystemExit("error: a run did not end as expected")
    return {name: json.loads(target.read_text()) for name, target in targets.items()}


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--updates", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    began, isolated = time.monotonic(), own_mounts()
    if not isolated:
        print("warning: no permission to mount: no full disk, and other programs count in shared memory", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        results = run_all(given.keep or Path(scratch), given.updates, given.seed, isolated)
    report(table(results, given.updates), "", began, given.table)
    flat = all(t["flat"] for r in results.values() for uses in r["trends"].values() for t in uses.values())
    return 0 if flat and not any(r["found"] for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
