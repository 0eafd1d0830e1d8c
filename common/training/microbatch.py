"""`--micro_batch_size auto`: the largest micro-batch that fits the device, found before the first update.

Only the division of an update into passes depends on it: the batch, the order of the data and the learning rate do not.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from common import distributed
from common.data.loader import Loading
from common.errors import InputError
from common.resources import available_memory
from common.runlog import print_main
from common.training.method import Batch
from common.training.parallel import autocast
from common.training.settings import BatchPlan
from common.training.state import TrainingState

# largest share of a GPU's memory that a pass may use; the rest is for fragmentation and for larger batches
CUDA_SHARE = 0.9
# largest share of the available host memory that passes may use; other programs need some
CPU_SHARE = 0.5
# what a pass needs on a CPU, as a multiple of what it keeps for the backward pass
CPU_FACTOR = 2.0

# size -> a micro-batch on the device
MakeBatch = Callable[[int], Batch]


def with_largest_micro_batch(
    plan: BatchPlan, state: TrainingState, loading: Loading, loss_weights: dict[str, float], first: int | None = None
) -> BatchPlan:
    """Return the plan with the largest micro-batch that divides the batch of a process and fits on all of them.

    On CUDA, passes of growing size are tried. On a CPU the size is estimated from the memory that a pass of one volume
    keeps, since a process that needs too much would be killed. Nothing of the trials remains.

    Args:
        plan: of any micro-batch.
        state: with the method not yet wrapped or compiled.
        loading: how batches are loaded; copies of the first sample are tried.
        first: the size to try first, and to take if it fits: that of the run that is resumed.

    Raises:
        InputError: a pass of one volume does not fit.
    """
    volumes = plan.micro_batch * plan.accum
    sizes = [size for size in range(1, volumes + 1) if volumes % size == 0]
    make_batch = copies_of_first(loading, state.run.device)
    with restoring_state(state):
        measure = trial if state.run.device.type == "cuda" else estimate
        fits = on_all_ranks(measure(state, make_batch, loss_weights), state.run.device)
        size = first if first in sizes and fits(first) else largest(sizes, fits)
    if size is None:
        raise InputError(
            f"--micro_batch_size auto: a pass of one volume does not fit the memory of {state.run.device}; use "
            "--grad_checkpointing, a smaller --model or smaller views"
        )
    print_main(f"micro-batches of {size} volume(s) per process, {volumes // size} accumulated: the largest that fit")
    return dataclasses.replace(plan, micro_batch=size, accum=volumes // size)


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the last of the growing `sizes` before one does not fit, None when none does."""
    return max(itertools.takewhile(fits, sizes), default=None)


def on_all_ranks(fits: Callable[[int], bool], device: torch.device) -> Callable[[int], bool]:
    """Return a function that tells whether a size fits on every rank. All must call it with the same sizes."""
    return lambda size: bool(distributed.all_gather(torch.tensor(float(fits(size)), device=device)).min() > 0)


# ---------------------------------------------------------------- trials


def copies_of_first(loading: Loading, device: torch.device) -> MakeBatch:
    """Return a function that makes a batch of so many copies of the first sample."""
    sample = loading.dataset[(0, 0)]
    return lambda size: loading.prepare(loading.collate([sample] * size), device)


def trial(state: TrainingState, make_batch: MakeBatch, loss_weights: dict[str, float]) -> Callable[[int], bool]:
    """Return a function that tries a size on CUDA, with room for AdamW's moments when there are none yet."""
    device = state.run.device
    moments = 0 if state.optimizer.state else 2 * sum(p.nbytes for p in state.parameters)

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        free, _ = torch.cuda.mem_get_info(device)
        limit = CUDA_SHARE * (free + torch.cuda.memory_reserved(device))
        try:
            # in the second pass the gradients are there
            for _ in range(2):
                run_passes(state, make_batch(size), loss_weights)
            return torch.cuda.max_memory_allocated(device) + moments <= limit
        except torch.OutOfMemoryError:
            return False
        finally:
            state.optimizer.zero_grad(set_to_none=True)

    return fits


def estimate(state: TrainingState, make_batch: MakeBatch, loss_weights: dict[str, float]) -> Callable[[int], bool]:
    """Return a function that estimates whether a size fits, from what a pass of one volume keeps for its backward
    pass. Where the available memory is not known, only one volume is assumed to fit."""
    available = available_memory()
    if available is None:
        return lambda size: size == 1
    kept = kept_bytes(state, make_batch(1), loss_weights)
    limit = CPU_SHARE * available / state.run.world_size
    return lambda size: CPU_FACTOR * kept * size <= limit


def kept_bytes(state: TrainingState, batch: Batch, loss_weights: dict[str, float]) -> int:
    """Return the bytes that a pass of a batch keeps for its backward pass, besides the weights."""
    weights = {p.untyped_storage().data_ptr() for p in state.method.parameters()}
    kept: dict[int, int] = {}
    most = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def after_forward() -> None:
        nonlocal most
        most = max(most, sum(kept.values()))
        kept.clear()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_passes(state, batch, loss_weights, after_forward)
    return most


def run_passes(
    state: TrainingState,
    batch: Batch,
    loss_weights: dict[str, float],
    after_forward: Callable[[], None] = lambda: None,
) -> None:
    """Run the forward and backward passes of a micro-batch."""
    for part in range(state.method.num_parts):
        with autocast(state.run.device, state.autocast):
            reported = state.method(batch, 0, part)
        after_forward()
        sum(weight * reported[name] for name, weight in loss_weights.items() if name in reported).backward()


@contextlib.contextmanager
def restoring_state(state: TrainingState) -> Iterator[None]:
    """Run the block in training mode, and leave gradients, random numbers, batch norm and the method as before."""
    before = [buffer.clone() for buffer in state.batchnorm.buffers]
    devices = [state.run.device] if state.run.device.type == "cuda" else []
    state.method.train()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        state.method.discard_passes()
        state.optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(state.batchnorm.buffers, before):
            buffer.copy_(value)
        if devices:
            torch.cuda.empty_cache()
