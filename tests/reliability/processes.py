"""Training processes for the fault-injection trials. They are forked from a process that has already imported
everything, so each starts at once."""

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
Inject = Callable[[int], None]


class Job:
    """A training program on several ranks. Each rank leads its own process group, which its data workers belong to.

    Args:
        program: a key of MAINS.
        argv: the program's arguments, without --out_dir.
        out_dir: folder of the run.
        ranks: number of processes.
        inject: called in each process with its rank before the program starts; prepares a fault.
    """

    def __init__(self, program: str, argv: Sequence[str], out_dir: Path, ranks: int = 1, inject: Inject | None = None):
        self.out_dir, self.codes, self.ended_at = out_dir, {}, {}
        out_dir.mkdir(parents=True, exist_ok=True)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
        self.pids = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                self._run(program, [*argv, "--out_dir", str(out_dir)], rank, ranks, inject)
            self.pids.append(pid)

    def _run(self, program: str, argv: list[str], rank: int, ranks: int, inject: Inject | None) -> None:
        """Run the program in a forked process, and end the process."""
        code = 1
        try:
            self._prepare_process(rank, ranks)
            if inject:
                inject(rank)
            sys.argv = [program, *argv]
            code = run_program(MAINS[program])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def _prepare_process(self, rank: int, ranks: int) -> None:
        os.setsid()
        # A fork loses the thread pool. Create it here, before two threads try to.
        torch.set_num_threads(1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(self.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        sys.__stderr__ = sys.stderr
        if ranks > 1:
            # As under torchrun, whose agent holds the store.
            values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            values |= {"MASTER_PORT": self.store.port}
            values |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
            os.environ |= {name: str(value) for name, value in values.items()}

    def log(self, rank: int = 0) -> Path:
        return self.out_dir / f"output-rank{rank}.txt"

    def output(self, rank: int = 0) -> str:
        """Return what a rank has printed so far."""
        return self.log(rank).read_text(errors="replace")

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank or to all, and to their data workers, as Slurm and torchrun do."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            if pid not in self.codes:
                try:
                    os.killpg(pid, number)
                except ProcessLookupError:
                    # It has not created its process group yet.
                    os.kill(pid, number)

    def poll(self) -> bool:
        """Return whether every rank has ended."""
        for rank, pid in enumerate(self.pids):
            if pid not in self.codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[pid], self.ended_at[rank] = os.waitstatus_to_exitcode(ended[1]), time.monotonic()
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Return the exit codes of all ranks. Kill them and raise TimeoutError if one is running after `seconds`."""
        end = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"still running after {seconds:.0f} s:\n{self.output()[-3000:]}")
            time.sleep(0.02)
        return [self.codes[pid] for pid in self.pids]
