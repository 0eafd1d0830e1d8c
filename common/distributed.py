"""One process or many, CPU or CUDA: what `torchrun` says about this process, and the few collectives the programs use."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common.config import InputError


@dataclass(frozen=True)
class Run:
    """This process among its peers."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def setup(device: str = "auto") -> Run:
    """Join the process group that torchrun set up (nccl on CUDA, gloo on CPU); without torchrun this is the only process."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device: found {device!r}, allowed: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available here; use --device cpu or auto")
    rank, world_size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda:
        torch.cuda.set_device(local_rank)
    target = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", **({"device_id": target} if use_cuda else {}))
    return Run(target, rank, world_size, local_rank)


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


def shutdown() -> None:
    if active():
        dist.destroy_process_group()
