"""Plain 3D masked autoencoder (He et al., CVPR 2022, in three dimensions): the baseline, and the reconstruction half of
GL-MAE.

B volumes   q views of each   M = q*B, view-major   N patches   K kept   C width   P voxels of a patch (times channels)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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
    decoder: Literal["self", "cross"] = setting(
        "self", "self: attention among all tokens (MAE); cross: of removed patches to visible ones (CrossMAE), cheaper"
    )
    decode_fraction: float = setting(
        1.0, "share of the removed patches decoded in training; less than 1 with --decoder cross only", above=0, most=1
    )


def checked_fraction(decode_fraction: float, vit: VisionTransformer3D) -> float:
    """Return the fraction. ValueError unless 0 < fraction <= 1, and 1 for a decoder with self-attention.

    With self-attention the patches that are not decoded would be missing among the keys, so training and evaluation
    would differ.
    """
    if not 0.0 < decode_fraction <= 1.0:
        raise ValueError(f"decode_fraction {decode_fraction}: must be more than 0 and at most 1")
    if decode_fraction < 1.0 and vit.decoder != "cross":
        raise ValueError(f"decode_fraction {decode_fraction}: must be 1 unless the decoder is `cross`")
    return decode_fraction


class Visible(NamedTuple):
    """A batch of views after masking and encoding."""

    # (M, 1+K, C), after the final norm
    tokens: Tensor
    # (M, N-K), in random order; those without content come last
    ids_removed: Tensor
    # (M, K)
    ids_keep: Tensor
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
    masking = random_masking(noise, num_keep(num_patches, mask_ratio), content)
    return Visible(vit(x, ids_keep=masking.ids_keep), masking.ids_removed, masking.ids_keep, masking.mask)


def reconstruct(
    vit: VisionTransformer3D,
    x: Tensor,
    visible: Visible,
    norm_pix_loss: bool,
    norm_pix_eps: float = 1e-6,
    decode_fraction: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Decode removed patches, and return the loss over them (scalar) and the predictions (M, R, P).

    Args:
        decode_fraction: share of the removed patches that is decoded, in the order of `visible.ids_removed`.
    """
    removed = visible.ids_removed.shape[1]
    ids = visible.ids_removed[:, : math.ceil(removed * decode_fraction - 1e-6)]  # (M, R)
    grid = grid_of(x.shape[2:], vit.patch_size)
    prediction = vit.forward_decoder(visible.tokens, visible.ids_keep, ids, grid)
    target = patchify(x, vit.patch_size, ids)
    target = norm_pix(target, norm_pix_eps) if norm_pix_loss else target
    return masked_mse(prediction, target, visible.mask.gather(1, ids)), prediction


def complete_reconstruction(vit: VisionTransformer3D, x: Tensor, visible: Visible) -> Reconstruction:
    """Return the predictions (M, N, P) for views x (M, C, D, H, W): of removed patches, and 0 for visible ones."""
    grid = grid_of(x.shape[2:], vit.patch_size)
    prediction = vit.forward_decoder(visible.tokens, visible.ids_keep, visible.ids_removed, grid)
    places = visible.ids_removed.unsqueeze(-1).expand_as(prediction)
    everywhere = prediction.new_zeros(*visible.mask.shape, prediction.shape[-1])  # (M, N, P)
    return Reconstruction(x, visible.mask, everywhere.scatter(1, places, prediction))


class MAE(Method):
    """Plain MAE. It reads `batch["local"]` (B, q, C, D, H, W) in [0, 1] and `batch["key"]` (B,), the seeds of masks.

    Where padding is ignored it also reads `batch["local_content"]` (B, q, 3, 2), the box of each view without padding.

    Args:
        encoder: a ViT with its decoder (`encoder_only=False`).
        mask_ratio: share of removed patches, 0 <= ratio < 1.
        norm_pix_loss: normalise the target of each patch.
        norm_pix_eps: added to its variance.
        decode_fraction: share of the removed patches that is decoded in training; all are in evaluation.
    """

    def __init__(
        self,
        encoder: VisionTransformer3D,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        norm_pix_eps: float = 1e-6,
        decode_fraction: float = 1.0,
    ):
        super().__init__()
        self.encoder, self.mask_ratio = encoder, checked_ratio(mask_ratio)
        self.norm_pix_loss, self.norm_pix_eps = norm_pix_loss, norm_pix_eps
        self.decode_fraction = checked_fraction(decode_fraction, encoder)

    def forward(self, batch: Batch, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        fraction = self.decode_fraction if self.training else 1.0
        x, visible = self._masked_views(batch)
        loss, _ = reconstruct(self.encoder, x, visible, self.norm_pix_loss, self.norm_pix_eps, fraction)
        return {"rec_local": loss}

    def _masked_views(self, batch: Batch) -> tuple[Tensor, Visible]:
        views = batch["local"]
        x, keys = view_major(views), view_keys(batch["key"], views.shape[1], kind=0)
        content = view_content(batch, "local", self.encoder.patch_size)
        return x, encode_visible(self.encoder, x, keys, self.mask_ratio, content)

    @property
    def grad_norm_parameter(self) -> nn.Parameter:
        return self.encoder.norm.weight

    def reconstructions(self, batch: Batch) -> dict[str, Reconstruction]:
        return {"local": complete_reconstruction(self.encoder, *self._masked_views(batch))}

    def checkpoint_state(self) -> dict[str, Any]:
        return {"model": self.encoder.state_dict()}

    def load_checkpoint_state(self, content: dict[str, Any]) -> None:
        self.encoder.load_state_dict(content["model"])
