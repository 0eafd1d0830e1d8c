"""A signal outside of an update, while the cache is filled or in a validation; the resumed run must end as the
undisturbed one."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from common.signals import EXIT_REQUEUE, MARKER, saved_when_stopped
from tests.reliability.scenarios import STEPS, Bench, check_exit, prepare, resume, updates_done

PER_EPOCH = STEPS // 3


def while_the_cache_is_filled(bench: Bench, out: Path, name: str) -> None:
    """Signal all ranks. All but the first wait in a barrier, where no Python code runs."""
    shutil.rmtree(bench.folder / "cache")
    (bench.folder / "filling").unlink(missing_ok=True)

    def hang(rank: int) -> None:
        from common.cache import build

        def never_built(*job):
            (bench.folder / "filling").touch()
            threading.Event().wait()

        build._build_case = never_built

    job = bench.job(name, out, inject=hang)
    while not (bench.folder / "filling").exists():
        assert not job.poll(), job.output()
        time.sleep(0.02)
    began = time.monotonic()
    job.signal(signal.SIGUSR1)
    check_exit(job, EXIT_REQUEUE)
    assert time.monotonic() - began < 10
    assert (out / MARKER).exists() and not saved_when_stopped(out) and updates_done(out) == 0
    resume(bench, name, out)


def in_a_validation(bench: Bench, out: Path, name: str) -> None:
    """Signal one rank while it validates the second epoch."""

    def at_a_case(rank: int) -> None:
        from common import signals
        from Finetune import engine_finetune

        inner, calls = engine_finetune.case_dice, []

        def case_dice(*args):
            calls.append(1)
            values = inner(*args)
            # There is one case in each validation.
            if rank == 0 and len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                while not signals.stop_requested():
                    time.sleep(0.01)
            return values

        engine_finetune.case_dice = case_dice

    job = bench.job(name, out, "--save_minutes", "none", inject=at_a_case)
    check_exit(job, EXIT_REQUEUE)
    assert updates_done(out) == 2 * PER_EPOCH and saved_when_stopped(out)
    assert len((out / "log.jsonl").read_text().splitlines()) == 1, "the validation must not finish"
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
def test_stopped_outside_of_an_update_a_run_goes_on(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=run_all, args=(tmp_path,))
    # Training processes are forked from this one, which is safe only in a fresh process.
    process.start()
    process.join(timeout=240)
    assert process.exitcode == 0
