"""Plain 3D masked autoencoder (He et al., CVPR 2022, in three dimensions): the baseline, and the reconstruction half of
GL-MAE.

B volumes   q views of each   M = q*B, view-major   N patches   K kept   C width   P voxels of a patch (times channels)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.config import setting
from common.training.method import Batch, Method, Reconstruction
from Finetune.encoder3d import grid_of
from Finetune.models_3dvit import VisionTransformer3D
from Pretrain.losses import masked_mse, norm_pix, patchify
from Pretrain.masking import checked_ratio, content_patches, derive, num_keep, random_masking, uniform


@dataclass(kw_only=True)
class ViTSettings:
    """Settings of the ViT and of its local views, for MAE and GL-MAE."""

    embed_dim: int | None = setting(None, "width of the ViT; none: that of the model", least=1, most=65536)
    depth: int | None = setting(None, "blocks of the ViT; none: that of the model", least=1, most=1024)
    mask_ratio_local: float = setting(0.6, "share of patches removed from local views", least=0, below=1)


class Visible(NamedTuple):
    """A batch of views after masking and encoding."""

    # (M, 1+K, C), after the final norm
    tokens: Tensor
    # (M, N)
    ids_restore: Tensor
    # (M, N), 1 = removed (and with content)
    mask: Tensor


def view_major(views: Tensor) -> Tensor:
    """Flatten (B, q, ...) to (q*B, ...), the first views of all volumes first."""
    return views.transpose(0, 1).flatten(0, 1)


def view_keys(keys: Tensor, count: int, kind: int) -> Tensor:
    """Return one key per view from one per volume: (B,) -> (count*B,), view-major. `kind`: 1 global, 0 local views."""
    return torch.cat([derive(keys, 2 * view + kind) for view in range(count)])


def view_content(batch: Batch, kind: str, patch_size: Sequence[int]) -> Tensor | None:
    """Return which patches of the views of a kind are not only padding, (M, N) bool; None without `ignore_padding`."""
    content = batch.get(f"{kind}_content")  # (B, q, 3, 2)
    if content is None:
        return None
    return content_patches(view_major(content), patch_size, grid_of(batch[kind].shape[3:], patch_size))


def encode_visible(
    vit: VisionTransformer3D, x: Tensor, keys: Tensor, mask_ratio: float, content: Tensor | None = None
) -> Visible:
    """Encode the patches of x (M, C, D, H, W) that remain visible under random masks, drawn from keys (M,).

    Args:
        content: from `view_content`. The number of visible patches does not depend on it, so that views can be stacked.
    """
    num_patches = math.prod(grid_of(x.shape[2:], vit.patch_size))
    noise = uniform(keys, num_patches)  # (M, N)
    ids_keep, ids_restore, mask = random_masking(noise, num_keep(num_patches, mask_ratio), content)
    return Visible(vit(x, ids_keep=ids_keep), ids_restore, mask)


def reconstruct(
    vit: VisionTransformer3D, x: Tensor, visible: Visible, norm_pix_loss: bool, norm_pix_eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Decode all patches, and return the loss over the removed ones (scalar) and the prediction (M, N, P)."""
    prediction = vit.forward_decoder(visible.tokens, visible.ids_restore, grid_of(x.shape[2:], vit.patch_size))
    target = patchify(x, vit.patch_size)
    target = norm_pix(target, norm_pix_eps) if norm_pix_loss else target
    return masked_mse(prediction, target, visible.mask), prediction


class MAE(Method):
    """Plain MAE. It reads `batch["local"]` (B, q, C, D, H, W) in [0, 1] and `batch["key"]` (B,), the seeds of masks.

    Where padding is ignored it also reads `batch["local_content"]` (B, q, 3, 2), the box of each view without padding.

    Args:
        encoder: a ViT with its decoder (`encoder_only=False`).
        mask_ratio: share of removed patches, 0 <= ratio < 1.
        norm_pix_loss: normalise the target of each patch.
        norm_pix_eps: added to its variance.
    """

    def __init__(
        self,
        encoder: VisionTransformer3D,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        norm_pix_eps: float = 1e-6,
    ):
        super().__init__()
        self.encoder, self.mask_ratio = encoder, checked_ratio(mask_ratio)
        self.norm_pix_loss, self.norm_pix_eps = norm_pix_loss, norm_pix_eps

    def forward(self, batch: Batch, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        loss, _ = self._forward_views(batch)
        return {"rec_local": loss}

    def _forward_views(self, batch: Batch) -> tuple[Tensor, Reconstruction]:
        views = batch["local"]
        x, keys = view_major(views), view_keys(batch["key"], views.shape[1], kind=0)
        content = view_content(batch, "local", self.encoder.patch_size)
        visible = encode_visible(self.encoder, x, keys, self.mask_ratio, content)
        loss, prediction = reconstruct(self.encoder, x, visible, self.norm_pix_loss, self.norm_pix_eps)
        return loss, Reconstruction(x, visible.mask, prediction)

    @property
    def grad_norm_parameter(self) -> nn.Parameter:
        return self.encoder.norm.weight

    def reconstructions(self, batch: Batch) -> dict[str, Reconstruction]:
        return {"local": self._forward_views(batch)[1]}

    def checkpoint_state(self) -> dict[str, Any]:
        return {"model": self.encoder.state_dict()}

    def load_checkpoint_state(self, content: dict[str, Any]) -> None:
        self.encoder.load_state_dict(content["model"])
