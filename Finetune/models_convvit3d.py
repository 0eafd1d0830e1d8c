"""Hybrid convolution-transformer encoder of MiM, for its pretraining and for segmentation.

    B batch   (D, H, W) voxels   (d, h, w) = (D, H, W)/16 grid   N = d*h*w tokens   K kept tokens   C_1..C_4 widths
    s = 16, 8, 4, 2 voxels per axis of a token, in the volume and in the three convolutional stages

Three convolutional stages at strides 2, 4, 8, then a transformer on the tokens of stride 16:

    pretraining      `encoder(x, ids_keep)` -> (B, K, C_4)
                     the output of stage 4 plus the three convolutional stages on its grid, after the final norm
    `pyramid=True`   `encoder(x, return_layers=(0, 1, 2, 3, 4))` -> feature maps at strides 2, 4, 8, 16, 32
                     blocks with layer scale and relative position bias, a convolution to stride 32, no fusion or norm

Architecture and parameter names are those of the weights released with MiM (arXiv 2404.15580, IEEE TMI 2025), so that
these load. The masked convolutional stages are MCMAE's (arXiv 2205.03892). They are computed at visible voxels alone:
removed ones are zeros to the depthwise convolutions, and all else is pointwise. Needs encoder3d.py, pretrained.py and
depthwise3d.py beside it.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if __package__:
    from . import depthwise3d, encoder3d, pretrained
else:
    # a notebook has Finetune/ itself on its path
    import depthwise3d
    import encoder3d
    import pretrained

# voxels per token: four embeddings of stride 2
STRIDE = 16
# voxels that a depthwise convolution sees on each side
MARGIN = 2
SIZES = {
    "tiny": dict(embed_dims=(12, 24, 48, 96), depths=(2, 2, 2, 11), num_heads=3),
    "base": dict(embed_dims=(48, 96, 192, 384), depths=(2, 2, 2, 11), num_heads=12),
}


# ---------------------------------------------------------------- functions


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """Apply a function of single voxels to (..., C), a part of them at a time, and again in the backward pass.

    What it computes on the way, `width` channels at most, is then neither stored nor larger than a processor's cache.

    Args:
        function: maps (n, C) to (n, C') and draws no random numbers.
    """
    parts = []
    for part in x.flatten(0, -2).split(depthwise3d.blocks_of(x, width)):
        if torch.is_grad_enabled():
            parts.append(checkpoint(function, part, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(function(part))
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y.view(*x.shape[:-1], y.shape[-1])


def to_tokens(x: Tensor) -> Tensor:
    """Return a map (B, C, d, h, w) as tokens (B, N, C) in raster order."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, grid: encoder3d.Grid) -> Tensor:
    """Return tokens (B, N, C) in raster order as a map (B, C, d, h, w)."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def normalize_channels(x: Tensor) -> Tensor:
    """Apply LayerNorm (eps 1e-5) without parameters to the channels of (B, C, d, h, w), as before a decoder."""
    x = x.movedim(1, -1)
    return F.layer_norm(x, x.shape[-1:], eps=1e-5).movedim(-1, 1)


@lru_cache(maxsize=16)
def relative_position_index(grid: encoder3d.Grid) -> Tensor:
    """Return the row of the bias table for each pair of tokens, (N, N).

    Rows are the offsets coord_i - coord_j in raster order, shifted to start at 0.
    """
    axes = (torch.arange(n, device="cpu") for n in grid)
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)  # (3, N)
    offsets = coords[:, :, None] - coords[:, None, :]  # (3, N, N)
    (d, h, w), (_, h_offsets, w_offsets) = grid, _offsets(grid)
    return ((offsets[0] + d - 1) * h_offsets + offsets[1] + h - 1) * w_offsets + offsets[2] + w - 1


def _offsets(grid: encoder3d.Grid) -> encoder3d.Grid:
    return tuple(2 * n - 1 for n in grid)


def resample_bias_table(table: Tensor, source: encoder3d.Grid, target: encoder3d.Grid) -> Tensor:
    """Resample a relative position bias (prod(2n-1), heads) trilinearly from one patch grid to another (our choice).

    The zero offset keeps its bias. The others stretch with the grid, as the position table does.
    """
    if tuple(source) == tuple(target):
        return table
    volume = table.T.reshape(1, -1, *_offsets(source)).float()
    volume = F.interpolate(volume, size=_offsets(target), mode="trilinear", align_corners=False)
    return volume.flatten(2)[0].T.to(table.dtype)


# ---------------------------------------------------------------- layers


class PatchEmbed(nn.Module):
    """Halve every axis: (..., d, h, w, C) -> (..., d/2, h/2, w/2, C'). Tokens do not mix."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__()
        self.proj = nn.Conv3d(in_chans, out_chans, kernel_size=2, stride=2)
        self.norm = nn.LayerNorm(out_chans)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x.flatten(0, -5).movedim(-1, 1)).movedim(1, -1)
        y = recomputed(lambda part: self.act(self.norm(part)), y, y.shape[-1])
        return y.view(*x.shape[:-4], *y.shape[-4:])


class Pointwise(nn.Conv3d):
    """Linear layer on channels-last maps (..., C) with the parameters of a 1x1x1 convolution."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__(in_chans, out_chans, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class ConvBlock(nn.Module):
    """Transformer block with a 5^3 depthwise convolution over the visible voxels in place of attention."""

    def __init__(self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv1 = Pointwise(dim, dim)
        self.attn = nn.Conv3d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = Pointwise(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        mlp = {"fc1": Pointwise(dim, hidden), "act": nn.GELU(), "fc2": Pointwise(hidden, dim)}
        self.mlp = nn.Sequential(OrderedDict(mlp))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Map (B, d, h, w, C) to the same shape, or cubes of visible voxels (B, K, s, s, s, C) with their margins.

        Args:
            rows: of `depthwise3d.margin_rows`. None: all voxels are visible.
        """
        h = recomputed(lambda part: self.conv1(self.norm1(part)), x, x.shape[-1])
        h = depthwise3d.depthwise_conv3d(h.flatten(0, -5), self.attn.weight, self.attn.bias, rows).view_as(x)
        x = x + self.drop_path(self.conv2(h))
        return x + self.drop_path(recomputed(lambda part: self.mlp(self.norm2(part)), x, self.mlp.fc1.out_channels))


class RelativeBlock(Block):
    """timm's block with layer scale and relative position bias, with the names of MiM's segmentation network."""

    def __init__(self, dim: int, num_heads: int, grid: encoder3d.Grid, **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        self.grid = grid
        self.gamma_1 = nn.Parameter(torch.ones(dim))
        self.gamma_2 = nn.Parameter(torch.ones(dim))
        self.attn.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(_offsets(grid)), num_heads))
        self.attn.register_buffer("relative_position_index", relative_position_index(grid).clone())
        # index of the last grid other than `grid`, on the device
        self._other_index: tuple[encoder3d.Grid, Tensor] | None = None

    def forward(self, x: Tensor, grid: encoder3d.Grid, ids_keep: Tensor | None = None) -> Tensor:
        """Map tokens (B, K, C) of the grid (d, h, w) to the same shape; `ids_keep` (B, K) if some were removed."""
        x = x + self.drop_path1(self.gamma_1 * self.attn(self.norm1(x), attn_mask=self.bias(grid, ids_keep)))
        return x + self.drop_path2(self.gamma_2 * self.mlp(self.norm2(x)))

    def bias(self, grid: encoder3d.Grid, ids_keep: Tensor | None) -> Tensor:
        """Return what is added to the attention logits: (1, heads, N, N), or (B, heads, K, K) for kept tokens."""
        table = resample_bias_table(self.attn.relative_position_bias_table, self.grid, grid)
        index = self._index(grid)
        if ids_keep is None:
            return table[index].permute(2, 0, 1).unsqueeze(0)
        pairs = index[ids_keep[:, :, None], ids_keep[:, None, :]]  # (B, K, K)
        return table[pairs].permute(0, 3, 1, 2)

    def _index(self, grid: encoder3d.Grid) -> Tensor:
        """Return the rows of the bias table for a grid. That of another grid is copied to the device once, not in every
        pass, which would wait for it."""
        own = self.attn.relative_position_index
        if grid == self.grid:
            return own
        if self._other_index is None or self._other_index[0] != grid or self._other_index[1].device != own.device:
            self._other_index = grid, relative_position_index(grid).to(own.device)
        return self._other_index[1]


