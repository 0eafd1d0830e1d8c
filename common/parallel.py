"""How a method gets onto the hardware: optimiser, processes, precision, compilation, batches."""

import contextlib
import inspect
import signal
from typing import Any

import torch
from timm.models.vision_transformer import Block
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from common.distributed import Run
from common.sampling import StreamSampler

# newer torch has another name for it, and warns of the former one
NAMES = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in NAMES else "broadcast_buffers"


def build_optimizer(
    method: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Fused AdamW with timm's groups: no decay on biases, 1-D parameters and tokens. Only the fused form can skip an
    update on the device."""
    tokens = {n for n, _ in method.named_parameters() if n.rsplit(".", 1)[-1] in ("cls_token", "mask_token")}
    groups = param_groups_weight_decay(method, weight_decay, no_weight_decay_list=tokens)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def wrap(method: nn.Module, run: Run, accum: int = 1) -> nn.Module:
    """The method, in DDP where there are several processes and none has a share of it only (common/sharding.py).

    DDP's static graph is used where nothing is against it (torch 2.14). With accumulation or a backward pass in parts
    the first passes of an update run under `no_sync`, which it does not survive in the first update (an internal
    assertion fails). And where the gradient at a `probe` is taken apart from the backward pass it reduces wrong
    gradients, without a word: GL-MAE's losses on two ranks were off by 6e-2 after 12 updates, and are those of one rank
    to 1e-4 without it.
    """
    if run.world_size == 1 or isinstance(method, FSDPModule):
        return method
    return DistributedDataParallel(
        method,
        device_ids=[run.local_rank] if run.device.type == "cuda" else None,
        **{SYNC_BUFFERS: False},
        gradient_as_bucket_view=True,
        static_graph=accum == 1 and getattr(method, "num_parts", 1) == 1 and not hasattr(method, "probe"),
    )


def reducing(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """For one forward and backward pass of an update: gradients are reduced in the `last` alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def transformer_blocks(method: nn.Module) -> list[nn.Module]:
    """timm's blocks, in the order of the modules: nearly all of the weights and of the arithmetic."""
    return [module for module in method.modules() if isinstance(module, Block)]


def compile_blocks(method: nn.Module) -> int:
    """`torch.compile` of every transformer block, in place (names in the checkpoint stay); returns how many.

    Blocks alone, not the method: they are compiled once for all depths, and masks and views around them would break
    the graph anyway.
    """
    blocks = transformer_blocks(method)
    for block in blocks:
        block.compile()
    return len(blocks)


def uncompiled(wanted: bool) -> contextlib.AbstractContextManager:
    """Where `wanted`, compiled blocks run as they were: their graph may be gone through once only (torch 2.14)."""
    return torch.compiler.set_stance("force_eager") if wanted else contextlib.nullcontext()


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """bf16 or fp16, or None for full precision."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def build_loader(dataset: Dataset, sampler: StreamSampler, workers: int, device: torch.device) -> DataLoader:
    """Batches of this rank in the order of the stream."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker if workers else None,
    )


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # meant for the training process, which still needs its data
        signal.signal(number, signal.SIG_IGN)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
