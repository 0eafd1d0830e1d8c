"""Plain 3D masked autoencoder (He et al., CVPR 2022, in three dimensions): the baseline, and the half of GL-MAE that reconstructs.

    B volumes   q views of each   M = q*B, view-major   N patches   K kept   P voxels of a patch (times channels)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from Finetune.models_3dvit import VisionTransformer3D, grid_of
from Pretrain.losses import masked_mse, norm_pix, patchify
from Pretrain.masking import derive, num_keep, random_masking, uniform


class Reconstruction(NamedTuple):
    """What one masked pass gives."""

    tokens: Tensor  # (M, 1+K, C), normed
    loss: Tensor  # scalar, mean over removed patches
    prediction: Tensor  # (M, N, P)
    mask: Tensor  # (M, N), 1 = removed


def view_major(views: Tensor) -> Tensor:
    """(B, q, C, D, H, W) -> (q*B, C, D, H, W), all first views first."""
    return views.transpose(0, 1).flatten(0, 1)


def view_keys(keys: Tensor, count: int, kind: int) -> Tensor:
    """One key per view from one per sample: (B,) -> (count*B,), view-major. `kind` sets global (1) and local (0) views apart."""
    return torch.cat([derive(keys, 2 * view + kind) for view in range(count)])


def masked_autoencode(
    vit: VisionTransformer3D, x: Tensor, keys: Tensor, mask_ratio: float, norm_pix_loss: bool = True
) -> Reconstruction:
    """Encode the visible patches of x (M, C, D, H, W), decode all, and compare the removed ones with the intact volume."""
    grid = grid_of(x.shape[2:], vit.patch_size)
    num_patches = grid[0] * grid[1] * grid[2]
    noise = uniform(keys, num_patches)  # (M, N)
    ids_keep, ids_restore, mask = random_masking(noise, num_keep(num_patches, mask_ratio))
    tokens = vit(x, ids_keep=ids_keep)  # (M, 1+K, C)
    prediction = vit.forward_decoder(tokens, ids_restore, grid)  # (M, N, P)
    target = patchify(x, vit.patch_size)
    loss = masked_mse(prediction, norm_pix(target) if norm_pix_loss else target, mask)
    return Reconstruction(tokens, loss, prediction, mask)


class MAE(nn.Module):
    """Plain MAE on the local views (B, q, C, D, H, W) of `batch["local"]`, masked by `batch["key"]` (B,).

    Args:
        vit: an encoder with its decoder (`encoder_only=False`).
        mask_ratio: share of removed patches.
        norm_pix_loss: targets normalised per patch.
    """

    def __init__(self, vit: VisionTransformer3D, mask_ratio: float = 0.75, norm_pix_loss: bool = True):
        super().__init__()
        self.vit, self.mask_ratio, self.norm_pix_loss = vit, mask_ratio, norm_pix_loss

    def forward(self, batch: dict[str, Tensor], step: int = 0) -> dict[str, Tensor]:
        views = batch["local"]
        keys = view_keys(batch["key"], views.shape[1], kind=0)
        return {"rec_local": self.reconstruct(view_major(views), keys).loss}

    def reconstruct(self, x: Tensor, keys: Tensor) -> Reconstruction:
        return masked_autoencode(self.vit, x, keys, self.mask_ratio, self.norm_pix_loss)

    @property
    def probe(self) -> nn.Parameter:
        return self.vit.norm.weight

    def checkpoint_state(self) -> dict[str, Any]:
        return {"model": self.vit.state_dict()}

    def load_checkpoint_state(self, content: dict[str, Any]) -> None:
        self.vit.load_state_dict(content["model"])
