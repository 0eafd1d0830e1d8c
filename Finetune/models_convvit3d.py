"""Hybrid convolution-transformer encoder of MiM: one class for its pretraining and for the segmentation head.

    B batch   (D, H, W) voxels   (d, h, w) = (D, H, W)/16 grid   N = d*h*w tokens   K kept tokens   C_1..C_4 widths

Three convolutional stages at strides 2, 4, 8, then a transformer on the tokens of stride 16. One body, two ends:

    pretraining      `encoder(x, ids_keep)` -> (B, K, C_4)
                     the output of stage 4 + the three conv stages brought to its grid, then the final norm
    `pyramid=True`   `encoder(x, return_layers=(0, 1, 2, 3, 4))` -> feature maps at strides 2, 4, 8, 16, 32
                     blocks with layer scale and relative position bias, a convolution to stride 32, no fusion or norm

Architecture and parameter names: those of the weights released with MiM (arXiv 2404.15580, IEEE TMI 2025), so that they
load. The masked convolution stages are MCMAE's (arXiv 2205.03892). Loading and position tables: models_3dvit.py.
"""

import math
import os
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if __package__:
    from . import models_3dvit as vit
else:  # a notebook with Finetune/ on the path
    import models_3dvit as vit

STRIDE = 16  # voxels per token: four embeddings of stride 2


# ---------------------------------------------------------------- functions


def visible_mask(ids_keep: Tensor, grid: vit.Grid) -> Tensor:
    """Kept tokens (B, K) as a mask (B, 1, d, h, w): 1 is kept, 0 is removed."""
    mask = torch.zeros(len(ids_keep), math.prod(grid), device=ids_keep.device)
    return mask.scatter_(1, ids_keep, 1.0).view(-1, 1, *grid)


def to_tokens(x: Tensor) -> Tensor:
    """A map (B, C, d, h, w) as tokens (B, N, C) in raster order."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, grid: vit.Grid) -> Tensor:
    """Tokens (B, N, C) in raster order as a map (B, C, d, h, w)."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def normalize_channels(x: Tensor) -> Tensor:
    """LayerNorm (eps 1e-5) over the channels of (B, C, d, h, w) without parameters: what a decoder sees of a stage."""
    x = x.movedim(1, -1)
    return F.layer_norm(x, x.shape[-1:], eps=1e-5).movedim(-1, 1)


@lru_cache(maxsize=16)
def relative_position_index(grid: vit.Grid) -> Tensor:
    """Row of the bias table for each pair of tokens (N, N): coord_i - coord_j, shifted to start at 0, in raster."""
    axes = (torch.arange(n, device="cpu") for n in grid)
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)  # (3, N)
    offsets = coords[:, :, None] - coords[:, None, :]  # (3, N, N)
    (d, h, w), (_, h_offsets, w_offsets) = grid, _offsets(grid)
    return ((offsets[0] + d - 1) * h_offsets + offsets[1] + h - 1) * w_offsets + offsets[2] + w - 1


def _offsets(grid: vit.Grid) -> vit.Grid:
    return tuple(2 * n - 1 for n in grid)


def resample_bias_table(table: Tensor, source: vit.Grid, target: vit.Grid) -> Tensor:
    """Relative position bias (prod(2n-1), heads) of the grid `source` at the grid `target`, trilinearly (our choice).

    The zero offset stays the zero offset; the others stretch with the grid, as the position table does.
    """
    if tuple(source) == tuple(target):
        return table
    volume = table.T.reshape(1, -1, *_offsets(source)).float()
    volume = F.interpolate(volume, size=_offsets(target), mode="trilinear", align_corners=False)
    return volume.flatten(2)[0].T.to(table.dtype)


