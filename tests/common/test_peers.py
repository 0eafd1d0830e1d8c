"""A dead peer is noticed from its silence or its last word, an orderly end is not taken for a death; a hang ends the
process."""

import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from common import peers
from common.peers import EXIT_PEER_DIED, Peers
from tests.helpers import ROOT


class Ended(Exception):
    pass


@pytest.fixture
def pair(monkeypatch):
    """Two ranks on one store, with a quick pulse; their deaths are collected instead of died."""
    ended = []

    def collect(code):
        ended.append(code)
        raise Ended

    monkeypatch.setattr(peers.os, "_exit", collect)
    monkeypatch.setattr(peers.threading, "excepthook", lambda args: None)
    monkeypatch.setattr(peers, "INTERVAL", 0.05)
    monkeypatch.setattr(peers, "SILENCE", 0.5)
    store = dist.HashStore()
    both = [Peers(store, rank, 2) for rank in (0, 1)]
    for one in both:
        one.start()
    yield both, ended
    for one in both:
        one.stop()


def test_nothing_happens_while_both_live_and_when_one_ends_in_order(pair):
    (first, second), ended = pair
    time.sleep(0.8)
    second.stop()
    time.sleep(0.8)
    assert ended == [] and first.thread.is_alive()


def test_silence(pair, capsys):
    (first, second), ended = pair
    second.stopping.set()  # as if killed: no word, no more beats
    time.sleep(1.2)
    assert ended == [EXIT_PEER_DIED] and "rank 1 died without a word" in capsys.readouterr().err


def test_a_last_word_is_repeated(pair, capsys):
    (first, second), ended = pair
    second.report("MemoryError: no more")
    time.sleep(0.3)
    assert ended == [EXIT_PEER_DIED] and "rank 1 died: MemoryError: no more; rank 0 ends" in capsys.readouterr().err


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
