"""A dead peer is noticed from its silence or its last word, an orderly end is not taken for a death; a hang ends the
process."""

import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from common import distributed, peers
from common.peers import EXIT_PEER_DIED, Peers
from common.signals import EXIT_REQUEUE
from tests.helpers import ROOT


class Ended(Exception):
    pass


@pytest.fixture
def pair(monkeypatch):
    """Two ranks on one store, with a quick pulse; their deaths are collected instead of died, so the guard of a watch
    that has ended reports it too."""
    ended = []

    def collect(code):
        ended.append(code)
        raise Ended

    monkeypatch.setattr(peers.os, "_exit", collect)
    monkeypatch.setattr(peers.threading, "excepthook", lambda args: None)
    monkeypatch.setattr(peers, "INTERVAL", 0.05)
    monkeypatch.setattr(peers, "SILENCE", 10)
    store = dist.HashStore()
    both = [Peers(store, rank, 2) for rank in (0, 1)]
    for one in both:
        one.start()
    yield both, ended
    for one in both:
        one.stop()
        one.guard.join(timeout=5)


def wait_for(ended):
    until = time.monotonic() + 20
    while not ended and time.monotonic() < until:
        time.sleep(0.05)


def test_nothing_happens_while_both_live_and_when_one_ends_in_order(pair):
    (first, second), ended = pair
    time.sleep(0.8)
    second.stop()
    time.sleep(0.8)
    assert ended == [] and first.thread.is_alive()


def test_silence(pair, capsys):
    (first, second), ended = pair
    second.stopping.set(), second.stopped.set()  # as if killed: no word, no more beats
    wait_for(ended)
    assert set(ended) == {EXIT_PEER_DIED} and "rank 1 died without a word" in capsys.readouterr().err


def test_a_last_word_is_repeated(pair, capsys):
    (first, second), ended = pair
    second.report("died: MemoryError: no more")
    wait_for(ended)
    assert set(ended) == {EXIT_PEER_DIED}
    assert "rank 1 died: MemoryError: no more; rank 0 ends" in capsys.readouterr().err


def test_who_was_asked_to_stop_is_followed_with_the_code_for_it(pair, capsys):
    (first, second), ended = pair
    second.report("was asked to stop", EXIT_REQUEUE)
    wait_for(ended)
    assert set(ended) == {EXIT_REQUEUE} and "rank 1 was asked to stop; rank 0 ends" in capsys.readouterr().err


def test_an_earlier_attempt_is_not_heard(monkeypatch):
    """torchrun --max_restarts starts the ranks again on the same store."""
    store, made = dist.HashStore(), []
    monkeypatch.setattr(distributed.dist, "TCPStore", lambda *args, **kwargs: store)
    monkeypatch.setattr(Peers, "start", lambda self: made.append(self))
    monkeypatch.setattr(distributed, "_peers", None)
    for name, value in (("MASTER_ADDR", "here"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for attempt in ("0", "0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        distributed._watch_peers(0, 2)
    made[0].store.set("word", "70 rank 0 died: of old age")
    assert [one.store.check(["word"]) for one in made] == [True, True, False]


FROZEN = """
import os, signal, sys, time
import torch.distributed as dist
from common import peers
peers.INTERVAL = 0.05

def fork(act):
    pid = os.fork()
    if pid == 0:
        act()
    return pid

def host(pipe):
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    os.write(pipe, str(store.port).encode())
    time.sleep(60)

def rank(number, port):
    peers.Peers(dist.TCPStore("127.0.0.1", port, 2, is_master=False), number, 2).start()
    time.sleep(60)

r, w = os.pipe()
store = fork(lambda: host(w))
port = int(os.read(r, 10))
ranks = [fork(lambda: rank(number, port)) for number in (0, 1)]
time.sleep(0.5)
for pid in ranks:
    os.kill(pid, signal.SIGSTOP)
time.sleep(1.2)
for pid in ranks:
    os.kill(pid, signal.SIGCONT)
time.sleep(0.5)
print("ended after being suspended:", [os.waitpid(pid, os.WNOHANG)[0] for pid in ranks], flush=True)
os.kill(store, signal.SIGSTOP)
print("codes:", [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks], flush=True)
os.kill(store, signal.SIGKILL)
"""


def test_suspended_together_they_go_on_and_a_store_that_does_not_answer_ends_them():
    done = subprocess.run([sys.executable, "-c", FROZEN], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert "ended after being suspended: [0, 0]" in done.stdout, done.stdout + done.stderr
    assert f"codes: [{EXIT_PEER_DIED}, {EXIT_PEER_DIED}]" in done.stdout and "does not answer" in done.stderr


def test_the_watchdog_shows_where_it_hangs():
    program = (
        "import time\nfrom common.watchdog import Watchdog\n"
        "def stuck_here():\n    time.sleep(30)\n"
        "w = Watchdog(0.005)\nw.feed(); w.rest(); time.sleep(0.5)\n"
        "for _ in range(5): w.feed(); time.sleep(0.1)\n"
        "print('fed', flush=True)\nstuck_here()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and done.stdout == "fed\n" and "in stuck_here" in done.stderr


def test_work_that_does_not_know_who_watches_feeds_the_one_on_watch():
    program = (
        "import time\nfrom common import watchdog\n"
        "def volume_that_hangs():\n    time.sleep(30)\n"
        "watchdog.feed(); time.sleep(0.4)\n"
        "with watchdog.Watchdog(0.005):\n    for _ in range(5): watchdog.feed(); time.sleep(0.1)\n"
        "time.sleep(0.4); watchdog.feed(); time.sleep(0.4); print('unwatched', flush=True)\n"
        "with watchdog.Watchdog(0.005): volume_that_hangs()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and done.stdout == "unwatched\n" and "in volume_that_hangs" in done.stderr
