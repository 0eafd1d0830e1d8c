"""Training processes for the fault-injection harness: forked from a process that has imported everything, so each
starts at once."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import Finetune.main_finetune
import Pretrain.main_pretrain
from common.cli import run_program

MAINS = {"pretrain": Pretrain.main_pretrain.main, "finetune": Finetune.main_finetune.main}


class Job:
    """A training program on `ranks` processes, each the leader of a process group of its own (with its data
    workers)."""

    def __init__(
        self,
        program: str,
        argv: Sequence[str],
        out_dir: Path,
        ranks: int = 1,
        sabotage: Callable[[int], None] | None = None,
    ):
        self.out_dir, self.codes = out_dir, {}
        out_dir.mkdir(parents=True, exist_ok=True)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
        self.pids = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                self._child(program, [*argv, "--out_dir", str(out_dir)], rank, ranks, sabotage)
            self.pids.append(pid)

    def _child(
        self, program: str, argv: list[str], rank: int, ranks: int, sabotage: Callable[[int], None] | None
    ) -> None:
        code = 1
        try:
            os.setsid()
            torch.set_num_threads(1)  # makes the thread pool that a fork loses, before two threads both try to
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            output = os.open(self.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            sys.__stderr__ = sys.stderr
            if ranks > 1:  # as torchrun, whose agent holds the store
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                }
                os.environ |= {"MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
                os.environ |= {"TORCHELASTIC_RESTART_COUNT": "0"}
            if sabotage:
                sabotage(rank)
            sys.argv = [program, *argv]
            code = run_program(MAINS[program])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def log(self, rank: int = 0) -> Path:
        return self.out_dir / f"output-rank{rank}.txt"

    def said(self, rank: int = 0) -> str:
        return self.log(rank).read_text(errors="replace")

    def signal(self, number: int, rank: int | None = None) -> None:
        """To one rank or all, and to their data workers, as Slurm and torchrun do."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            if pid not in self.codes:
                try:
                    os.killpg(pid, number)
                except ProcessLookupError:  # it has not come as far as its own group
                    os.kill(pid, number)

    def poll(self) -> bool:
        """Has every rank ended?"""
        for pid in self.pids:
            if pid not in self.codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[pid] = os.waitstatus_to_exitcode(done[1])
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Exit codes, by rank. What still runs after `seconds` is killed, and an error."""
        end = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"still running after {seconds:.0f} s:\n{self.said()[-3000:]}")
            time.sleep(0.02)
        return [self.codes[pid] for pid in self.pids]
