"""MiM against the straightforward form of its network: one volume, and all levels; and its cheaper recipe.

Losses are compared in float32, and steps are measured in the precision of training: bfloat16 on CUDA.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import compare
from benchmarks.mim_reference import straightforward
from common.training.parallel import autocast, autocast_dtype
from Pretrain.masking import random_masking
from Pretrain.models_mim import MiM, mim_convvit3d_base_patch16, mim_convvit3d_tiny_patch16

MASK_RATIO = 0.6
GRADIENTS = "beyond weights and gradients, which are the same for both"


def measure(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows of MiM. `quick`: the tiny network and small volumes.

    On a CPU the levels have inputs of 64^3: with 96^3 the straightforward form takes 20 GB for all volumes at once.
    """
    build, name = (mim_convvit3d_tiny_patch16, "tiny") if quick else (mim_convvit3d_base_patch16, "base")
    size = 32 if quick else 96
    level_size = size if quick or device.type == "cuda" else 64
    rounds = 2 if quick else 3
    return [
        measure_network(partial(build, img_size=size), name, device, rounds),
        measure_levels(partial(build, img_size=level_size), name, device, rounds),
        measure_half_down(partial(build, img_size=64 if quick else size), name, device, rounds),
    ]


def measure_network(build: Callable[..., MiM], name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Compare the network on one masked volume, forward and backward."""
    method = build(align="none").to(device)
    reference = straightforward(method, align="none").to(device)
    size, tokens = method.encoder.img_size, math.prod(method.encoder.grid_size)
    kept = round(tokens * (1 - MASK_RATIO))
    volume, masking = torch.rand(1, 1, *size, device=device), random_masking(torch.rand(1, tokens, device=device), kept)

    def step(model: MiM, dtype: torch.dtype | None = None) -> Tensor:
        return backward(model, lambda: model.reconstruct(volume, masking)[0], dtype)

    check_same(step(method), step(reference))
    return compare(
        f"MiM {name}, one volume of {size[0]}^3, {kept} of {tokens} tokens, forward and backward",
        partial(step, method, autocast_dtype("auto", device)),
        partial(step, reference, autocast_dtype("auto", device)),
        against="straightforward form of its network",
        device=device,
        dtype=autocast_dtype("auto", device),
        rounds=rounds,
        aim=2.0,
        memory_aim=1 / 3,
        note=f"memory {GRADIENTS}",
    )


def measure_levels(build: Callable[..., MiM], name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Compare the step over all levels in parts with that over all volumes at once."""
    method = build().to(device)
    reference = straightforward(method).to(device)
    batch = volumes_of(method, device)
    check_same(in_parts(method, batch), at_once(reference, batch))
    return compare(
        f"MiM {name}, all levels of one volume of {batch['image'].shape[-1]}^3",
        partial(in_parts, method, batch, autocast_dtype("auto", device)),
        partial(at_once, reference, batch, autocast_dtype("auto", device)),
        against="straightforward form, all 21 volumes at once",
        device=device,
        dtype=autocast_dtype("auto", device),
        rounds=rounds,
        aim=2.0,
        memory_aim=1 / 5,
        note=f"memory {GRADIENTS}",
    )


def measure_half_down(build: Callable[..., MiM], name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Compare the step with down volumes of half the size with that of the full recipe."""
    method, full = build(half_down=True).to(device), build().to(device)
    batch = volumes_of(method, device)
    return compare(
        f"MiM {name}, all levels of one volume of {batch['image'].shape[-1]}^3, --half_down",
        partial(in_parts, method, batch, autocast_dtype("auto", device)),
        partial(in_parts, full, batch, autocast_dtype("auto", device)),
        against="the full recipe",
        device=device,
        dtype=autocast_dtype("auto", device),
        rounds=rounds,
        note=f"another recipe, not the same result; memory {GRADIENTS}",
    )


# ---------------------------------------------------------------- steps


def volumes_of(method: MiM, device: torch.device) -> dict[str, Tensor]:
    """Return a batch of one volume of noise."""
    size = [method.group * n for n in method.encoder.img_size]
    return {"image": torch.rand(1, 1, *size, device=device), "key": torch.zeros(1, dtype=torch.long, device=device)}


def in_parts(model: MiM, batch: dict[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Run the forward and backward pass of each part, as training does. Return the sum of all losses."""
    losses = [lambda part=part: sum(model(batch, part=part).values()) for part in range(model.num_parts)]
    return sum(backward(model, loss, dtype, keep=part > 0) for part, loss in enumerate(losses))


def at_once(model: MiM, batch: dict[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Run forward and backward pass over all volumes in one graph. Return the sum of all losses."""
    return backward(model, lambda: sum(model(batch).values()), dtype)


def backward(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype | None, keep: bool = False) -> Tensor:
    """Add the gradients of a loss to those of the model, which are first set to 0 unless `keep`. Return the loss.

    `dtype` is that of autocast, None for float32.
    """
    if not keep:
        # not to None: so that the memory of gradients exists before a step
        model.zero_grad(set_to_none=False)
    with autocast(next(model.parameters()).device, dtype):
        value = loss()
    value.backward()
    return value.detach()


def check_same(ours: Tensor, theirs: Tensor) -> None:
    """Check that both forms have the same loss. tests/benchmarks/test_mim_reference.py compares their gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
