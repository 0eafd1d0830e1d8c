"""Segmentation heads on the encoders.

    B batch   (D, H, W) voxels   (d, h, w) grid of patches   C width   K classes   f feature_size

UNETR (Hatamizadeh et al., 2022) on the project's ViT and MiM's decoder on its hybrid encoder, from MONAI's own blocks.
Names of a head's parameters are MONAI's (`encoder1..`, `decoder5..`, `out`), the encoder is `backbone`.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from monai.networks.blocks import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.networks.blocks.dynunet_block import UnetOutBlock
from torch import Tensor, nn

from common.errors import InputError
from Finetune.models_convvit3d import ConvViT3D


def num_levels(patch_size: Sequence[int]) -> int:
    """Doublings between a token and a voxel: 4 for patch 16. InputError unless the patch is a cube with a power of two
    as its side."""
    side = patch_size[0]
    if len(set(patch_size)) != 1 or side < 4 or side & (side - 1):
        raise InputError(f"patch_size: found {tuple(patch_size)}, UNETR's head needs a cube of 4, 8, 16 or 32 voxels")
    return side.bit_length() - 1


def default_skips(depth: int, patch_size: Sequence[int]) -> tuple[int, ...]:
    """Evenly spaced blocks, counted from 0, one for each level between voxel and token: (3, 6, 9) for depth 12 and
    patch 16 (authors')."""
    levels = num_levels(patch_size)
    return tuple(depth * level // levels for level in range(1, levels))


class UNETR(nn.Module):
    """A ViT with the convolutional decoder of UNETR: (B, in_chans, D, H, W) -> logits (B, K, D, H, W).

    Level 1 is the image itself, levels 2.. the hidden states after the blocks `skips` (before the final norm), the
    bottom the normed tokens, as in the authors' fine-tuning (spec glmae.md 12b). With patch 16 this is MONAI's UNETR;
    other powers of two have one level more or fewer (our choice).

    Args:
        backbone: a ViT with `forward(x, return_layers) -> (tokens, hidden)`, `patch_size`, `embed_dim`, `blocks`.
        out_channels: K, background included.
        feature_size: width at full resolution; doubles with each level. 16 is MONAI's default, 48 the authors'.
        skips: blocks, counted from 0, whose hidden states are used; None for evenly spaced ones.
    """

    def __init__(
        self,
        backbone: nn.Module,
        in_chans: int,
        out_channels: int,
        feature_size: int = 16,
        skips: Sequence[int] | None = None,
        norm_name: str = "instance",
        conv_block: bool = True,
        res_block: bool = True,
    ):
        super().__init__()
        self.backbone = backbone
        self.patch_size = tuple(backbone.patch_size)
        self.levels = num_levels(self.patch_size)
        depth, width = len(backbone.blocks), backbone.embed_dim
        self.skips = tuple(default_skips(depth, self.patch_size) if skips is None else skips)
        if len(self.skips) != self.levels - 1 or list(self.skips) != sorted(set(self.skips) & set(range(depth))):
            raise InputError(
                f"skips: found {self.skips}, patch {self.patch_size[0]} needs {self.levels - 1} rising "
                f"block numbers in 0..{depth - 1}"
            )
        common = {"spatial_dims": 3, "kernel_size": 3, "norm_name": norm_name, "res_block": res_block}
        widths = [feature_size * 2**level for level in range(self.levels)]  # f, 2f, 4f, 8f
        self.encoder1 = UnetrBasicBlock(in_channels=in_chans, out_channels=widths[0], stride=1, **common)
        for level in range(1, self.levels):  # hidden states, up to 1/2, 1/4, 1/8 of the voxel grid
            block = UnetrPrUpBlock(
                in_channels=width,
                out_channels=widths[level],
                num_layer=self.levels - 1 - level,
                stride=1,
                upsample_kernel_size=2,
                conv_block=conv_block,
                **common,
            )
            self.add_module(f"encoder{level + 1}", block)
        for level in range(self.levels, 0, -1):
            below = width if level == self.levels else widths[level]
            block = UnetrUpBlock(in_channels=below, out_channels=widths[level - 1], upsample_kernel_size=2, **common)
            self.add_module(f"decoder{level + 1}", block)
        self.out = UnetOutBlock(spatial_dims=3, in_channels=feature_size, out_channels=out_channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens, hidden = self.backbone(x, return_layers=self.skips)
        grid = tuple(s // p for s, p in zip(x.shape[2:], self.patch_size))
        skips = [self.encoder1(x)]  # (B, f, D, H, W)
        for level, state in enumerate(hidden, start=2):
            skips.append(getattr(self, f"encoder{level}")(to_volume(state, grid)))
        x = to_volume(tokens, grid)  # (B, C, d, h, w)
        for level in range(self.levels, 0, -1):
            x = getattr(self, f"decoder{level + 1}")(x, skips[level - 1])
        return self.out(x)


class ConvViT3DUNETR(nn.Module):
    """MiM's segmentation network: the hybrid encoder with the convolutional decoder of Swin UNETR (Hatamizadeh et al.,
    2022): (B, in_chans, D, H, W) -> logits (B, K, D, H, W).

    From the encoder's pyramid at strides 2, 4, 8, 16, 32 (spec mim.md 9.1, the authors' code): the coarsest is the
    bottom, the next is a skip as it is, the other three and the image pass a residual block first.

    Args:
        backbone: a `ConvViT3D` with `pyramid=True`, of any stage widths; the decoder has the same ones.
        out_channels: K, background included.
    """

    def __init__(self, backbone: ConvViT3D, out_channels: int, norm_name: str = "instance"):
        super().__init__()
        if any(size % 32 for size in backbone.img_size):
            raise InputError(f"roi: found {backbone.img_size}, MiM's network needs multiples of 32 voxels")
        self.backbone = backbone
        widths = list(backbone.embed_dims)  # at strides 2, 4, 8, 16
        common = {"spatial_dims": 3, "kernel_size": 3, "norm_name": norm_name, "res_block": True}
        basic = {"encoder1": (backbone.in_chans, widths[0])}  # names are those of the published weights
        basic |= {f"encoder{level + 2}": (width, width) for level, width in enumerate(widths[:3])}
        basic |= {"encoder10": (2 * widths[3], 2 * widths[3])}
        for name, (below, width) in basic.items():
            self.add_module(name, UnetrBasicBlock(in_channels=below, out_channels=width, stride=1, **common))
        coarse_to_fine = [2 * widths[3], *reversed(widths), widths[0]]
        for level, (below, width) in zip((5, 4, 3, 2, 1), zip(coarse_to_fine, coarse_to_fine[1:])):
            block = UnetrUpBlock(in_channels=below, out_channels=width, upsample_kernel_size=2, **common)
            self.add_module(f"decoder{level}", block)
        self.out = UnetOutBlock(spatial_dims=3, in_channels=widths[0], out_channels=out_channels)

    def forward(self, x: Tensor) -> Tensor:
        _, (h0, h1, h2, h3, h4) = self.backbone(x, return_layers=(0, 1, 2, 3, 4))
        y = self.decoder5(self.encoder10(h4), h3)  # (B, C_4, D/16, H/16, W/16)
        y = self.decoder4(y, self.encoder4(h2))  # (B, C_3, D/8, ...)
        y = self.decoder3(y, self.encoder3(h1))  # (B, C_2, D/4, ...)
        y = self.decoder2(y, self.encoder2(h0))  # (B, C_1, D/2, ...)
        return self.out(self.decoder1(y, self.encoder1(x)))


def convvit3d_unetr(
    img_size: int | Sequence[int] = 96,
    in_channels: int = 1,
    out_channels: int = 14,
    feature_size: int = 48,
    **kwargs,
) -> ConvViT3DUNETR:
    """MiM's network of the authors' sizes. `feature_size` sets all widths (f, 2f, 4f, 8f; 48 is base, 12 tiny) and, at
    32 channels a head, the heads. Stochastic depth up to 0.2 as theirs. Other keyword arguments are those of
    `ConvViT3D`."""
    if feature_size % 4 and "num_heads" not in kwargs:
        raise InputError(f"feature_size: found {feature_size}, needs a multiple of 4 (32 channels a head)")
    defaults = dict(
        embed_dims=[feature_size * n for n in (1, 2, 4, 8)], num_heads=feature_size // 4, drop_path_rate=0.2
    )
    backbone = ConvViT3D(img_size, in_channels, pyramid=True, **dict(defaults, **kwargs))
    return ConvViT3DUNETR(backbone, out_channels)


class LinearProbe(nn.Module):
    """One linear layer per patch token, its K logits upsampled trilinearly: how much of the answer an encoder already
    holds (our choice of probe: the grid of patches is its resolution, nothing is learned between tokens)."""

    def __init__(self, backbone: nn.Module, out_channels: int):
        super().__init__()
        self.backbone = backbone
        self.patch_size = tuple(backbone.patch_size)
        self.head = nn.Conv3d(backbone.embed_dim, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens, _ = self.backbone(x, return_layers=(len(self.backbone.blocks) - 1,))
        grid = tuple(s // p for s, p in zip(x.shape[2:], self.patch_size))
        logits = self.head(to_volume(tokens, grid))  # (B, K, d, h, w)
        return F.interpolate(logits, size=x.shape[2:], mode="trilinear", align_corners=False)


def to_volume(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens (B, [1+]N, C) in raster order of the grid -> (B, C, d, h, w); a CLS row in front is left out."""
    patches = tokens[:, tokens.shape[1] - math.prod(grid) :]
    return patches.transpose(1, 2).reshape(len(tokens), -1, *grid).contiguous()
