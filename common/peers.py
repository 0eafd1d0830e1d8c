"""When one process dies the others must not wait for it: a collective call with a dead peer hangs, on NCCL until its
timeout.

Every rank has a thread that beats in the store of the process group (it is not asked in the training step, and lives on
while the main thread is stuck in a collective call). It watches one neighbour's beat, and whether anybody has left word
why the run ends. A second thread watches the first, which is stuck itself when the store's node is lost without a word:
its connection then stays open.

Silence is counted in rounds of one's own, not by the clock: processes that are suspended together (scontrol suspend, a
closed lid) miss no round, and find each other alive when they go on.
"""

import contextlib
import os
import sys
import threading

import torch.distributed as dist

INTERVAL = 1.0  # seconds between two beats
SILENCE = 15  # rounds without a beat after which a process, or the store, counts as dead
EXIT_PEER_DIED = 70  # EX_SOFTWARE of sysexits.h


class Peers:
    """The watch of one rank over the next one. `start` it, `report` a death of one's own, `stop` it before an
    orderly end."""

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self.store, self.rank, self.neighbour = dist.PrefixStore("peers", store), rank, (rank + 1) % world_size
        self.rounds = 0
        self.stopping, self.stopped = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self.guard = threading.Thread(target=self._watch_the_watch, name="peers guard", daemon=True)

    def start(self) -> None:
        self.store.set(f"beat/{self.rank}", "0")
        self.thread.start()
        self.guard.start()

    def report(self, reason: str, code: int = EXIT_PEER_DIED) -> None:
        """Leave word for the others, who repeat it and end with `code` within seconds."""
        self._leave("word", f"{code} rank {self.rank} {reason}")

    def stop(self) -> None:
        """An orderly end: the neighbour's silence is now expected, and so is ours."""
        self._leave(f"beat/{self.rank}", "done")
        self.thread.join(timeout=5 * INTERVAL)

    def _leave(self, key: str, value: str) -> None:
        self.stopping.set()
        with contextlib.suppress(RuntimeError):
            self.store.set(key, value)
        self.stopped.set()  # until here the guard is there, for a store that does not answer

    def _watch(self) -> None:
        heard, silent = "", 0
        while not self.stopping.wait(INTERVAL):
            self.rounds += 1
            try:
                self.store.set(f"beat/{self.rank}", str(self.rounds))
                word = self.store.get("word").decode() if self.store.check(["word"]) else ""
                theirs = self.store.get(f"beat/{self.neighbour}").decode() if self._started() else ""
            except RuntimeError:  # the store lives on one node, next to rank 0
                word = f"{EXIT_PEER_DIED} the store of the process group is gone: rank 0's node, or the launcher, died"
                theirs = ""
            silent = silent + 1 if theirs == heard and theirs not in ("", "done") else 0
            heard = theirs
            if not word and silent > SILENCE:
                word = f"{EXIT_PEER_DIED} rank {self.neighbour} died without a word (killed?): silent for "
                word += f"{SILENCE * INTERVAL:.0f} s"
                with contextlib.suppress(RuntimeError):
                    self.store.set("word", word)
            if word and not self.stopping.is_set():
                self._end(word)

    def _watch_the_watch(self) -> None:
        seen, silent = -1, 0
        while not self.stopped.wait(INTERVAL):
            silent = silent + 1 if self.rounds == seen else 0
            seen = self.rounds
            if silent > SILENCE:
                self._end(f"{EXIT_PEER_DIED} the store of the process group does not answer: rank 0's node is lost?")

    def _started(self) -> bool:
        return self.store.check([f"beat/{self.neighbour}"])

    def _end(self, word: str) -> None:
        code, reason = word.split(" ", maxsplit=1)
        print(f"error: {reason}; rank {self.rank} ends", file=sys.stderr, flush=True)
        os._exit(int(code))  # the main thread may be stuck where no exception reaches it
