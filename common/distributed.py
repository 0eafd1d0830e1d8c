"""Process group setup from torchrun's environment, on CPU or CUDA, and the collectives that the programs use."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from common.errors import InputError
from common.heartbeat import Heartbeat
from common.signals import EXIT_REQUEUE, Requeue

# Rank 0 may fill a cache while the others wait. Dead ranks are found by heartbeat.py, ranks that hang by watchdog.py.
TIMEOUT = timedelta(hours=12)
_heartbeat: Heartbeat | None = None


@dataclass(frozen=True)
class Run:
    """Device, rank and number of processes of this run."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def setup(device: Literal["auto", "cpu", "cuda"] = "auto") -> Run:
    """Join the process group of a torchrun launch: nccl on CUDA, gloo on CPU. Without torchrun there is one process.

    Products and convolutions of float32 are then computed in float32, as on a CPU.

    Raises:
        InputError: `device` is cuda, and there is no CUDA device. auto is CUDA if there is one.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available here; use --device cpu or auto")
    # torch alone would use TF32 in convolutions; training may ask for it (--tf32)
    torch.backends.cudnn.allow_tf32 = False
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in defaults.items())
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(local_rank)
    target = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        device_id = {"device_id": target} if use_cuda else {}
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=TIMEOUT, **device_id)
        _start_heartbeat(rank, world_size)
    return Run(target, rank, world_size, local_rank)


def _start_heartbeat(rank: int, world_size: int) -> None:
    """Start the heartbeat and the check for dead ranks.

    It has its own connection to the store, because a thread that waits for the store blocks all threads of its
    connection. The store survives a restart by torchrun (--max_restarts); the prefix hides the messages of earlier
    attempts.
    """
    global _heartbeat
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _heartbeat = Heartbeat(dist.PrefixStore(f"attempt {attempt}", store), rank, world_size)
    _heartbeat.start()


def active() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def barrier() -> None:
    """Wait until all ranks have called this."""
    if active():
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the block on rank 0 first, then on the others: rank 0 writes files that they read."""
    waits = active() and dist.get_rank() > 0
    if waits:
        barrier()
    yield
    if active() and not waits:
        barrier()


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean of `tensor` over the ranks, the same on each; without a process group `tensor` itself."""
    if not active():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensors of all ranks, (ranks, *shape), the same on each."""
    if not active():
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered)


def shutdown() -> None:
    """Leave the process group. Call it in a `finally` block.

    If an exception is being handled, the other ranks receive its message and end too. They also end if this process
    alone was asked to stop, because they may be waiting for it.
    """
    global _heartbeat
    error = sys.exc_info()[1]
    interrupted = isinstance(error, Requeue) and not error.agreed
    normal = error is None or (isinstance(error, SystemExit) and not interrupted)
    if _heartbeat and interrupted:
        _heartbeat.report("was asked to stop", EXIT_REQUEUE)
    elif _heartbeat and not normal:
        _heartbeat.report(f"died: {type(error).__name__}: {error}".splitlines()[0])
    elif _heartbeat:
        _heartbeat.stop()
    # Otherwise another rank may hang in a collective call, and destroying the group would wait for it.
    if active() and normal:
        dist.destroy_process_group()
    _heartbeat = None
