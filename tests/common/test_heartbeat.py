"""A dead peer is noticed from its silence or its last word, an orderly end is not taken for a death; a hang ends the
process.

Rounds are made by the tests, in the order that each of them is about. Where threads make them the test waits for what
they do, however long that takes.
"""

import queue
import signal
import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from common import distributed, heartbeat, watchdog
from common.heartbeat import EXIT_RANK_DIED, SILENCE, Heartbeat
from common.signals import EXIT_REQUEUE
from common.watchdog import Watchdog
from tests.helpers import ROOT

PATIENCE = 120  # seconds, for what must happen; nothing is concluded from how long it took


def ranks(count: int) -> list[Heartbeat]:
    store = dist.HashStore()
    return [Heartbeat(store, rank, count) for rank in range(count)]


def rounds(one: Heartbeat, count: int) -> set[str]:
    return {one.listen() for _ in range(count)}


# ---------------------------------------------------------------- round by round


def test_while_both_live_nothing_happens():
    first, second = ranks(2)
    assert {said for _ in range(3 * SILENCE) for said in (first.listen(), second.listen())} == {""}


def test_an_orderly_end_is_no_death():
    first, second = ranks(2)
    second.listen(), first.listen()
    second.stop()
    assert rounds(first, 3 * SILENCE) == {""}


def test_a_rank_that_has_not_begun_is_not_dead():
    first, second = ranks(2)
    assert rounds(first, 3 * SILENCE) == {""}
    second.start()
    assert first.listen() == ""
    second.stop()


def test_a_silent_rank_is_dead_and_all_others_hear_of_it():
    first, second, third = ranks(3)
    second.listen(), first.listen()
    assert rounds(first, SILENCE) == {""}
    word = first.listen()
    assert word == f"{EXIT_RANK_DIED} rank 1 died without a message (killed?): silent for 15 s"
    assert third.listen() == word, "not its neighbour"


def test_a_rank_killed_before_its_first_round_is_missed():
    first, second = ranks(2)
    second.start()
    second.stopping.set()  # as if killed: no word, no more beats
    assert "rank 1 died without a message" in "".join(rounds(first, SILENCE + 2))


def test_suspended_together_they_go_on():
    """Nobody has a round while all are suspended. Afterwards one may have many before the other has its first."""
    first, second = ranks(2)
    second.listen(), first.listen()
    assert rounds(first, SILENCE) == {""}
    assert second.listen() == "" and first.listen() == ""
    assert rounds(first, SILENCE) == {""}


@pytest.mark.parametrize(
    "reason, code", [("died: MemoryError: no more", EXIT_RANK_DIED), ("was asked to stop", EXIT_REQUEUE)]
)
def test_a_last_word_is_repeated_with_its_exit_code(reason, code):
    first, second = ranks(2)
    second.report(reason, code)
    assert first.listen() == f"{code} rank 1 {reason}"


def test_a_store_that_is_gone():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    one = Heartbeat(dist.TCPStore("127.0.0.1", store.port, is_master=False), 0, 2)
    assert one.listen() == ""
    del store
    assert one.listen().startswith(f"{EXIT_RANK_DIED} the store of the process group is gone")


def test_a_store_that_does_not_answer_in_time_is_lost():
    one, _ = ranks(2)
    for _ in range(3):
        one.listen()
        assert {one.check_store() for _ in range(SILENCE + 1)} == {""}
    assert one.check_store().startswith(f"{EXIT_RANK_DIED} the store of the process group does not answer")


# ---------------------------------------------------------------- in threads


@pytest.fixture
def ended(monkeypatch):
    """What the watch ends with, in the order in which it does."""
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.001)
    return queue.Queue()


def watch(ended, store=None) -> Heartbeat:
    return Heartbeat(store or dist.HashStore(), 0, 2, end=lambda *what: ended.put(what))


def test_the_watch_ends_with_the_word_it_hears(ended):
    store = dist.HashStore()
    one = watch(ended, store)
    one.start()
    Heartbeat(store, 1, 2).report("died: MemoryError: no more")
    assert ended.get(timeout=PATIENCE) == (EXIT_RANK_DIED, "rank 1 died: MemoryError: no more; rank 0 ends")
    one.stop()


