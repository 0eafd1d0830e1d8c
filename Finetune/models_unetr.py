"""Segmentation heads on the encoders.

    B batch   (D, H, W) voxels   (d, h, w) patch grid   C width   K classes   f feature_size

UNETR (Hatamizadeh et al., 2022) on the ViT and MiM's decoder on the hybrid encoder, built from MONAI's blocks. A head's
parameters have MONAI's names (`encoder1..`, `decoder5..`, `out`); the encoder is `backbone`.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from monai.networks.blocks import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.networks.blocks.dynunet_block import UnetOutBlock
from torch import Tensor, nn

from common.config import shown
from common.errors import InputError
from Finetune.encoder3d import grid_of
from Finetune.models_convvit3d import ConvViT3D, to_map

BLOCK = {"kernel_size": 3, "norm_name": "instance", "res_block": True}
# (in_channels, out_channels) -> block
residual_block = partial(UnetrBasicBlock, 3, stride=1, **BLOCK)
up_block = partial(UnetrUpBlock, 3, upsample_kernel_size=2, **BLOCK)


def num_levels(patch_size: Sequence[int]) -> int:
    """Return the number of doublings between a token and a voxel: 4 for patches of 16.

    Raises:
        InputError: the patch is not a cube whose side is a power of two, 4 at least.
    """
    side = patch_size[0]
    if len(set(patch_size)) != 1 or side < 4 or side & (side - 1):
        raise InputError(f"--patch_size {shown(tuple(patch_size))}: must be 4, 8, 16 or 32 on all axes for UNETR")
    return side.bit_length() - 1


def default_skips(depth: int, patch_size: Sequence[int]) -> tuple[int, ...]:
    """Return evenly spaced blocks, counted from 0, one for each level between voxel and token.

    They are the authors' (3, 6, 9) for 12 blocks and patches of 16.
    """
    levels = num_levels(patch_size)
    return tuple(depth * level // levels for level in range(1, levels))


class UNETR(nn.Module):
    """ViT with the convolutional decoder of UNETR: (B, in_chans, D, H, W) -> logits (B, K, D, H, W).

    Level 1 is the image, the next ones are the hidden states after the blocks `skips` (before the final norm), and the
    bottom is the normed tokens, as in the authors' fine-tuning. With patches of 16 this is MONAI's UNETR. Other powers
    of two have one level more or fewer (our choice).

    Args:
        backbone: a ViT with `forward(x, return_layers) -> (tokens, hidden)`, `patch_size`, `embed_dim`, `blocks`.
        out_channels: K, including the background.
        feature_size: width at full resolution, doubled at each level. MONAI's default is 16, the authors' is 48.
        skips: blocks whose hidden states are used, counted from 0; by default `default_skips`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        in_chans: int,
        out_channels: int,
        feature_size: int = 16,
        skips: Sequence[int] | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.patch_size = tuple(backbone.patch_size)
        self.levels = num_levels(self.patch_size)
        depth, width = len(backbone.blocks), backbone.embed_dim
        self.skips = tuple(default_skips(depth, self.patch_size) if skips is None else skips)
        if len(self.skips) != self.levels - 1 or list(self.skips) != sorted(set(self.skips) & set(range(depth))):
            expected = f"{self.levels - 1} rising block numbers in 0..{depth - 1} for patches of {self.patch_size[0]}"
            raise InputError(f"skips: found {self.skips}, expected {expected}")
        widths = [feature_size * 2**level for level in range(self.levels)]  # f, 2f, 4f, 8f
        self.encoder1 = residual_block(in_chans, widths[0])
        # hidden states, upsampled to 1/2, 1/4, 1/8 of the voxels
        for level in range(1, self.levels):
            doublings = self.levels - 1 - level
            block = UnetrPrUpBlock(
                3, width, widths[level], doublings, stride=1, upsample_kernel_size=2, conv_block=True, **BLOCK
            )
            self.add_module(f"encoder{level + 1}", block)
        for level in range(self.levels, 0, -1):
            below = width if level == self.levels else widths[level]
            self.add_module(f"decoder{level + 1}", up_block(below, widths[level - 1]))
        self.out = UnetOutBlock(spatial_dims=3, in_channels=feature_size, out_channels=out_channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens, hidden = self.backbone(x, return_layers=self.skips)
        grid = grid_of(x.shape[2:], self.patch_size)
        skips = [self.encoder1(x)]  # (B, f, D, H, W)
        for level, state in enumerate(hidden, start=2):
            skips.append(self.get_submodule(f"encoder{level}")(to_volume(state, grid)))
        x = to_volume(tokens, grid)  # (B, C, d, h, w)
        for level in range(self.levels, 0, -1):
            x = self.get_submodule(f"decoder{level + 1}")(x, skips[level - 1])
        return self.out(x)


class ConvViT3DUNETR(nn.Module):
    """MiM's segmentation network: (B, in_chans, D, H, W) -> logits (B, K, D, H, W).

    The hybrid encoder with the convolutional decoder of Swin UNETR (Hatamizadeh et al., 2022) on its pyramid at strides
    2, 4, 8, 16, 32, as in the authors' code: the coarsest map is the bottom, the next one is a skip as it is, the other
    three and the image pass a residual block first.

    Args:
        backbone: a `ConvViT3D` with `pyramid=True`. The decoder has the widths of its stages.
        out_channels: K, including the background.
    """

    def __init__(self, backbone: ConvViT3D, out_channels: int):
        super().__init__()
        if any(size % 32 for size in backbone.img_size):
            raise InputError(f"--roi {shown(backbone.img_size)}: must be multiples of 32 for MiM's network")
        self.backbone = backbone
        c1, c2, c3, c4 = backbone.embed_dims
        # numbered as in the published weights
        self.encoder1 = residual_block(backbone.in_chans, c1)
        self.encoder2 = residual_block(c1, c1)
        self.encoder3 = residual_block(c2, c2)
        self.encoder4 = residual_block(c3, c3)
        self.encoder10 = residual_block(2 * c4, 2 * c4)
        self.decoder5 = up_block(2 * c4, c4)
        self.decoder4 = up_block(c4, c3)
        self.decoder3 = up_block(c3, c2)
        self.decoder2 = up_block(c2, c1)
        self.decoder1 = up_block(c1, c1)
        self.out = UnetOutBlock(spatial_dims=3, in_channels=c1, out_channels=out_channels)

    def forward(self, x: Tensor) -> Tensor:
        _, (h0, h1, h2, h3, h4) = self.backbone(x, return_layers=(0, 1, 2, 3, 4))
        y = self.decoder5(self.encoder10(h4), h3)  # (B, C_4, D/16, H/16, W/16)
        y = self.decoder4(y, self.encoder4(h2))  # (B, C_3, D/8, ...)
        y = self.decoder3(y, self.encoder3(h1))  # (B, C_2, D/4, ...)
        y = self.decoder2(y, self.encoder2(h0))  # (B, C_1, D/2, ...)
        return self.out(self.decoder1(y, self.encoder1(x)))


def convvit3d_unetr(
    img_size: int | Sequence[int] = 96, in_channels: int = 1, out_channels: int = 14, feature_size: int = 48, **kwargs
) -> ConvViT3DUNETR:
    """Return MiM's network with the authors' sizes and stochastic depth up to 0.2.

    Args:
        feature_size: the widths are f, 2f, 4f, 8f, with 32 channels a head. 48 is base, 12 is tiny.
        **kwargs: keyword arguments of `ConvViT3D`.
    """
    if feature_size % 4 and "num_heads" not in kwargs:
        raise InputError(f"--feature_size {feature_size}: must be a multiple of 4 (32 channels a head)")
    widths = [feature_size * n for n in (1, 2, 4, 8)]
    defaults = dict(embed_dims=widths, num_heads=feature_size // 4, drop_path_rate=0.2)
    return ConvViT3DUNETR(ConvViT3D(img_size, in_channels, pyramid=True, **(defaults | kwargs)), out_channels)


class LinearProbe(nn.Module):
    """One linear layer on each patch token, and trilinear upsampling of its K logits (our choice of probe).

    (B, in_chans, D, H, W) -> logits (B, K, D, H, W).

    The logits depend on the normed patch tokens alone: not on the image, the CLS token or hidden states. So the score
    measures what the encoder represents at the resolution of its patch grid.
    """

    def __init__(self, backbone: nn.Module, out_channels: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv3d(backbone.embed_dim, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone.patch_features(x)  # (B, N, C)
        logits = self.head(to_map(tokens, grid_of(x.shape[2:], self.backbone.patch_size)))  # (B, K, d, h, w)
        return F.interpolate(logits, size=x.shape[2:], mode="trilinear", align_corners=False)


def to_volume(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Return tokens (B, [1+]N, C) in raster order as a map (B, C, d, h, w), without a CLS row in front."""
    return to_map(tokens[:, tokens.shape[1] - math.prod(grid) :], grid).contiguous()
