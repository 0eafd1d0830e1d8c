"""One process or many, CPU or CUDA: what `torchrun` says about this process, and the few collectives the programs
use."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import InputError
from common.peers import Peers
from common.signals import EXIT_REQUEUE, Requeue

PATIENCE = timedelta(
    hours=12
)  # rank 0 may fill a cache while the others wait; the dead and the hung are found by peers.py and watchdog.py
_peers: Peers | None = None


@dataclass(frozen=True)
class Run:
    """This process among its peers."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def setup(device: str = "auto") -> Run:
    """Join the process group that torchrun set up (nccl on CUDA, gloo on CPU); without torchrun this is the only
    process."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device: found {device!r}, allowed: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available here; use --device cpu or auto")
    rank, world_size, local_rank = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda:
        torch.cuda.set_device(local_rank)
    target = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        device_id = {"device_id": target} if use_cuda else {}
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=PATIENCE, **device_id)
        _watch_peers(rank, world_size)
    return Run(target, rank, world_size, local_rank)


def _watch_peers(rank: int, world_size: int) -> None:
    """Start the watch, on a connection of its own: a thread that waits on a store holds up all others of that
    connection. The store outlives a restart by torchrun (--max_restarts), the word that an earlier attempt left must
    not."""
    global _peers
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _peers = Peers(dist.PrefixStore(f"attempt {attempt}", store), rank, world_size)
    _peers.start()


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def barrier() -> None:
    """Wait for all ranks."""
    if active():
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 goes through the block alone, then the others: it prepares files that they only read."""
    waits = active() and dist.get_rank() > 0
    if waits:
        barrier()
    yield
    if active() and not waits:
        barrier()


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of `tensor` over the ranks, the same on each; without a process group `tensor` itself."""
    if not active():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """(ranks, *shape): the tensor of every rank, the same on each."""
    if not active():
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered)


def shutdown() -> None:
    """Leave the process group. With an exception in flight the peers are told why, and end too; so when this process
    alone was asked to stop, and they may be waiting for it."""
    global _peers
    error = sys.exc_info()[1]
    interrupted = isinstance(error, Requeue) and not error.agreed
    orderly = error is None or (isinstance(error, SystemExit) and not interrupted)
    if _peers and interrupted:
        _peers.report("was asked to stop", EXIT_REQUEUE)
    elif _peers and not orderly:
        _peers.report(f"died: {type(error).__name__}: {error}".splitlines()[0])
    elif _peers:
        _peers.stop()
    if active() and orderly:  # with a peer stuck in a collective call, leaving in good order would wait for it
        dist.destroy_process_group()
    _peers = None