# ---------------------------------------------------------------- layers


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, d, h, w); eps 1e-5 where the transformer's is 1e-6, as trained."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PatchEmbed(nn.Module):
    """Halve every axis: (B, C, d, h, w) -> (B, C', d/2, h/2, w/2). Nothing crosses the border of a token."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__()
        self.proj = nn.Conv3d(in_chans, out_chans, kernel_size=2, stride=2)
        self.norm = ChannelNorm(out_chans)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.proj(x)))


class Pointwise(nn.Conv3d):
    """A 1x1x1 convolution of channels-last maps (B, d, h, w, C): a linear layer with a convolution's parameters."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__(in_chans, out_chans, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class ConvMlp(nn.Module):
    """Two pointwise layers with a GELU between, on channels-last maps."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = Pointwise(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = Pointwise(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ConvBlock(nn.Module):
    """Transformer-shaped block whose token mixer is a 5^3 depthwise convolution over visible voxels alone."""

    def __init__(self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv1 = Pointwise(dim, dim)
        self.attn = nn.Conv3d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = Pointwise(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """x (B, C, d, h, w), visible (B, 1, d, h, w) 1 for kept voxels. All but `attn` is pointwise: nothing leaks.

        Channels last inside, which spares transpositions; the depthwise convolution's backward pass on a CPU is three
        times as fast with its input so laid out (measured).
        """
        x = x.movedim(1, -1)  # (B, d, h, w, C)
        h = self.conv1(self.norm1(x))
        if visible is not None:
            h = h * visible.movedim(1, -1)
        h = self.attn(h.movedim(-1, 1)).movedim(1, -1)
        x = x + self.drop_path(self.conv2(h))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.movedim(-1, 1)


class RelativeBlock(Block):
    """timm's block with layer scale and relative position bias, named as in MiM's segmentation network."""

    def __init__(self, dim: int, num_heads: int, grid: vit.Grid, **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        self.grid = grid
        self.gamma_1 = nn.Parameter(torch.ones(dim))
        self.gamma_2 = nn.Parameter(torch.ones(dim))
        self.attn.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(_offsets(grid)), num_heads))
        self.attn.register_buffer("relative_position_index", relative_position_index(grid).clone())

    def forward(self, x: Tensor, grid: vit.Grid, ids_keep: Tensor | None = None) -> Tensor:
        """Tokens (B, K, C) of the grid (d, h, w), `ids_keep` (B, K) where some were removed."""
        x = x + self.drop_path1(self.gamma_1 * self.attn(self.norm1(x), attn_mask=self.bias(grid, ids_keep)))
        return x + self.drop_path2(self.gamma_2 * self.mlp(self.norm2(x)))

    def bias(self, grid: vit.Grid, ids_keep: Tensor | None) -> Tensor:
        """What is added to the attention logits: (1, heads, N, N), or (B, heads, K, K) of the kept tokens."""
        table = resample_bias_table(self.attn.relative_position_bias_table, self.grid, grid)
        index = self.attn.relative_position_index
        if grid != self.grid:
            index = relative_position_index(grid).to(index.device)
        if ids_keep is None:
            return table[index].permute(2, 0, 1).unsqueeze(0)
        pairs = index[ids_keep[:, :, None], ids_keep[:, None, :]]  # (B, K, K)
        return table[pairs].permute(0, 3, 1, 2)


# ---------------------------------------------------------------- model


class ConvViT3D(nn.Module):
    """The hybrid encoder. Inputs of any size that 16 divides (32 for level 4 of the pyramid); the tables are resampled
    from their grid.

    Args:
        img_size: voxels (D, H, W) or one number; sets the grid of the stored position tables.
        embed_dims, depths: width and number of blocks of the four stages.
        pyramid: the segmentation variant. The position table is fixed for pretraining and trained here, as in the
            authors' code.
        drop_path_rate: stochastic depth, growing linearly from 0 over all blocks.
        stride32_norm: normalisation of the stride-32 map. The authors' synchronised batch norm is "batch" after
            `nn.SyncBatchNorm.convert_sync_batchnorm`; "instance" for batches too small for it (no running statistics to
            load).
    """

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
        if len(embed_dims) != 4 or len(depths) != 4:
            raise ValueError(f"found embed_dims {tuple(embed_dims)} and depths {tuple(depths)}, needs four of each")
        if embed_dims[3] % num_heads:
            raise ValueError(f"width {embed_dims[3]} of the transformer is not divisible by its {num_heads} heads")
        self.img_size, self.patch_size = vit.triple(img_size), (STRIDE,) * 3
        self.grid_size = vit.grid_of(self.img_size, self.patch_size)
        self.in_chans, self.pyramid = in_chans, pyramid
        self.embed_dims, self.embed_dim = tuple(embed_dims), embed_dims[3]
        self.grad_checkpointing = False
        rates = [drop_path_rate * index / max(sum(depths) - 1, 1) for index in range(sum(depths))]
        stages = [rates[sum(depths[:stage]) : sum(depths[: stage + 1])] for stage in range(4)]

        table = vit.get_3d_sincos_pos_embed(self.embed_dim, self.grid_size)
        self.pos_embed = nn.Parameter(table, requires_grad=pyramid)
        widths = (in_chans, *embed_dims)
        for stage in (1, 2, 3, 4):
            self.add_module(f"patch_embed{stage}", PatchEmbed(widths[stage - 1], widths[stage]))
        self.patch_embed5 = nn.Linear(self.embed_dim, self.embed_dim)
        for stage in (1, 2, 3):
            blocks = (ConvBlock(widths[stage], mlp_ratio, rate) for rate in stages[stage - 1])
            self.add_module(f"blocks{stage}", nn.ModuleList(blocks))
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        block = partial(RelativeBlock, grid=self.grid_size) if pyramid else Block
        block = partial(block, self.embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
        self.blocks4 = nn.ModuleList(block(drop_path=rate) for rate in stages[3])
        # What pretraining hands on: everything so far, without the layer scale and bias that the pyramid's blocks add.
        added = ("gamma_", "relative_position_")
        self._shared_names = tuple(name for name in self.state_dict() if not any(word in name for word in added))
        if pyramid:
            norm = nn.BatchNorm3d if stride32_norm == "batch" else partial(nn.InstanceNorm3d, affine=True)
            width = 2 * self.embed_dim
            self.fpn = nn.Sequential(nn.Conv3d(self.embed_dim, width, kernel_size=2, stride=2), norm(width), nn.GELU())
        else:
            for stage in (1, 2, 3):
                stride = STRIDE >> stage  # from the stage's map to the token grid
                fuse = nn.Conv3d(widths[stage], self.embed_dim, kernel_size=stride, stride=stride)
                self.add_module(f"stage{stage}_output_decode", fuse)
            self.norm = norm_layer(self.embed_dim)
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier-uniform linears and patch embeddings (flattened); other convolutions keep torch's own."""
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
        """A volume (B, in_chans, D, H, W) to tokens, and to feature maps where `return_layers` asks for them.

        Args:
            ids_keep: (B, K) raster indices of the tokens to see; all others are removed and change nothing of the
                result. None sees all.
            return_layers: which maps, 0 to 4 for strides 2, 4, 8, 16, 32 (4 with `pyramid` only). Not together with
                `ids_keep`: removed tokens leave holes in the maps.

        Returns:
            Tokens (B, K, C_4) in the order of `ids_keep`, or (B, N, C_4) in raster order: fused and normalised; with
            `pyramid` the plain output of the last block. With `return_layers`, (tokens, maps): copies normalised over
            channels, in the order asked.
        """
        if len(return_layers) and ids_keep is not None:
            raise ValueError("return_layers needs the whole volume, found ids_keep as well")
        if any(not 0 <= layer <= 3 + self.pyramid for layer in return_layers):
            raise ValueError(f"found return_layers {tuple(return_layers)}, allowed: 0 to {3 + self.pyramid}")
        if 4 in return_layers and any(size % 32 for size in x.shape[2:]):
            raise ValueError(f"volume {tuple(x.shape[2:])} is not divisible by 32, the stride of feature map 4")
        tokens, maps = self.forward_stages(x, ids_keep)
        fused = tokens if self.pyramid else self.norm(tokens + self._fuse(maps, ids_keep))
        if not len(return_layers):
            return fused
        coarse = to_map(tokens, vit.grid_of(x.shape[2:], self.patch_size))
        layers = [normalize_channels(m) if i in return_layers else m for i, m in enumerate((*maps, coarse))]
        if 4 in return_layers:
            layers.append(normalize_channels(self.fpn(coarse)))
        return fused, [layers[layer] for layer in return_layers]

    def forward_stages(self, x: Tensor, ids_keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, K, C_4) after the last block, not yet fused or normed, and the maps at strides 2, 4, 8."""
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise ValueError(f"found an input of shape {tuple(x.shape)}, needs (B, {self.in_chans}, D, H, W)")
        grid = vit.grid_of(x.shape[2:], self.patch_size)
        mask = None if ids_keep is None else visible_mask(ids_keep, grid).to(x.dtype)  # (B, 1, d, h, w)
        maps = []
        for stage in (1, 2, 3):
            x = self.get_submodule(f"patch_embed{stage}")(x)  # (B, C_stage, D/2^stage, ...)
            visible = None if mask is None else F.interpolate(mask, size=x.shape[2:], mode="nearest-exact")
            for block in self.get_submodule(f"blocks{stage}"):
                x = self._run(block, x, visible)
            maps.append(x)
        x = self.patch_embed5(to_tokens(self.patch_embed4(x)))  # (B, N, C_4)
        x = x + vit.resample_pos_embed(self.pos_embed, self.grid_size, grid, num_prefix_tokens=0)
        if ids_keep is not None:
            x = vit.take(x, ids_keep)  # (B, K, C_4)
        for block in self.blocks4:
            x = self._run(block, x, *((grid, ids_keep) if self.pyramid else ()))
        return x, maps

    def _fuse(self, maps: list[Tensor], ids_keep: Tensor | None) -> Tensor:
        """The three convolutional stages on the token grid, summed: (B, K, C_4)."""
        decodes = (self.stage1_output_decode, self.stage2_output_decode, self.stage3_output_decode)
        tokens = to_tokens(sum(decode(x) for decode, x in zip(decodes, maps)))
        return tokens if ids_keep is None else vit.take(tokens, ids_keep)

    def _run(self, block: nn.Module, *args) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    # ------------------------------------------------------------ for training

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass: less memory, about a third more time."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Depth of each parameter for timm's layer-wise learning-rate decay: patch embedding, stage blocks, next."""
        depths = {}
        for stage in range(1, 5):
            more = r"|^patch_embed5|^pos_embed" if stage == 4 else ""
            depths |= {f"embed{stage}": rf"^patch_embed{stage}{more}", f"stage{stage}": rf"^blocks{stage}\.(\d+)"}
        return depths | {"last": r"^norm|^fpn|^stage\d_output_decode"}

    def no_weight_decay(self) -> set[str]:
        """Names that weight decay leaves alone besides biases and norms."""
        tables = (name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table"))
        return {"pos_embed", *tables}

    # ------------------------------------------------------------ loading

    def load_pretrained_checkpoint(
        self,
        path: str | os.PathLike,
        encoder_only: bool = True,
        interpolate_pos_embed: bool = True,
        checkpoint_key: str | None = None,
        source_grid: vit.Grid | None = None,
        rescale_channels: bool = True,
        bias_table: Literal["resample", "drop"] = "resample",
    ) -> tuple[list[str], list[str]]:
        """Load pretrained weights; returns (missing_keys, unexpected_keys) under clean names and prints a short report.

        A pretraining checkpoint fills the body (235 tensors of base); the pyramid's own tensors are then reported as
        missing, decoder and alignment heads as dropped. A fine-tuned checkpoint fills all. Arguments and reading as in
        models_3dvit.py, and:

        Args:
            encoder_only: so that both encoders are called alike; this one never has a decoder to load.
            bias_table: what becomes of a fine-tuned relative position bias of another grid: resampled, or left as this
                model has it.

        Raises:
            ValueError: the file cannot be read safely, or a tensor of the body is missing or does not fit. The model is
                then unchanged.
        """
        state, extras = vit.read_checkpoint(path, checkpoint_key)
        args = extras.get("args")
        recorded = args.get("grid_size") if isinstance(args, dict) else None
        resampled = []
        if "pos_embed" in state:
            fitted = vit.fit_pos_embed(
                state["pos_embed"], self.grid_size, 0, source_grid or recorded, interpolate_pos_embed, where=path
            )
            resampled += [] if torch.equal(fitted, state["pos_embed"]) else ["pos_embed"]
            state["pos_embed"] = fitted
        if "patch_embed1.proj.weight" in state:
            weight = state["patch_embed1.proj.weight"]
            state["patch_embed1.proj.weight"] = vit.inflate_channels(weight, self.in_chans, rescale_channels)
        for name in [name for name in state if name.endswith("relative_position_bias_table")]:
            source = self._bias_grid(len(state[name]), source_grid or recorded, path)
            if source != self.grid_size:
                del state[name.replace("bias_table", "index")]  # of the other grid; this model has its own
                if bias_table == "drop":
                    del state[name]
                    continue
                state[name] = resample_bias_table(state[name], source, self.grid_size)
                resampled.append(name)
        required = self._shared_names if self.pyramid else tuple(self.state_dict())
        self.load_report = vit.load_matching(self, state, required, False, path)
        self.load_report.resampled = resampled
        if int(os.environ.get("RANK", "0")) == 0:
            print(self.load_report)
        return self.load_report.missing, self.load_report.unexpected

    def _bias_grid(self, rows: int, source_grid: vit.Grid | None, where: object) -> vit.Grid:
        """The token grid of a bias table with `rows` rows: the one given, else this model's, else a cube."""
        cube = ((round(rows ** (1 / 3)) + 1) // 2,) * 3
        for grid in [vit.triple(source_grid)] if source_grid else [self.grid_size, cube]:
            if math.prod(_offsets(grid)) == rows:
                return grid
        raise ValueError(
            f"{where}: relative position bias of {rows} rows is of no known grid; pass source_grid=(d, h, w)"
        )


# ---------------------------------------------------------------- factories


def _convvit(defaults: dict, overrides: dict) -> ConvViT3D:
    return ConvViT3D(**dict(defaults, **overrides))


def convvit3d_tiny_patch16(**kwargs) -> ConvViT3D:
    """Widths 12, 24, 48, 96, 3 heads: a quarter of base. Every keyword argument of `ConvViT3D` may be given."""
    return _convvit(dict(embed_dims=(12, 24, 48, 96), depths=(2, 2, 2, 11), num_heads=3), kwargs)


def convvit3d_base_patch16(**kwargs) -> ConvViT3D:
    """Widths 48, 96, 192, 384, 12 heads: MiM's encoder."""
    return _convvit(dict(embed_dims=(48, 96, 192, 384), depths=(2, 2, 2, 11), num_heads=12), kwargs)