def test_after_an_orderly_end_no_thread_is_left(ended):
    one = watch(ended)
    one.start()
    one.stop()
    assert not any(thread.is_alive() for thread in one.threads) and ended.empty()
    assert one.store.get("beat/0") == b"-1"


def test_the_watch_ends_when_the_store_never_answers(ended):
    class Lost:
        answers = threading.Event()

        def set(self, key, value):
            pass

        def add(self, key, amount):
            self.answers.wait()
            raise RuntimeError

    one = watch(ended)
    one.store = Lost()
    one.start()
    code, reason = ended.get(timeout=PATIENCE)
    assert code == EXIT_RANK_DIED and "does not answer" in reason and one.rounds == 0
    one.store.answers.set()
    one.stop()


def test_ending_gives_the_reason_and_the_code(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(heartbeat.os, "_exit", codes.append)
    Heartbeat(dist.HashStore(), 0, 2).end(EXIT_RANK_DIED, "rank 1 died; rank 0 ends")
    assert codes == [EXIT_RANK_DIED] and capsys.readouterr().err == "error: rank 1 died; rank 0 ends\n"


HOST = """
import sys
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""
RANK = """
import sys, threading
import torch.distributed as dist
from common import heartbeat
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), 2, is_master=False)
print("connected", flush=True)
sys.stdin.readline()
heartbeat.INTERVAL = 0.01
heartbeat.Heartbeat(store, 0, 2).start()
threading.Event().wait()
"""


def test_a_real_store_whose_host_is_suspended_ends_the_rank():
    """As when its node is lost: the connection stays open, and no answer comes."""

    def python(*command):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen([sys.executable, "-c", *command], cwd=ROOT, **pipes)

    with python(HOST) as host:
        try:
            with python(RANK, host.stdout.readline().strip()) as rank:
                assert rank.stdout.readline() == "connected\n"
                host.send_signal(signal.SIGSTOP)
                _, said = rank.communicate("go on\n", timeout=PATIENCE)
        finally:
            host.kill()
    assert rank.returncode == EXIT_RANK_DIED and "does not answer" in said


@pytest.mark.parametrize(
    "words, killed",
    [
        (["-m", "torch.distributed.run"], True),
        (["/usr/bin/torchrun"], True),
        (["train.py", "--out_dir", "torchrun-7"], False),
    ],
)
def test_only_a_parent_that_is_torchrun_is_killed(words, killed):
    child = "from common.heartbeat import kill_launcher; kill_launcher()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", parent, *words], cwd=ROOT, timeout=PATIENCE)
    assert done.returncode == (-signal.SIGKILL if killed else 0)


def test_an_earlier_attempt_is_not_heard(monkeypatch):
    """torchrun --max_restarts starts the ranks again on the same store."""
    store, made = dist.HashStore(), []
    monkeypatch.setattr(distributed.dist, "TCPStore", lambda *args, **kwargs: store)
    monkeypatch.setattr(Heartbeat, "start", lambda self: made.append(self))
    monkeypatch.setattr(distributed, "_heartbeat", None)
    for name, value in (("MASTER_ADDR", "here"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for attempt in ("0", "0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        distributed._start_heartbeat(0, 2)
    made[0].store.set("message", "70 rank 0 died: of old age")
    assert [one.store.check(["message"]) for one in made] == [True, True, False]


# ---------------------------------------------------------------- the watchdog


def test_the_watchdog_shows_where_it_hangs():
    program = (
        "import threading\nfrom common.watchdog import Watchdog\n"
        "def stuck_here():\n    threading.Event().wait()\n"
        "Watchdog(0.001).reset()\nstuck_here()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "in stuck_here" in done.stderr


def test_who_does_not_know_the_watchdog_feeds_the_one_on_watch(monkeypatch):
    did = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda seconds, **_: did.append(seconds))
    monkeypatch.setattr(watchdog.faulthandler, "cancel_dump_traceback_later", lambda: did.append("rest"))
    watchdog.reset()
    with Watchdog(0.5):
        watchdog.reset()
        with Watchdog(2):
            watchdog.reset()
    watchdog.reset()
    assert did == [30, 30, 120, 120, "rest", "rest"]
    did.clear()
    with Watchdog(None):
        watchdog.reset()
    assert did == ["rest"]
