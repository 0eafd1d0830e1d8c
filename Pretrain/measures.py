"""Measures of what an encoder and its reconstructions contain, without labels.

M views   N patches   C width   P voxels of a patch (times channels)   R rows

reconstruction   PSNR on removed patches, above that of each patch's mean and that of a prediction from position
                 alone
features         of the patches, after the embedding, each block and the final norm: shares of position, volume
                 and content, participation ratio, growth of the residual stream
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from common.training.method import Reconstruction
from common.training.parallel import eager_blocks
from Finetune.encoder3d import grid_of
from Pretrain.losses import patchify, undo_norm_pix

# views that are encoded at once
VIEWS_AT_ONCE = 8
# tokens of which a participation ratio is computed
MAX_ROWS = 2048


def psnr(mse: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of mean squared errors of any shape, for intensities in [0, 1]."""
    return -10.0 * mse.log10()


def participation_ratio(x: Tensor) -> Tensor:
    """Return the number of directions that rows (R, C) vary in: (sum l)^2 / sum l^2 of the eigenvalues l of their
    covariance. It is C when they vary equally in all, 1 when in one. Of many rows 2,048 are used, evenly spaced."""
    x = x[:: max(1, len(x) // MAX_ROWS)]
    x = x - x.mean(dim=0)
    # the smaller of the two matrices; their eigenvalues are the same
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    return gram.trace().square() / gram.square().sum()


def feature_measures(x: Tensor) -> dict[str, Tensor]:
    """Return measures of the patch features of several views (M, N, C) on the same patch grid, M and N at least 2.

    `power` is the mean square of a channel; after a LayerNorm about 1. `constant`, `position`, `volume` and `content`
    are its shares that all tokens have in common, that depend on the position alone, on the view alone, and on neither
    alone. They add up to 1. They are the unbiased estimates of a two-way random-effects analysis of variance, cut off
    at 0. `participation_ratio` is that of the content.
    """
    x = x.float()
    count, patches = x.shape[:2]
    mean = x.mean(dim=(0, 1))
    x = x - mean
    by_position, by_view = x.mean(dim=0, keepdim=True), x.mean(dim=1, keepdim=True)
    rest = x - by_position - by_view
    content = rest.square().sum() / ((count - 1) * (patches - 1))
    position = (by_position.square().sum() / (patches - 1) - content / count).clamp(min=0)
    volume = (by_view.square().sum() / (count - 1) - content / patches).clamp(min=0)
    noise = position / patches + volume / count + content / (count * patches)
    parts = {
        "constant": (mean.square().sum() - noise).clamp(min=0),
        "position": position,
        "volume": volume,
        "content": content,
    }
    total = sum(parts.values())
    shares = {name: part / total for name, part in parts.items()}
    return {"power": total / x.shape[2], **shares, "participation_ratio": participation_ratio(rest.flatten(0, 1))}


def reconstruction_measures(made: Reconstruction, patch_size: Sequence[int], norm_pix_eps: float | None) -> dict:
    """Return the PSNR on removed patches, and how far it is above that of two predictions that need no encoder.

    `over_mean`: above the mean of each true patch. With normalised targets the prediction is given that mean and the
    standard deviation as well. Otherwise it has to find the mean too, and may stay below.

    `over_position`: above the mean prediction for this position in the other views. It is 0 when predictions do not
    depend on what is visible.

    Args:
        norm_pix_eps: epsilon of the normalised targets; None when targets are not normalised.
    """
    patches, mask = patchify(made.view, patch_size).float(), made.mask.unsqueeze(-1)  # (M, N, P), (M, N, 1)
    prediction = made.prediction.float()
    removed = prediction * mask
    others = mask.sum(dim=0) - mask  # (M, N, 1)
    from_position = (removed.sum(dim=0) - removed) / others.clamp(min=1)
    # predicted in another view too
    paired = mask * (others > 0)

    def error(predicted: Tensor, weight: Tensor) -> Tensor:
        if norm_pix_eps is not None:
            predicted = undo_norm_pix(predicted, patches, norm_pix_eps)
        return ((predicted - patches).square().mean(dim=-1, keepdim=True) * weight).sum() / weight.sum()

    of_mean = (patches.var(dim=-1, correction=0, keepdim=True) * mask).sum() / mask.sum()
    mse = error(prediction, mask)
    return {
        "psnr": psnr(mse),
        "over_mean": psnr(mse) - psnr(of_mean),
        "over_position": psnr(error(prediction, paired)) - psnr(error(from_position, paired)),
    }


@contextmanager
def captured(encoder: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the tokens that enter the first transformer block ("embed"), and those after each block and the norm."""
    blocks = [m for name, m in encoder.named_modules() if isinstance(m, Block) and not name.startswith("decoder")]
    modules = {f"block{index:02}": block for index, block in enumerate(blocks)}
    if "norm" in dict(encoder.named_children()):
        modules["norm"] = encoder.get_submodule("norm")
    found: dict[str, list[Tensor]] = {name: [] for name in ("embed", *modules)}
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: found[name].append(output))
        for name, module in modules.items()
    ]
    handles.append(blocks[0].register_forward_pre_hook(lambda module, inputs: found["embed"].append(inputs[0])))
    try:
        # a compiled block would ignore its hook
        with eager_blocks(True):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def encoder_measures(encoder: nn.Module, views: Tensor) -> dict[str, Tensor]:
    """Return `feature_measures` of complete views (M, C, D, H, W): of their patches, embedded, after each block and
    after the norm; and `growth`, the power of the residual stream after the last block over that of the embedding."""
    patches = math.prod(grid_of(views.shape[2:], encoder.patch_size))
    if len(views) < 2 or patches < 2:
        return {}
    with captured(encoder) as found:
        for part in views.split(VIEWS_AT_ONCE):
            # or a ViT would compute one row of its last block
            encoder(part, return_layers=(0,))
    # without a CLS token
    tokens = {name: torch.cat(parts)[:, -patches:] for name, parts in found.items()}
    tokens = {"patches": patchify(views, encoder.patch_size)} | tokens
    measured = {name: feature_measures(x) for name, x in tokens.items()}
    last = max(name for name in measured if name.startswith("block"))
    growth = measured[last]["power"] / measured["embed"]["power"]
    return {f"{name}/{key}": value for name, of in measured.items() for key, value in of.items()} | {"growth": growth}
