"""Plain 3D masked autoencoder (He et al., CVPR 2022, in three dimensions): the baseline, and the half of GL-MAE that
reconstructs.

B volumes   q views of each   M = q*B, view-major   N patches   K kept   P voxels of a patch (times channels)
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from Finetune.models_3dvit import VisionTransformer3D, grid_of
from Pretrain.losses import masked_mse, norm_pix, patchify
from Pretrain.masking import checked_ratio, derive, num_keep, random_masking, uniform


class Visible(NamedTuple):
    """A volume batch after masking and encoding."""

    tokens: Tensor  # (M, 1+K, C), normed
    ids_restore: Tensor  # (M, N)
    mask: Tensor  # (M, N), 1 = removed


class Reconstructed(NamedTuple):
    """Views and what a method made of them, for pictures."""

    view: Tensor  # (M, C, D, H, W) in [0, 1]
    mask: Tensor  # (M, N), 1 = removed
    prediction: Tensor  # (M, N, P)


def view_major(views: Tensor) -> Tensor:
    """(B, q, C, D, H, W) -> (q*B, C, D, H, W), all first views first."""
    return views.transpose(0, 1).flatten(0, 1)


def view_keys(keys: Tensor, count: int, kind: int) -> Tensor:
    """One key per view from one per sample: (B,) -> (count*B,), view-major. `kind`: 1 global, 0 local views."""
    return torch.cat([derive(keys, 2 * view + kind) for view in range(count)])


def encode_visible(vit: VisionTransformer3D, x: Tensor, keys: Tensor, mask_ratio: float) -> Visible:
    """Encode the patches of x (M, C, D, H, W) that a random mask, drawn from keys (M,), leaves visible."""
    num_patches = math.prod(grid_of(x.shape[2:], vit.patch_size))
    noise = uniform(keys, num_patches)  # (M, N)
    ids_keep, ids_restore, mask = random_masking(noise, num_keep(num_patches, mask_ratio))
    return Visible(vit(x, ids_keep=ids_keep), ids_restore, mask)


def reconstruct(vit: VisionTransformer3D, x: Tensor, visible: Visible, norm_pix_loss: bool) -> tuple[Tensor, Tensor]:
    """Decode all patches, compare the removed ones with the intact x: the loss (scalar), the prediction (M, N, P)."""
    prediction = vit.forward_decoder(visible.tokens, visible.ids_restore, grid_of(x.shape[2:], vit.patch_size))
    target = patchify(x, vit.patch_size)
    return masked_mse(prediction, norm_pix(target) if norm_pix_loss else target, visible.mask), prediction


class MAE(nn.Module):
    """Plain MAE on the local views (B, q, C, D, H, W) of `batch["local"]`, masked by `batch["key"]` (B,).

    Args:
        encoder: a ViT with its decoder (`encoder_only=False`).
        mask_ratio: share of removed patches.
        norm_pix_loss: targets normalised per patch.
    """

    def __init__(self, encoder: VisionTransformer3D, mask_ratio: float = 0.75, norm_pix_loss: bool = True):
        super().__init__()
        self.encoder, self.mask_ratio, self.norm_pix_loss = encoder, checked_ratio(mask_ratio), norm_pix_loss

    def forward(self, batch: dict[str, Tensor], step: int = 0) -> dict[str, Tensor]:
        return {"rec_local": self._pass(batch)[0]}

    def _pass(self, batch: dict[str, Tensor]) -> tuple[Tensor, Reconstructed]:
        views = batch["local"]
        x, keys = view_major(views), view_keys(batch["key"], views.shape[1], kind=0)
        visible = encode_visible(self.encoder, x, keys, self.mask_ratio)
        loss, prediction = reconstruct(self.encoder, x, visible, self.norm_pix_loss)
        return loss, Reconstructed(x, visible.mask, prediction)

    def reconstructions(self, batch: dict[str, Tensor]) -> dict[str, Reconstructed]:
        """For pictures: the views, their masks and what was predicted, under the name of each kind of view."""
        return {"local": self._pass(batch)[1]}

    @property
    def probe(self) -> nn.Parameter:
        return self.encoder.norm.weight

    def checkpoint_state(self) -> dict[str, Any]:
        return {"model": self.encoder.state_dict()}

    def load_checkpoint_state(self, content: dict[str, Any]) -> None:
        self.encoder.load_state_dict(content["model"])