# ---------------------------------------------------------------- model


class ConvViT3D(encoder3d.Encoder3D):
    """Hybrid encoder.

    Inputs of any size that 16 divides are accepted (32 for level 4 of the pyramid): the tables are resampled for them.

    Args:
        img_size: voxels (D, H, W), or one number. Sets the grid of the stored position tables.
        embed_dims, depths: width and number of blocks of the four stages.
        pyramid: build the segmentation variant. Its position table is trained, that of pretraining is fixed, as in the
            authors' code.
        drop_path_rate: stochastic depth, growing linearly from 0 over all blocks.
        stride32_norm: norm of the stride-32 map. The authors' synchronised batch norm is "batch" after
            `nn.SyncBatchNorm.convert_sync_batchnorm`. "instance" is for batches too small for it, and has no running
            statistics to load.

    Raises:
        ValueError: a size is not positive, 16 does not divide `img_size`, or the heads do not divide the last width.
    """

    patch_weight = "patch_embed1.proj.weight"

    def __init__(
        self,
        img_size: int | Sequence[int] = 96,
        in_chans: int = 1,
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        pyramid: bool = False,
        drop_path_rate: float = 0.0,
        stride32_norm: Literal["batch", "instance"] = "batch",
    ):
        super().__init__()
        if len(embed_dims) != 4 or len(depths) != 4 or min(*embed_dims, *depths) < 1:
            found = f"embed_dims {tuple(embed_dims)} and depths {tuple(depths)}"
            raise ValueError(f"found {found}, expected four of each, at least 1")
        encoder3d.check_sizes(embed_dims[3], num_heads)
        self.img_size, self.patch_size = encoder3d.triple(img_size, "img_size"), (STRIDE,) * 3
        self.grid_size = encoder3d.grid_of(self.img_size, self.patch_size)
        self.in_chans, self.pyramid, self.num_heads = in_chans, pyramid, num_heads
        self.embed_dims, self.embed_dim = tuple(embed_dims), embed_dims[3]
        rates = iter([drop_path_rate * index / max(sum(depths) - 1, 1) for index in range(sum(depths))])

        table = encoder3d.get_3d_sincos_pos_embed(self.embed_dim, self.grid_size)
        self.pos_embed = nn.Parameter(table, requires_grad=pyramid)
        self._tables = encoder3d.ResampledTables()
        widths = (in_chans, *embed_dims)
        for stage in (1, 2, 3, 4):
            self.add_module(f"patch_embed{stage}", PatchEmbed(widths[stage - 1], widths[stage]))
        self.patch_embed5 = nn.Linear(self.embed_dim, self.embed_dim)
        for stage in (1, 2, 3):
            blocks = [ConvBlock(widths[stage], mlp_ratio, next(rates)) for _ in range(depths[stage - 1])]
            self.add_module(f"blocks{stage}", nn.ModuleList(blocks))
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        block = partial(RelativeBlock, grid=self.grid_size) if pyramid else Block
        block = partial(block, self.embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
        self.blocks4 = nn.ModuleList(block(drop_path=rate) for rate in rates)
        if pyramid:
            norm = nn.BatchNorm3d if stride32_norm == "batch" else partial(nn.InstanceNorm3d, affine=True)
            width = 2 * self.embed_dim
            self.fpn = nn.Sequential(nn.Conv3d(self.embed_dim, width, kernel_size=2, stride=2), norm(width), nn.GELU())
        else:
            for stage in (1, 2, 3):
                # from the map of the stage to the token grid
                stride = STRIDE >> stage
                fuse = nn.Conv3d(widths[stage], self.embed_dim, kernel_size=stride, stride=stride)
                self.add_module(f"stage{stage}_output_decode", fuse)
            self.norm = norm_layer(self.embed_dim)
        # what a pretraining checkpoint must provide: all but what only the pyramid has
        added = ("gamma_", "relative_position_", "fpn.")
        self.encoder_names = tuple(name for name in self.state_dict() if not any(word in name for word in added))
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier-uniform linear layers and (flattened) patch embeddings, torch's defaults for other convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, PatchEmbed):
                nn.init.xavier_uniform_(module.proj.weight.view(len(module.proj.weight), -1))
                nn.init.zeros_(module.proj.bias)

    # ------------------------------------------------------------ forward

    def forward(
        self, x: Tensor, ids_keep: Tensor | None = None, return_layers: Sequence[int] = ()
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encode a volume (B, in_chans, D, H, W).

        Args:
            ids_keep: (B, K) raster indices of the visible tokens. The others do not change the result. None: all.
            return_layers: feature maps to return, 0 to 4 for strides 2, 4, 8, 16, 32 (4 with `pyramid` only). Not
                together with `ids_keep`, as removed tokens leave holes in the maps.

        Returns:
            Tokens (B, K, C_4) in the order of `ids_keep`, or (B, N, C_4) in raster order: fused and normed, with
            `pyramid` the plain output of the last block. With `return_layers` (tokens, maps), where the maps are in
            the order asked for and normed over their channels.
        """
        if len(return_layers) and ids_keep is not None:
            raise ValueError("found return_layers and ids_keep, expected one of them: masked maps have holes")
        if any(not 0 <= layer <= 3 + self.pyramid for layer in return_layers):
            raise ValueError(f"found return_layers {tuple(return_layers)}, expected 0 to {3 + self.pyramid}")
        if 4 in return_layers and any(size % 32 for size in x.shape[2:]):
            raise ValueError(f"volume {tuple(x.shape[2:])} is not divisible by 32, the stride of feature map 4")
        tokens, maps = self.forward_stages(x, ids_keep)
        fused = tokens if self.pyramid else self.norm(tokens + self._fuse(maps, ids_keep is not None))
        if not len(return_layers):
            return fused
        coarse = to_map(tokens, encoder3d.grid_of(x.shape[2:], self.patch_size))
        layers = [normalize_channels(m) if i in return_layers else m for i, m in enumerate((*maps, coarse))]
        if 4 in return_layers:
            layers.append(normalize_channels(self.fpn(coarse)))
        return fused, [layers[layer] for layer in return_layers]

    def patch_features(self, x: Tensor) -> Tensor:
        """Return the tokens (B, N, C_4) in raster order, as `forward` does without further arguments."""
        return self(x)

    def forward_stages(self, x: Tensor, ids_keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the tokens (B, K, C_4) after the last block, before fusion and norm, and the convolutional stages.

        These are maps (B, C, D, H, W) at strides 2, 4, 8, or with `ids_keep` cubes (B, K, s, s, s, C).
        """
        grid, cubes = self.input_grid(x), None
        if ids_keep is None:
            x = x.movedim(1, -1)
        else:
            # the voxels of the visible tokens alone, (B, K, 16, 16, 16, in_chans)
            x = encoder3d.cut_patches(x, self.patch_size, ids_keep).movedim(2, -1)
            cubes = depthwise3d.neighbour_cubes(ids_keep, grid)
        stages = []
        for stage in (1, 2, 3):
            x = self.get_submodule(f"patch_embed{stage}")(x)  # (B, D/2^stage, ..., C_stage) or (B, K, s, s, s, C_stage)
            rows = None if cubes is None else depthwise3d.margin_rows(cubes, STRIDE >> stage, MARGIN)
            for block in self.get_submodule(f"blocks{stage}"):
                x = self.run_block(block, x, rows)
            stages.append(x.movedim(-1, 1) if cubes is None else x)
        x = self.patch_embed5(self.patch_embed4(x).flatten(1, -2))  # (B, K, C_4)
        pos_embed = self._tables.get("pos_embed", self.pos_embed, self.grid_size, grid, num_prefix_tokens=0)
        x = x + (pos_embed if ids_keep is None else encoder3d.take(pos_embed.expand(len(x), -1, -1), ids_keep))
        for block in self.blocks4:
            x = self.run_block(block, x, *((grid, ids_keep) if self.pyramid else ()))
        return x, stages

    def _fuse(self, stages: list[Tensor], masked: bool) -> Tensor:
        """Return the sum of the three convolutional stages on the token grid: (B, K, C_4)."""
        decodes = (self.stage1_output_decode, self.stage2_output_decode, self.stage3_output_decode)
        if not masked:
            return to_tokens(sum(decode(x) for decode, x in zip(decodes, stages)))
        # a cube is as large as the kernel; for that case a linear layer is ten times as fast on a CPU (measured)
        cubes = [x.movedim(-1, 2).flatten(2) for x in stages]  # (B, K, C*s^3)
        return sum(F.linear(x, decode.weight.flatten(1), decode.bias) for decode, x in zip(decodes, cubes))

    # ------------------------------------------------------------ for training

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return patterns that order the parameters by depth, for timm's layer-wise learning-rate decay."""
        depths = {}
        for stage in range(1, 5):
            more = r"|^patch_embed5|^pos_embed" if stage == 4 else ""
            depths |= {f"embed{stage}": rf"^patch_embed{stage}{more}", f"stage{stage}": rf"^blocks{stage}\.(\d+)"}
        return depths | {"last": r"^norm|^fpn|^stage\d_output_decode"}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, besides biases and norms."""
        tables = (name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table"))
        return {"pos_embed", *tables}

    # ------------------------------------------------------------ loading

    def load_pretrained_checkpoint(
        self, path: str | os.PathLike, encoder_only: bool = True, *args, **kwargs
    ) -> tuple[list[str], list[str]]:
        """Load pretrained weights as `Encoder3D.load_pretrained_checkpoint` does, and print a short report.

        A pretraining checkpoint provides the body (235 tensors of base). Tensors that only the pyramid has are then
        missing keys, decoder and alignment heads unexpected ones. A fine-tuned checkpoint provides all.

        Args:
            encoder_only: accepted so that both encoders have the same call. This one has nothing but an encoder.
            bias_table: "resample" a fine-tuned relative position bias of another grid, or "drop" it.
        """
        return super().load_pretrained_checkpoint(path, False, *args, **kwargs)

    def adapt_tables(
        self,
        state: pretrained.State,
        grid: Sequence[int] | None,
        path: object,
        bias_table: Literal["resample", "drop"] = "resample",
    ) -> pretrained.State:
        """Return a copy of the tensors of a file, with its relative position bias resampled or dropped."""
        adapted = dict(state)
        for name in [name for name in state if name.endswith("relative_position_bias_table")]:
            source = self._bias_grid(len(state[name]), grid, path)
            if source != self.grid_size:
                adapted.pop(name.replace("bias_table", "index"), None)
                table = adapted.pop(name)
                if bias_table == "resample":
                    adapted[name] = resample_bias_table(table, source, self.grid_size)
        return adapted

    def _bias_grid(self, rows: int, source_grid: Sequence[int] | None, where: object) -> encoder3d.Grid:
        """Return the token grid of a bias table with `rows` rows: the one given, else this model's, else a cube."""
        cube = ((round(rows ** (1 / 3)) + 1) // 2,) * 3
        for grid in [encoder3d.triple(source_grid, "source_grid")] if source_grid else [self.grid_size, cube]:
            if math.prod(_offsets(grid)) == rows:
                return grid
        raise ValueError(f"{where}: relative position bias: found {rows} rows, of no grid; pass source_grid=(d, h, w)")


# ---------------------------------------------------------------- factories


def convvit3d_tiny_patch16(**kwargs) -> ConvViT3D:
    """Return the tiny encoder: a quarter of the width of base. Takes all keyword arguments of `ConvViT3D`."""
    return ConvViT3D(**(SIZES["tiny"] | kwargs))


def convvit3d_base_patch16(**kwargs) -> ConvViT3D:
    """Return MiM's encoder: widths 48, 96, 192, 384, 12 heads."""
    return ConvViT3D(**(SIZES["base"] | kwargs))
