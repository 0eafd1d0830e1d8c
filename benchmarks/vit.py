"""Steps of MAE and GL-MAE against the forms that one would write down first, and cheaper recipes against the full ones.

A step is the forward and backward pass of one micro-batch under gradient accumulation: the gradients exist, and the
weights are not updated. So peak memory is that of activations and of what passes through. Losses are compared in
float32, and steps are measured in the precision of training: bfloat16 on CUDA.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.glmae_reference import ReferenceGLMAE
from benchmarks.harness import compare, threads
from benchmarks.mae_reference import MonaiMAE
from common.training.method import Batch, Method
from common.training.parallel import autocast, autocast_dtype
from Finetune.models_3dvit import vit_base_patch16_3d, vit_tiny_patch16_3d
from Pretrain.models_glmae import GLMAE
from Pretrain.models_mae import MAE

# threads of torch on a CPU
THREADS = 2


def measure(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows of this benchmark. With `quick` the networks are tiny and one round is measured.

    Raises:
        AssertionError: the two sides of a comparison do not compute the same losses.
    """
    rounds = 1 if quick else 3
    with threads(THREADS):
        rows = [mae_row(quick, device, rounds), glmae_row(quick, device, rounds)]
        return rows + cheap_rows(quick, device, rounds)


# ---------------------------------------------------------------- rows


def mae_row(quick: bool, device: torch.device, rounds: int) -> dict[str, Any]:
    ours = MAE(make_vit(quick), mask_ratio=0.75).to(device)
    theirs, batch = MonaiMAE(ours).to(device), make_batch(device, p=0, q=2 if quick else 8)
    torch.testing.assert_close(step(ours, batch)["rec_local"], theirs(batch).detach(), rtol=1e-4, atol=1e-6)
    return compare(
        f"MAE {model_name(quick)}, {batch['local'].shape[1]} views of 96^3, 54 of 216 patches kept, step",
        partial(step, ours, batch, dtype=autocast_dtype("auto", device)),
        partial(their_step, theirs, batch, dtype=autocast_dtype("auto", device)),
        against="MONAI MaskedAutoEncoderViT (mlp_dim=3072)",
        device=device,
        dtype=autocast_dtype("auto", device),
        rounds=rounds,
        aim=1.1,
        memory_aim=0.75,
    )


def glmae_row(quick: bool, device: torch.device, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    ours, batch = GLMAE(make_vit(quick)).to(device), make_batch(device, p=1, q=2)
    theirs = ReferenceGLMAE(ours).to(device)
    losses = step(ours, batch)
    for name, loss in theirs(batch).items():
        torch.testing.assert_close(losses[name], loss.detach(), rtol=1e-4, atol=1e-6)
    return compare(
        f"GL-MAE {model_name(quick)}, 1 view of 160^3 and 2 of 96^3, step",
        partial(step, ours, batch, dtype=autocast_dtype("auto", device)),
        partial(their_step, theirs, batch, dtype=autocast_dtype("auto", device)),
        against="timm blocks composed the obvious way",
        device=device,
        dtype=autocast_dtype("auto", device),
        rounds=rounds,
        aim=1.1,
        memory_aim=0.5,
    )


def cheap_rows(quick: bool, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Compare cheaper recipes with the full ones at the recipes' mask ratio of 0.6. They do not compute the same."""
    cross = partial(make_vit, quick, decoder="cross")
    mae_batch, batch = make_batch(device, p=0, q=2 if quick else 8), make_batch(device, p=1, q=2)
    mae, glmae = MAE(make_vit(quick), mask_ratio=0.6).to(device), GLMAE(make_vit(quick)).to(device)
    cheap_mae = MAE(cross(), mask_ratio=0.6, decode_fraction=0.25).to(device)
    cheap_glmae = GLMAE(cross(), decode_fraction=0.25).to(device)
    fewer = batch | {"local": batch["local"][:, :1]}
    smaller = batch | {"local": batch["local"][..., :64, :64, :64].contiguous()}
    dtype, cross_flags = autocast_dtype("auto", device), "--decoder cross --decode_fraction 0.25"
    measured = partial(step, dtype=dtype)
    recipes: list[tuple[str, Callable[[], Any], Callable[[], Any], float | None]] = [
        (f"MAE with {cross_flags}", partial(measured, cheap_mae, mae_batch), partial(measured, mae, mae_batch), 1.6),
        (f"GL-MAE with {cross_flags}", partial(measured, cheap_glmae, batch), partial(measured, glmae, batch), 1.3),
        ("GL-MAE with half the local views", partial(measured, glmae, fewer), partial(measured, glmae, batch), None),
        ("GL-MAE with local views of 64^3", partial(measured, glmae, smaller), partial(measured, glmae, batch), None),
    ]
    shared = {"against": "its full recipe", "device": device, "dtype": dtype, "rounds": rounds}
    return [compare(f"{name}, step", ours, theirs, aim=aim, **shared) for name, ours, theirs, aim in recipes]


# ---------------------------------------------------------------- what is measured


def step(method: Method, batch: Batch, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Run the forward and backward pass of every part, as the training loop does, and return the losses.

    `dtype` is that of autocast, None for float32.
    """
    losses: dict[str, Tensor] = {}
    for part in range(method.num_parts):
        with autocast(batch["key"].device, dtype):
            reported = method(batch, 0, part)
        of_part = {name: value for name, value in reported.items() if not name.startswith("monitor/")}
        sum(of_part.values()).backward()
        losses |= {name: loss.detach() for name, loss in of_part.items()}
    method.discard_passes()
    return losses


def their_step(reference: torch.nn.Module, batch: Batch, dtype: torch.dtype | None) -> None:
    """Run the forward and backward pass of a reference form, which returns a loss or a mapping of losses."""
    with autocast(batch["key"].device, dtype):
        reported = reference(batch)
    (sum(reported.values()) if isinstance(reported, dict) else reported).backward()


def make_vit(quick: bool, **kwargs: Any) -> torch.nn.Module:
    return (vit_tiny_patch16_3d if quick else vit_base_patch16_3d)(encoder_only=False, **kwargs)


def model_name(quick: bool) -> str:
    return "ViT-Ti" if quick else "ViT-B"


def make_batch(device: torch.device, p: int, q: int) -> Batch:
    """Return random views of one volume: p of 160^3 and q of 96^3."""
    rng = torch.Generator().manual_seed(0)
    sizes = {"global": (p, 160), "local": (q, 96)}
    views = {kind: torch.rand(1, n, 1, size, size, size, generator=rng) for kind, (n, size) in sizes.items() if n}
    return {name: value.to(device) for name, value in (views | {"key": torch.tensor([7])}).items()}
