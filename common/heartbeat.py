"""End all ranks when one of them has died, because a collective call with a dead rank does not return.

On NCCL it returns after its timeout, which is long here: rank 0 may fill a cache while the others wait. On gloo it
fails at once. torchrun alone is too slow or does nothing. Seconds until all ranks have ended, measured with torch 2.14
on a CPU; the remaining ranks hang in a call that no signal ends, in place of NCCL, which was not run:

                                                  torchrun alone    with this
    one node, a rank raises an exception                      32            1
    one node, a rank is killed                                30           16
    two nodes, a rank of the second raises        running after 60          1
    two nodes, the second or its rank is killed   running after 60         16
    two nodes, the first is killed                            31            1
    two nodes, the first does not answer          running after 60         16
    torchrun is killed                            running after 50          1

If the first node does not answer, torchrun on the other nodes hangs in a call to the same store, which only SIGKILL
ends. The rank that ends for this reason sends it.

torchrun waits for 30 s between SIGTERM and SIGKILL, which no option changes after a rank has failed, and its agents on
other nodes do not check whether one has.

Every rank has a heartbeat: a thread increases a counter in the store of the process group, also while the main thread
hangs. The thread checks the counter of one neighbour, and whether a rank has stored a message with the reason why the
run ends. If the node that holds the store is lost, this thread hangs too: the connection stays open, and the store's
timeout does not apply. A second thread checks for that. Silence is counted in rounds of the checking thread and not in
seconds, so processes that are suspended together (scontrol suspend, a closed laptop) miss no round and continue. A
process that is suspended alone counts as dead.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

# seconds between two rounds
INTERVAL = 1.0
# rounds without a change after which a rank, or the store, counts as dead
SILENCE = 15
# EX_SOFTWARE of sysexits.h
EXIT_RANK_DIED = 70


def _exit(code: int, reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    # The main thread may be in a call that no exception ends.
    os._exit(code)


def kill_launcher() -> None:
    """Kill torchrun on this node. Do nothing if the parent process is another program, or is unknown."""
    parent = os.getppid()
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
        if b"torch.distributed.run" in words or any(Path(os.fsdecode(word)).name == "torchrun" for word in words):
            os.kill(parent, signal.SIGKILL)


class Heartbeat:
    """The heartbeat of one rank, and its check of the next rank.

    Call `start` first, `report` if this rank fails, and `stop` before it ends normally.

    Args:
        store: of the process group, on a connection of its own.
        rank, world_size: of this process.
        end: called by a thread with an exit code and a reason when the process must end.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, end: Callable[[int, str], None] = _exit):
        self.store, self.rank, self.neighbour = dist.PrefixStore("heartbeat", store), rank, (rank + 1) % world_size
        self.end = end
        self.rounds = self.heard = self.silent = self.seen = self.unanswered = 0
        self.stopping = threading.Event()
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the heartbeat and both checks."""
        self.store.set(f"beat/{self.rank}", "1")
        for check in (self.listen, self.check_store):
            self.threads.append(threading.Thread(target=self._repeat, args=(check,), daemon=True))
            self.threads[-1].start()

    def report(self, reason: str, code: int = EXIT_RANK_DIED) -> None:
        """Store a message for the other ranks, which print it and end with `code` in their next round."""
        self._finish("message", f"{code} rank {self.rank} {reason}")

    def stop(self) -> None:
        """Stop the threads, and tell the neighbour not to expect another heartbeat."""
        self._finish(f"beat/{self.rank}", "-1")

    def listen(self) -> str:
        """Do one round. Return "", or an exit code and the reason why this process must end."""
        try:
            self.store.add(f"beat/{self.rank}", 1)
            # 0 before the neighbour's start, -1 after its normal end
            beat = self.store.add(f"beat/{self.neighbour}", 0)
            message = self.store.get("message").decode() if self.store.check(["message"]) else ""
        except RuntimeError:
            return f"{EXIT_RANK_DIED} the store of the process group is gone: rank 0's node, or the launcher, died"
        self.rounds += 1
        self.silent = self.silent + 1 if beat == self.heard and beat > 0 else 0
        self.heard = beat
        if not message and self.silent > SILENCE:
            message = f"{EXIT_RANK_DIED} rank {self.neighbour} died without a message (killed?): silent for "
            message += f"{SILENCE * INTERVAL:.0f} s"
            with contextlib.suppress(RuntimeError):
                self.store.set("message", message)
        return message

    def check_store(self) -> str:
        """Check that `listen` still returns, which it does not if the store's node is lost. Return as `listen`."""
        self.unanswered = self.unanswered + 1 if self.rounds == self.seen else 0
        self.seen = self.rounds
        message = f"{EXIT_RANK_DIED} the store of the process group does not answer: rank 0's node is lost?"
        return message if self.unanswered > SILENCE else ""

    def _repeat(self, check: Callable[[], str]) -> None:
        while not self.stopping.wait(INTERVAL):
            message = check()
            if message and not self.stopping.is_set():
                if check == self.check_store:
                    kill_launcher()
                code, reason = message.split(" ", maxsplit=1)
                return self.end(int(code), f"{reason}; rank {self.rank} ends")

    def _finish(self, key: str, value: str) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(SILENCE * INTERVAL)
        # While a thread waits for the store's answer, the store would block this thread too.
        if not any(thread.is_alive() for thread in self.threads):
            with contextlib.suppress(RuntimeError):
                self.store.set(key, value)
