"""How a method gets onto the hardware: optimiser, processes, precision, compilation, batches."""

import contextlib
import inspect

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from common.distributed import Run

# newer torch has another name for it, and warns of the former one
NAMES = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in NAMES else "broadcast_buffers"


def wrap(method: nn.Module, run: Run, accum: int = 1) -> nn.Module:
    """The method, in DDP where there are several processes and none has a share of it only (common/training/fsdp.py).

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
