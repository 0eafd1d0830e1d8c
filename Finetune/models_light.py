"""Light heads: logits from the tokens alone, so that no path leads around the encoder.

B batch   (D, H, W) voxels   (d, h, w) patch grid   N = d*h*w patches   C width   E width of MAE's decoder   K classes

UNETR and MiM's decoder also read the image itself, and can segment with an encoder that has learned nothing.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from Finetune.encoder3d import Grid, grid_of
from Finetune.models_3dvit import VisionTransformer3D


def unfold_channels(x: Tensor, patch: Sequence[int]) -> Tensor:
    """Unfold channels (B, d, h, w, p*q*r*K) into voxels (B, d*p, h*q, w*r, K) for `patch` (p, q, r)."""
    batch, *grid = x.shape[:4]
    x = x.unflatten(-1, (*patch, -1)).permute(0, 1, 4, 2, 5, 3, 6, 7)  # (B, d, p, h, q, w, r, K)
    return x.reshape(batch, *(n * size for n, size in zip(grid, patch)), -1)


class PatchExpand(nn.Module):
    """Linear upsampling: (B, d, h, w, C) -> (B, d*p, h*q, w*r, C') for `stride` (p, q, r).

    The same as a transposed convolution whose kernel is its stride, with a bias of each voxel's own.
    """

    def __init__(self, in_dim: int, out_dim: int, stride: Grid):
        super().__init__()
        self.stride = stride
        self.proj = nn.Linear(in_dim, math.prod(stride) * out_dim)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return unfold_channels(self.proj(x), self.stride)


class MAEDecoder(nn.Module):
    """MAE's encoder and decoder with a new last layer: (B, in_chans, D, H, W) -> logits (B, K, D, H, W).

    The decoder sees all tokens, in the order of pretraining, and no mask token. The new layer predicts the K logits of
    each voxel of a patch where MAE's predicts its intensities (our choice of head).

    Args:
        backbone: a ViT with its decoder. `decoder_pred` is removed from it.
        out_channels: K, including the background.
    """

    def __init__(self, backbone: VisionTransformer3D, out_channels: int):
        super().__init__()
        self.backbone = backbone
        width = backbone.decoder_pred.in_features
        backbone.decoder_pred = nn.Identity()
        backbone.mask_token.requires_grad_(False)
        self.out = PatchExpand(width, out_channels, backbone.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        grid = grid_of(x.shape[2:], self.backbone.patch_size)
        tokens = self.backbone(x, return_features=True)["all_features"]  # (B, 1+N, C)
        in_order = torch.arange(math.prod(grid), device=x.device).expand(len(x), -1)
        features = self.backbone.forward_decoder(tokens, in_order, grid=grid)  # (B, N, E)
        return self.out(features.unflatten(1, grid)).movedim(-1, 1)


def upsampling_strides(patch_size: Sequence[int]) -> list[Grid]:
    """Return the strides from patch to voxel: an axis doubles while its rest is even, then takes what is left."""
    strides, rest = [], tuple(patch_size)
    while max(rest) > 1 or not strides:
        strides.append(tuple(2 if size % 2 == 0 else size for size in rest))
        rest = tuple(size // stride for size, stride in zip(rest, strides[-1]))
    return strides


class LightDecoder(nn.Module):
    """An encoder with a few upsampling layers on its patch features: (B, in_chans, D, H, W) -> logits (B, K, D, H, W).

    Similar to the decoder of Primus (Wald et al., arXiv 2503.01835), written from the paper's description: upsampling
    by 2 with LayerNorm and GELU in between, and no skip connections. Our choice: the width is halved in each step, down
    to K at the least.

    Args:
        backbone: one of the two encoders. Its features after the final norm are used, so the hybrid encoder must be
            that of pretraining, without the pyramid.
        out_channels: K, including the background.
    """

    def __init__(self, backbone: nn.Module, out_channels: int):
        super().__init__()
        self.backbone = backbone
        *strides, last = upsampling_strides(backbone.patch_size)
        layers, width = [], backbone.embed_dim
        for stride in strides:
            half = max(width // 2, out_channels)
            layers += [PatchExpand(width, half, stride), nn.LayerNorm(half), nn.GELU()]
            width = half
        self.decoder = nn.Sequential(*layers, PatchExpand(width, out_channels, last))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone.patch_features(x)  # (B, N, C)
        return self.decoder(tokens.unflatten(1, grid_of(x.shape[2:], self.backbone.patch_size))).movedim(-1, 1)
