"""Steps of MAE and GL-MAE against the forms that one would write down first, and cheaper recipes against the full ones.

A step is the forward and backward pass of one micro-batch under gradient accumulation: the gradients exist, and the
weights are not updated. So peak memory is that of activations and of what passes through.
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
        partial(step, ours, batch),
        lambda: theirs(batch).backward(),
        against="MONAI MaskedAutoEncoderViT (mlp_dim=3072)",
        device=device,
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
        partial(step, ours, batch),
        lambda: sum(theirs(batch).values()).backward(),
        against="timm blocks composed the obvious way",
        device=device,
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
    cross_flags = "--decoder cross --decode_fraction 0.25"
    recipes: list[tuple[str, Callable[[], Any], Callable[[], Any], float | None]] = [
        (f"MAE with {cross_flags}, step", partial(step, cheap_mae, mae_batch), partial(step, mae, mae_batch), 1.6),
        (f"GL-MAE with {cross_flags}, step", partial(step, cheap_glmae, batch), partial(step, glmae, batch), 1.3),
        ("GL-MAE with half the local views, step", partial(step, glmae, fewer), partial(step, glmae, batch), None),
    ]
    return [
        compare(name, ours, theirs, against="its full recipe", device=device, rounds=rounds, aim=aim)
        for name, ours, theirs, aim in recipes
    ]


# ---------------------------------------------------------------- what is measured


def step(method: Method, batch: Batch) -> dict[str, Tensor]:
    """Run the forward and backward pass of every part, as the training loop does, and return the losses."""
    losses: dict[str, Tensor] = {}
    for part in range(method.num_parts):
        reported = method(batch, 0, part)
        of_part = {name: value for name, value in reported.items() if not name.startswith("monitor/")}
        sum(of_part.values()).backward()
        losses |= {name: loss.detach() for name, loss in of_part.items()}
    method.discard_passes()
    return losses


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
