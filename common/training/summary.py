"""What a run prints at its start: one screen that says what is trained, and what can be computed before an update.

The time is a bound from the rate of matrix products. A measured one is printed after some updates
(common/training/speed.py), and `--dry_run` measures the first passes.
"""

from collections.abc import Mapping

import torch
from torch.utils.data import Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode

from common.data.loader import to_device
from common.distributed import Run
from common.rates import matmul_rate
from common.resources import GIB, duration, memory, peak_memory, quantity
from common.runlog import is_main
from common.training.fsdp import meta_copy
from common.training.loop import LossWeights
from common.training.method import Method
from common.training.parallel import autocast_dtype
from common.training.settings import BatchPlan, LoopSettings

# tensors besides each trained weight: its gradient and AdamW's two moments
COPIES = 3
# size of the matrices whose product is timed, and for how many seconds: few, because every start takes them
MATRIX_CPU, MATRIX_CUDA, SECONDS = 512, 4096, 0.02


def start_summary(
    title: str,
    rows: Mapping[str, str],
    method: Method,
    settings: LoopSettings,
    plan: BatchPlan,
    run: Run,
    flop: float | None,
) -> str:
    """Return the lines of the summary.

    Args:
        rows: what only the program knows, name -> text; they come first.
        method: before it is sharded.
        flop: result of `update_flop`.
    """
    weights = sum(p.numel() for p in method.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in method.parameters() if not p.requires_grad)
    size = state_bytes(method, settings, run)
    divided = f"{run.world_size} process(es) x {plan.micro_batch} x {plan.accum} accumulated"
    if settings.micro_batch_size == "auto":
        divided = f"{run.world_size} process(es), micro-batches of what fits"
    rows = dict(rows) | {
        "weights": f"{weights:,} trained" + (f", {frozen:,} not trained" if frozen else ""),
        "batch": f"{plan.batch} volumes: {divided}",
        "updates": f"{plan.total_steps:,}: {settings.epochs:,} epochs x {plan.steps_per_epoch:,}",
        "compute": "not counted" if flop is None else f"{quantity(flop, 'FLOP')} per update, forward and backward",
        "memory": f"{quantity(size, 'B')} per process for weights, gradients and moments; --dry_run measures the rest",
        "time": time_text(flop, settings, plan, run),
        "device": f"{device_name(run.device)}, {autocast_dtype(settings.precision.amp, run.device) or torch.float32}",
        "folder": str(settings.out_dir),
    }
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())])


def time_text(flop: float | None, settings: LoopSettings, plan: BatchPlan, run: Run) -> str:
    """Return how long the run takes at the rate of large matrix products, which no update reaches.

    Args:
        flop: of an update over all processes, None if unknown.
    """
    measured = "measured after the first updates"
    if flop is None:
        return measured
    size = MATRIX_CUDA if run.device.type == "cuda" else MATRIX_CPU
    dtype = autocast_dtype(settings.precision.amp, run.device) or torch.float32
    rate = matmul_rate(str(run.device), size, dtype, SECONDS)
    least = duration(flop * plan.total_steps / (rate * run.world_size))
    return f"at least about {least}, at {quantity(rate, 'FLOP')}/s of matrix products per process; {measured}"


def state_bytes(method: Method, settings: LoopSettings, run: Run) -> int:
    """Return the bytes of weights, buffers, gradients and moments on one process; with --fsdp its share."""
    parameters = list(method.parameters())
    size = sum(p.numel() * p.element_size() * (1 + COPIES * p.requires_grad) for p in parameters)
    if settings.precision.fsdp:
        size //= run.world_size
    return size + sum(b.numel() * b.element_size() for b in method.buffers())


def update_flop(method: Method, dataset: Dataset, loss_weights: LossWeights, plan: BatchPlan) -> float | None:
    """Return the floating point operations of one update over all processes, the optimiser not included.

    Those of matrix products, convolutions and attention, as torch counts them: on tensors without memory, for the
    shapes of the first sample. None on other ranks than 0, and for a method that cannot run on such tensors.
    """
    if not is_main():
        return None
    batch = to_device(default_collate([dataset[(0, 0)]]), torch.device("meta"))
    twin = meta_copy(method).to("meta").train()
    weights = loss_weights(0)
    try:
        with FlopCounterMode(display=False) as counter:
            for part in range(twin.num_parts):
                reported = twin(batch, 0, part)
                sum(weight * reported[name] for name, weight in weights.items() if name in reported).backward()
    # what a method does is its own affair; the count is for information only
    except Exception:
        return None
    return float(counter.get_total_flops()) * plan.batch


def device_name(device: torch.device) -> str:
    """Return the device with the name of the GPU, or the number of threads of the CPU."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def peak_text(device: torch.device) -> str:
    """Return the largest memory so far as text: of tensors on a GPU, else of the process."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.max_memory_allocated(device) / GIB:.1f} of {total / GIB:.1f} GiB of the GPU"
    return f"{peak_memory() / GIB:.1f} of {memory() / GIB:.1f} GiB, with all libraries"
