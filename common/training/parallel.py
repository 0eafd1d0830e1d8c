"""How a method runs on the hardware: precision, compilation, several processes."""

import contextlib
import inspect
import logging
from dataclasses import dataclass
from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from common.config import setting
from common.distributed import Run
from common.training.method import Method

# torch 2.14 renamed this argument, and warns about the former name
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
RECOMPILE_LIMIT = 64
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers"


@dataclass(kw_only=True)
class PrecisionSettings:
    """Settings that change speed and memory, but not what is computed."""

    amp: Literal["auto", "bf16", "fp16", "off"] = setting("auto", "autocast; auto: bf16 on CUDA, off on a CPU")
    grad_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    fsdp: bool = setting(False, "FSDP2: shard weights, gradients and AdamW's state over the processes")
    channels_last: bool = setting(
        False, "convolutions with the channels last in memory: mim is somewhat faster on a CPU; not with --fsdp"
    )
    compile: bool = setting(False, "torch.compile every transformer block; the first updates take minutes")
    tf32: bool = setting(
        False,
        "CUDA: TF32, with a mantissa of 10 bits, in float32 products and convolutions; no effect in bf16 and fp16",
    )
    cudnn_benchmark: bool = setting(
        False,
        "CUDA: time the algorithms of each convolution and use the fastest; a resumed run may choose others, and then "
        "differs by rounding",
    )


def set_cuda_options(settings: PrecisionSettings) -> None:
    """Set the options of torch that hold for the process: TF32 and cuDNN's choice of algorithms."""
    # torch alone would use TF32 in convolutions and not in matrix products
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark


def wrap(method: Method, run: Run, accum: int = 1) -> nn.Module:
    """Return the method in DDP when there are several processes and it is not sharded (common/training/fsdp.py).

    DDP's static graph is used only where torch 2.14 computes it correctly. With accumulation or several parts the first
    passes of an update run under `no_sync`, where the static graph fails an internal assertion in the first update. And
    where a gradient is taken at `grad_norm_parameter` apart from the backward pass, it silently reduces wrong
    gradients: GL-MAE's losses on two ranks were off by 6e-2 after 12 updates, and without it equal those of one rank to
    1e-4.
    """
    if run.world_size == 1 or isinstance(method, FSDPModule):
        return method
    return DistributedDataParallel(
        method,
        device_ids=[run.local_rank] if run.device.type == "cuda" else None,
        **{SYNC_BUFFERS: False},
        gradient_as_bucket_view=True,
        static_graph=accum == 1 and method.num_parts == 1 and method.grad_norm_parameter is None,
    )


def reduce_gradients(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Context for one forward and backward pass: gradients are reduced over the processes only when `enabled`."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return contextlib.nullcontext()


def transformer_blocks(method: nn.Module) -> list[nn.Module]:
    """Return timm's blocks in the order of the modules; they hold nearly all weights and arithmetic."""
    return [module for module in method.modules() if isinstance(module, Block)]


def compile_blocks(method: nn.Module) -> int:
    """Compile every transformer block in place and return their number. Names in checkpoints do not change.

    The blocks and not the method: they are compiled once for all depths, and the masks and views around them would
    break the graph.
    """
    if not torch.cuda.is_available():
        # compiling for a CPU loads torch's search for CUDA, which warns that there is none
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # blocks share their code, which is compiled again for each shape, with and without gradients; torch stops at 8
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, RECOMPILE_LIMIT)
    blocks = transformer_blocks(method)
    for block in blocks:
        block.compile()
    return len(blocks)


def eager_blocks(enabled: bool) -> contextlib.AbstractContextManager:
    """Context in which compiled blocks run eagerly when `enabled`: a compiled graph allows only one backward pass."""
    return torch.compiler.set_stance("force_eager") if enabled else contextlib.nullcontext()


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast for `--amp`: bfloat16, float16, or None for full precision."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return the autocast context of a dtype from `autocast_dtype`; None disables it."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
