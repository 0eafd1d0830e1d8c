"""MiM's network in its straightforward form: maps of all voxels, masks multiplied in, predictions of all tokens.

    M volumes   T = d*h*w tokens   K visible tokens   C_1..C_4 widths

The equations are those of Finetune/models_convvit3d.py and Pretrain/models_mim.py, and so are the names of the
parameters: `load_state_dict` takes the state of a `MiM`. Made of `nn.Conv3d`, `nn.LayerNorm` and timm's blocks only.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from Finetune.encoder3d import Grid, grid_of, take
from Pretrain.losses import masked_mse, norm_pix, patchify
from Pretrain.masking import Masking
from Pretrain.models_mim import MiM

norm_layer = partial(nn.LayerNorm, eps=1e-6)


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (M, C, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class ReferenceEmbed(nn.Module):
    """(M, C, D, H, W) -> (M, C', D/2, H/2, W/2)."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__()
        self.proj = nn.Conv3d(in_chans, out_chans, 2, stride=2)
        self.norm = MapNorm(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.proj(x)))


class ReferenceConvBlock(nn.Module):
    """The convolutional block on a map (M, C, D, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1 = MapNorm(dim)
        self.conv1 = nn.Conv3d(dim, dim, 1)
        self.attn = nn.Conv3d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = nn.Conv3d(dim, dim, 1)
        self.norm2 = MapNorm(dim)
        self.mlp = nn.Sequential()
        self.mlp.fc1 = nn.Conv3d(dim, 4 * dim, 1)
        self.mlp.act = nn.GELU()
        self.mlp.fc2 = nn.Conv3d(4 * dim, dim, 1)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = x + self.conv2(self.attn(visible * self.conv1(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class ReferenceEncoder(nn.Module):
    """Volumes (M, C, D, H, W) and visible tokens (M, K) -> (M, K, C_4)."""

    def __init__(self, img_size: Grid, in_chans: int, widths: Sequence[int], depths: Sequence[int], num_heads: int):
        super().__init__()
        self.img_size, self.patch_size, self.in_chans, self.embed_dim = img_size, (16,) * 3, in_chans, widths[3]
        self.grid_size, chans = grid_of(img_size, self.patch_size), [in_chans, *widths]
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid_size), widths[3]), requires_grad=False)
        for stage in (1, 2, 3, 4):
            self.add_module(f"patch_embed{stage}", ReferenceEmbed(chans[stage - 1], chans[stage]))
        for stage in (1, 2, 3):
            blocks = [ReferenceConvBlock(chans[stage]) for _ in range(depths[stage - 1])]
            self.add_module(f"blocks{stage}", nn.ModuleList(blocks))
            side = 16 >> stage
            self.add_module(f"stage{stage}_output_decode", nn.Conv3d(chans[stage], widths[3], side, stride=side))
        self.patch_embed5 = nn.Linear(widths[3], widths[3])
        block = partial(Block, widths[3], num_heads, qkv_bias=True, norm_layer=norm_layer)
        self.blocks4 = nn.ModuleList(block() for _ in range(depths[3]))
        self.norm = norm_layer(widths[3])

    def forward(self, x: Tensor, ids_keep: Tensor) -> Tensor:
        mask = x.new_zeros(len(x), math.prod(self.grid_size)).scatter_(1, ids_keep, 1.0).view(-1, 1, *self.grid_size)
        fused = 0
        for stage in (1, 2, 3):
            x = self.get_submodule(f"patch_embed{stage}")(x)
            visible = F.interpolate(mask, size=x.shape[2:], mode="nearest")
            for block in self.get_submodule(f"blocks{stage}"):
                x = block(x, visible)
            fused = fused + self.get_submodule(f"stage{stage}_output_decode")(x).flatten(2).transpose(1, 2)
        x = self.patch_embed5(self.patch_embed4(x).flatten(2).transpose(1, 2)) + self.pos_embed
        x = take(x, ids_keep)
        for block in self.blocks4:
            x = block(x)
        return self.norm(x + take(fused, ids_keep))


class ReferenceMiM(MiM):
    """`MiM` with this encoder, and with predictions, targets and their normalisation for all tokens."""

    def reconstruct(self, x: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
        feature = self.decoder(self.encoder(x, masking.ids_keep), masking.ids_restore)
        target = norm_pix(patchify(x, self.encoder.patch_size), self.norm_pix_eps)
        return masked_mse(self.decoder.decoder_pred(feature), target, masking.mask), feature


def straightforward(method: MiM, **sizes) -> ReferenceMiM:
    """Return the straightforward form of a `MiM`, with its weights. `sizes` are the other arguments of both."""
    encoder, decoder = method.encoder, method.decoder
    depths = [len(encoder.get_submodule(f"blocks{stage}")) for stage in (1, 2, 3, 4)]
    heads = encoder.blocks4[0].attn.num_heads
    reference = ReferenceMiM(
        ReferenceEncoder(encoder.img_size, encoder.in_chans, encoder.embed_dims, depths, heads),
        decoder_embed_dim=decoder.decoder_pred.in_features,
        decoder_depth=len(decoder.decoder_blocks),
        decoder_num_heads=decoder.decoder_blocks[0].attn.num_heads,
        **sizes,
    )
    reference.load_state_dict(method.state_dict())
    return reference
