"""SIGTERM and SIGUSR1 end a program with 75 anywhere. Training finishes its update first."""

import os
import signal
import subprocess
import sys

import pytest

from common import signals
from common.signals import (
    EXIT_REQUEUE,
    MARKER,
    Requeue,
    remove_requeue_marker,
    saved_when_stopped,
    write_requeue_marker,
)
from common.training import preemption
from common.training.preemption import Stopped, until_stopped
from tests.common.training.toy import CPU, points, run_toy, same_logs, same_weights
from tests.helpers import ROOT, read_log

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
def test_a_program_ends_anywhere_and_its_cleanup_is_undisturbed(tmp_path, number):
    body = """    signals.write_marker_on_stop(folder / "out")
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
    # Slurm sends one signal, then torchrun another.
    process.send_signal(signal.SIGUSR1)
    _, printed = process.communicate(timeout=10)
    assert process.returncode == EXIT_REQUEUE and "asked to stop" in printed and "Traceback" not in printed
    assert (tmp_path / "clean").exists() and (tmp_path / "out" / MARKER).exists()
    assert not saved_when_stopped(tmp_path / "out")


def test_a_signal_is_recorded_and_forwarded():
    sent = []
    with signals.forward_signals(sent.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert sent == [signal.SIGTERM, signal.SIGUSR1] and signals.stop_requested()
    assert not signals.stop_requested()


def test_exit_codes_of_a_stopped_program():
    # the second: stopped before it had installed its handlers
    assert signals.is_stop(EXIT_REQUEUE) and signals.is_stop(-signal.SIGUSR1)
    assert not any(map(signals.is_stop, (0, 1, 2, -signal.SIGKILL)))


def test_a_program_without_a_run_folder_ends_with_75(tmp_path):
    process = start(tmp_path, "    (folder / 'ready').touch()\n    time.sleep(30)\n")
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=10)
    assert process.returncode == EXIT_REQUEUE and "Traceback" not in printed


def test_the_marker_still_names_the_save_after_a_second_stop(tmp_path):
    out = tmp_path / "new"
    write_requeue_marker(out)
    assert not saved_when_stopped(out)
    write_requeue_marker(out, 7)
    assert saved_when_stopped(out) and "after update 7" in (out / MARKER).read_text()
    os.utime(out / MARKER, (0, 0))
    # The next start is stopped while it reads the checkpoint. requeue.sh compares modification times.
    write_requeue_marker(out)
    assert saved_when_stopped(out) and (out / MARKER).stat().st_mtime > 0
    remove_requeue_marker(out)
    assert not saved_when_stopped(out)


# ---------------------------------------------------------------- validation


def test_training_stopped_in_a_validation_resumes_there(tmp_path):
    seen, at = [], None

    def validate(epoch, log, method):
        method.eval()
        for case in until_stopped(range(3), CPU):
            seen.append((epoch, case))
            if (epoch, case) == at:
                signal.raise_signal(signal.SIGUSR1)
        log.add_scalars({"val/score": float(epoch)}, 3 * epoch + 2)
        return {"val/score": float(epoch)}

    method, _ = run_toy(tmp_path / "undisturbed", after_epoch=validate)
    everything = list(seen)
    for at, updates in (((1, 0), 6), ((3, 1), 12)):
        seen.clear()
        with pytest.raises(Requeue) as caught:
            run_toy(tmp_path / "stopped", after_epoch=validate)
        assert caught.value.agreed and seen[-1] == at, "no further case starts"
        assert f"after update {updates};" in (tmp_path / "stopped" / MARKER).read_text()
        assert len(read_log(tmp_path / "stopped")) == at[0]
    at = None
    seen.clear()
    resumed, _ = run_toy(tmp_path / "stopped", after_epoch=validate)
    # The last validation runs from its first case, and no update is repeated.
    assert seen == everything[-3:]
    assert same_weights(method, resumed)
    same_logs(tmp_path / "undisturbed", tmp_path / "stopped")


def test_outside_of_training_until_stopped_is_a_plain_loop():
    assert list(until_stopped(range(3), CPU)) == [0, 1, 2]


def test_a_request_on_one_rank_stops_all(monkeypatch):
    """The flag is summed over the ranks before the first case and after the last."""
    sent = []

    def sum_with_other_ranks(flag):
        sent.append(float(flag))
        return flag + 0.5 * (len(sent) > 1)

    monkeypatch.setattr(preemption.distributed, "all_reduce_mean", sum_with_other_ranks)
    cases = []
    with pytest.raises(Stopped):
        for case in until_stopped(range(2), CPU):
            cases.append(case)
    assert cases == [0, 1] and sent == [0.0, 0.0]
    with signals.defer_stop():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            next(until_stopped(range(2), CPU))
    assert sent[-1] == 1.0


def test_a_kill_after_a_validation_doubles_no_point(tmp_path):
    """TensorBoard has the points of the validation, but the epoch's checkpoint is missing: both are written again."""
    killed = []

    def validate(epoch, log, method):
        log.add_scalars({"val/dice": 0.5}, (epoch + 1) * 3 - 1)
        log.flush()
        if epoch == 1 and killed:
            raise killed.pop()
        return {}

    run_toy(tmp_path / "undisturbed", save_minutes=0.0, log_every=1, after_epoch=validate)
    killed.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "stopped", save_minutes=0.0, log_every=1, after_epoch=validate)
    run_toy(tmp_path / "stopped", save_minutes=0.0, log_every=1, after_epoch=validate)
    same_logs(tmp_path / "undisturbed", tmp_path / "stopped")
    assert [step for step, _ in points(tmp_path / "stopped")["val/dice"]] == [2, 5, 8, 11]
