"""Programs in processes that are forked from a server: exit codes, output, signals, locks."""

import os
import signal
import subprocess
import sys
import time

import pytest

from common.errors import InputError
from common.files import lock_folder
from common.programs import Programs
from common.signals import EXIT_REQUEUE
from tests.helpers import ROOT

PROGRAM = """
import os, sys, time
from pathlib import Path
from common import signals
from common.errors import InputError
def main():
    folder, how = Path(sys.argv[1]), sys.argv[2]
    print(how, os.environ["COLOUR"], flush=True)
    if how == "refused":
        raise InputError("bad value")
    if how == "crash":
        raise KeyError("x")
    if how == "saves":
        with signals.defer_stop():
            (folder / "ready").touch()
            while not signals.stop_requested():
                time.sleep(0.01)
        time.sleep(0.2)
        (folder / "saved").touch()
        raise signals.Requeue
"""
STARTER = """
import signal, sys
from common.programs import Programs
from common.files import lock_folder
from pathlib import Path
# a shell ignores it for programs in the background
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = Path(sys.argv[1])
with Programs(["toy_program"]) as programs, lock_folder(folder) as lock, open(folder / "log.txt", "a") as log:
    programs.start("a", "toy_program", [str(folder), "saves"], log.fileno(), lock, 1, {"COLOUR": "red"})
    programs.wait()
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The folder of a program `toy_program`, which the server can import."""
    (tmp_path / "toy_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    return tmp_path


def wait_for(path):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.02)


def test_programs_end_with_their_codes_and_write_to_their_logs(toy):
    codes = {}
    with Programs(["toy_program"]) as programs, open(toy / "log.txt", "a") as log:
        for how in ("fine", "refused", "crash"):
            programs.start(how, "toy_program", [str(toy), how], log.fileno(), log.fileno(), 1, {"COLOUR": "blue"})
        for _ in range(3):
            key, codes[key] = programs.wait()
        assert codes == {"fine": 0, "refused": 2, "crash": 1}
        text = (toy / "log.txt").read_text()
        assert "fine blue" in text and "error: bad value" in text and "KeyError" in text
        # signals reach a program that runs, and it holds the lock until it has ended
        with lock_folder(toy) as lock:
            programs.start("stopped", "toy_program", [str(toy), "saves"], log.fileno(), lock, 1, {"COLOUR": "red"})
            wait_for(toy / "ready")
        with lock_folder(toy) as lock:
            assert lock is None
        programs.send_signal(signal.SIGUSR1)
        assert programs.wait() == ("stopped", EXIT_REQUEUE) and (toy / "saved").exists()
        with lock_folder(toy) as lock:
            assert lock is not None
        os.kill(programs._server.pid, signal.SIGKILL)
        with pytest.raises(InputError, match="has ended with code -9"):
            programs.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
def test_programs_are_stopped_with_what_started_them(toy, number):
    process = subprocess.Popen([sys.executable, "-c", STARTER, str(toy)], stderr=subprocess.DEVNULL)
    wait_for(toy / "ready")
    process.send_signal(number)
    process.wait(30)
    wait_for(toy / "saved")
    with lock_folder(toy, timeout=10) as lock:
        assert lock is not None


def test_a_server_that_cannot_import_is_reported(toy):
    with Programs(["no_such_program"]) as programs:
        with open(toy / "log.txt", "a") as log, pytest.raises(InputError, match="has ended with code 1"):
            programs.start("a", "no_such_program", [], log.fileno(), log.fileno(), 1, {})
            programs.wait()
