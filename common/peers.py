"""When one process dies the others must not wait for it: a collective call with a dead peer hangs, on NCCL until its
timeout.

Every rank has a thread that beats in the store of the process group (it is not asked in the training step, and lives on
while the main thread is stuck in a collective call). It watches one neighbour's beat, and whether anybody has left word
why the run ends.
"""

import contextlib
import os
import sys
import threading
import time

import torch.distributed as dist

INTERVAL = 1.0  # seconds between two beats
SILENCE = 15.0  # seconds without a beat after which a process counts as dead
EXIT_PEER_DIED = 70  # EX_SOFTWARE of sysexits.h


class Peers:
    """The watch of one rank over the next one. `start` it, `report` a death of one's own, `stop` it before an
    orderly end."""

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self.store, self.rank, self.neighbour = dist.PrefixStore("peers", store), rank, (rank + 1) % world_size
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        self.store.set(f"beat/{self.rank}", "0")
        self.thread.start()

    def report(self, reason: str) -> None:
        """Leave word for the others, who end within seconds and repeat it."""
        self.stopping.set()
        with contextlib.suppress(RuntimeError):
            self.store.set("reason", f"rank {self.rank} died: {reason}")

    def stop(self) -> None:
        """An orderly end: the neighbour's silence is now expected, and so is ours."""
        self.stopping.set()
        with contextlib.suppress(RuntimeError):
            self.store.set(f"beat/{self.rank}", "done")
        self.thread.join(timeout=5 * INTERVAL)

    def _watch(self) -> None:
        beats, heard, last = 0, "", time.monotonic()
        while not self.stopping.wait(INTERVAL):
            beats += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beats))
                if self.store.check(["reason"]):
                    self._end(self.store.get("reason").decode())
                theirs = self.store.get(f"beat/{self.neighbour}").decode() if self._started() else ""
            except RuntimeError:  # the store lives on one node, next to rank 0
                self._end("the store of the process group is gone: rank 0's node, or the launcher, died")
            if theirs != heard or theirs in ("", "done"):
                heard, last = theirs, time.monotonic()
            elif time.monotonic() - last > SILENCE:
                reason = f"rank {self.neighbour} died without a word (killed?): silent for {SILENCE:.0f} s"
                with contextlib.suppress(RuntimeError):
                    self.store.set("reason", reason)
                self._end(reason)

    def _started(self) -> bool:
        return self.store.check([f"beat/{self.neighbour}"])

    def _end(self, reason: str) -> None:
        if not self.stopping.is_set():
            print(f"error: {reason}; rank {self.rank} ends", file=sys.stderr, flush=True)
            os._exit(EXIT_PEER_DIED)  # the main thread may be stuck where no exception reaches it
