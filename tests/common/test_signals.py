"""SIGTERM and SIGUSR1 end every program with 75, wherever it is; training ends its update first, and a program that
runs another one waits for it."""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from common import signals
from common.signals import EXIT_REQUEUE, MARKER, Requeue, clear_requeue, mark_requeue, saved_when_stopped
from common.training import preemption
from common.training.loop import fit
from common.training.preemption import Stopped, until_stopped
from tests.common.training import toy
from tests.common.training.toy import CPU, lines, points, run_toy, same_logs, same_weights
from tests.helpers import ROOT

PROGRAM = """
import sys, time
from pathlib import Path
from common import signals
from common.cli import run_program
folder = Path(sys.argv[1])
def main():
{body}
sys.exit(run_program(main))
"""
SAVES = """    with signals.deferred():
        (folder / "ready").touch()
        while not signals.asked():
            time.sleep(0.01)
    time.sleep(0.3)
    (folder / "saved").touch()
    {end}
"""


def start(folder, body, name="program.py"):
    (folder / name).write_text(PROGRAM.format(body=body))
    return subprocess.Popen(
        [sys.executable, str(folder / name), str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_program_ends_wherever_it_is_and_cleans_up_undisturbed(tmp_path, number):
    body = """    signals.mark_when_stopped(folder / "out")
    try:
        (folder / "ready").touch()
        time.sleep(30)
    finally:
        (folder / "cleaning").touch()
        time.sleep(0.3)
        (folder / "clean").touch()
"""
    process = start(tmp_path, body)
    wait_for(tmp_path / "ready", process)
    process.send_signal(number)
    wait_for(tmp_path / "cleaning", process)
    process.send_signal(signal.SIGUSR1)  # Slurm's comes first, then torchrun's
    _, told = process.communicate(timeout=10)
    assert process.returncode == EXIT_REQUEUE and "asked to stop" in told and "Traceback" not in told
    assert (tmp_path / "clean").exists() and (tmp_path / "out" / MARKER).exists()
    assert not saved_when_stopped(tmp_path / "out")


@pytest.mark.parametrize("end", ["raise signals.Requeue", ""], ids=["stopped", "done meanwhile"])
def test_a_signal_is_passed_on_to_a_child_that_is_waited_for(tmp_path, end):
    (tmp_path / "child.py").write_text(PROGRAM.format(body=SAVES.format(end=end)))
    body = f"    signals.run_child([sys.executable, {str(tmp_path / 'child.py')!r}, str(folder)])\n"
    process = start(tmp_path, body)
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == EXIT_REQUEUE and (tmp_path / "saved").exists()


def test_the_code_of_a_child_that_alone_was_asked_is_passed_on_and_others_are_returned():
    with pytest.raises(Requeue):
        signals.run_child([sys.executable, "-c", "raise SystemExit(75)"])
    with pytest.raises(Requeue):  # before it listened
        signals.run_child([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"])
    assert signals.run_child([sys.executable, "-c", "raise SystemExit(2)"]) == 2
    assert signals.run_child([sys.executable, "-c", ""]) == 0 and not signals.asked()


def test_the_marker_keeps_saying_that_there_is_something_to_go_on_from(tmp_path):
    out = tmp_path / "new"
    mark_requeue(out)
    assert not saved_when_stopped(out)
    mark_requeue(out, 7)
    assert saved_when_stopped(out) and "after update 7" in (out / MARKER).read_text()
    os.utime(out / MARKER, (0, 0))
    mark_requeue(out)  # the next start was stopped while it read the checkpoint
    assert saved_when_stopped(out) and (out / MARKER).stat().st_mtime > 0  # the job's script goes by the time
    clear_requeue(out)
    assert not saved_when_stopped(out)


# ---------------------------------------------------------------- validation


def validated(monkeypatch, validate):
    monkeypatch.setattr(toy, "fit", partial(fit, after_epoch=validate))


def test_training_asked_to_stop_in_a_validation_saves_and_goes_on_there(tmp_path, monkeypatch):
    seen, at = [], None

    def validate(epoch, log, method):
        method.eval()
        for case in until_stopped(range(3), CPU):
            seen.append((epoch, case))
            if (epoch, case) == at:
                signal.raise_signal(signal.SIGUSR1)
        log.scalars({"val/score": float(epoch)}, 3 * epoch + 2)
        return {"val/score": float(epoch)}

    validated(monkeypatch, validate)
    method, _ = run_toy(tmp_path / "whole")
    everything = list(seen)
    for at, updates in (((1, 0), 6), ((3, 1), 12)):
        seen.clear()
        with pytest.raises(Requeue) as stopped:
            run_toy(tmp_path / "cut")
        assert stopped.value.agreed and seen[-1] == at, "no further case is begun"
        assert f"after update {updates};" in (tmp_path / "cut" / MARKER).read_text()
        assert len(lines(tmp_path / "cut")) == at[0]
    at = None
    seen.clear()
    resumed, _ = run_toy(tmp_path / "cut")
    assert seen == everything[-3:]  # the last validation from its beginning, no update again
    assert same_weights(method, resumed)
    same_logs(tmp_path / "whole", tmp_path / "cut")


def test_a_validation_outside_of_training_is_only_a_loop():
    assert list(until_stopped(range(3), CPU)) == [0, 1, 2]


def test_what_one_rank_was_asked_all_hear(monkeypatch):
    """The flag is summed over the ranks before the first case and after the last."""
    given = []

    def others_were_asked(flag):
        given.append(float(flag))
        return flag + 0.5 * (len(given) > 1)

    monkeypatch.setattr(preemption.distributed, "all_reduce_mean", others_were_asked)
    cases = []
    with pytest.raises(Stopped):
        for case in until_stopped(range(2), CPU):
            cases.append(case)
    assert cases == [0, 1] and given == [0.0, 0.0]
    with signals.deferred():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            next(until_stopped(range(2), CPU))
    assert given[-1] == 1.0


def test_a_kill_after_a_validation_leaves_no_point_of_it_twice(tmp_path, monkeypatch):
    """Its points are in TensorBoard, the epoch's checkpoint is not on disk: both are made again."""
    killed = []

    def validate(epoch, log, method):
        log.scalars({"val/dice": 0.5}, (epoch + 1) * 3 - 1)
        log.flush()
        if epoch == 1 and killed:
            raise killed.pop()
        return {}

    validated(monkeypatch, validate)
    run_toy(tmp_path / "whole", save_minutes=0.0, log_every=1)
    killed.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "cut", save_minutes=0.0, log_every=1)
    run_toy(tmp_path / "cut", save_minutes=0.0, log_every=1)
    same_logs(tmp_path / "whole", tmp_path / "cut")
    assert [step for step, _ in points(tmp_path / "cut")["val/dice"]] == [2, 5, 8, 11]
