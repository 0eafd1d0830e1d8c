"""Asked to stop where no update is being made: while the cache is filled, in a validation. As the trials of the driver,
with the same runs; what is started again ends as the undisturbed run."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from common.signals import EXIT_REQUEUE, MARKER, saved_when_stopped
from tests.reliability.scenarios import STEPS, Bench, ended, prepare, resume, updates_done

PER_EPOCH = STEPS // 3


def while_the_cache_is_filled(bench: Bench, out: Path, name: str) -> None:
    """All ranks are signalled; all but the first wait in a barrier, where no Python runs."""
    shutil.rmtree(bench.folder / "cache")
    (bench.folder / "filling").unlink(missing_ok=True)

    def slowly(rank: int) -> None:
        from common.cache import build

        inner = build._build_case

        def build_slowly(*job):
            (bench.folder / "filling").touch()
            time.sleep(0.5)
            return inner(*job)

        build._build_case = build_slowly

    job = bench.job(name, out, sabotage=slowly)
    while not (bench.folder / "filling").exists():
        assert not job.poll(), job.said()
        time.sleep(0.02)
    began = time.monotonic()
    job.signal(signal.SIGUSR1)
    ended(job, EXIT_REQUEUE)
    assert time.monotonic() - began < 10
    assert (out / MARKER).exists() and not saved_when_stopped(out) and updates_done(out) == 0
    resume(bench, name, out)


def in_a_validation(bench: Bench, out: Path, name: str) -> None:
    """One rank alone is signalled while it validates the second epoch."""

    def at_a_case(rank: int) -> None:
        from Finetune import engine_finetune

        inner, calls = engine_finetune.case_dice, []

        def case_dice(*args):
            calls.append(1)
            values = inner(*args)
            if rank == 0 and len(calls) == 2:  # one case in each validation
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
            return values

        engine_finetune.case_dice = case_dice

    job = bench.job(name, out, "--save_minutes", "none", sabotage=at_a_case)
    ended(job, EXIT_REQUEUE)
    assert updates_done(out) == 2 * PER_EPOCH and saved_when_stopped(out)
    assert len((out / "log.jsonl").read_text().splitlines()) == 1, "the validation was not to end"
    resume(bench, name, out)


TRIALS = [
    (while_the_cache_is_filled, "GL-MAE"),
    (while_the_cache_is_filled, "GL-MAE, 2 ranks"),
    (while_the_cache_is_filled, "fine-tuning"),
    (in_a_validation, "fine-tuning"),
    (in_a_validation, "fine-tuning, 2 ranks"),
]


def run_all(folder: Path) -> None:
    torch.set_num_threads(1)
    bench = Bench(folder)
    prepare(bench, {name for _, name in TRIALS})
    for number, (act, name) in enumerate(TRIALS):
        print(act.__name__, name, flush=True)
        act(bench, folder / f"trial-{number}", name)


@pytest.mark.slow
def test_stopped_outside_of_an_update_a_run_goes_on_as_if_nothing_had_been(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=run_all, args=(tmp_path,))
    process.start()  # training processes are forked from it, which is safe in a fresh one only
    process.join(timeout=240)
    assert process.exitcode == 0
