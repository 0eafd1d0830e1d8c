"""3D vision transformer: the encoder of MAE and GL-MAE, with the decoder of MAE.

    B batch   (D, H, W) voxels   (d, h, w) patch grid   N = d*h*w patches   K kept patches   C width
    tokens (B, 1+N, C): the CLS token first, then the patches in raster order of (d, h, w)

Needs torch, timm and pretrained.py beside it, nothing else of this repository:

    from models_3dvit import vit_base_patch16_3d
    model = vit_base_patch16_3d(img_size=(96, 96, 96))
    missing_keys, unexpected_keys = model.load_pretrained_checkpoint("checkpoint-1599.pth")

Architecture and parameter names are those of the weights released with GL-MAE (arXiv 2306.08913, IEEE TMI 2025), so
that these load. The blocks are timm's `Block`.
"""

import math
import os
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if __package__:
    from . import pretrained
else:
    # a notebook has Finetune/ itself on its path
    import pretrained

Grid = tuple[int, int, int]
SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}


# ---------------------------------------------------------------- functions


def triple(value: int | Sequence[int], name: str = "size") -> Grid:
    """Return one number for all three axes, or one per axis, as (D, H, W). `name` is used in errors."""
    values = (value,) * 3 if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != 3 or min(values) < 1:
        raise ValueError(f"{name}: found {value!r}, expected one number of at least 1, or three (D, H, W)")
    return values


def grid_of(img_size: Sequence[int], patch_size: Sequence[int]) -> Grid:
    """Return the patch grid (d, h, w) of a volume. ValueError when the patch size does not divide the volume."""
    if any(s % p or s < p for s, p in zip(img_size, patch_size)):
        raise ValueError(f"volume {tuple(img_size)} is not divisible by the patch size {tuple(patch_size)}")
    return tuple(s // p for s, p in zip(img_size, patch_size))


def check_sizes(embed_dim: int, num_heads: int, depth: int = 1) -> None:
    """Raise ValueError unless the sizes of a transformer are positive and its heads divide its width."""
    for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("depth", depth)):
        if size < 1:
            raise ValueError(f"{name}: found {size}, expected at least 1")
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim: found {embed_dim}, expected a multiple of num_heads {num_heads}")


def get_3d_sincos_pos_embed(embed_dim: int, grid: Grid, cls_token: bool = False) -> Tensor:
    """Return fixed sine-cosine positions (1, [1+]N, C) for the coordinates 0, 1, ... of a patch grid (d, h, w).

    The width has three equal parts for d, h and w, each [sin(p*w_k), cos(p*w_k)] with w_k = 10000^(-k/(C/6)), as in
    the authors' code. If C is not divisible by 6 (1024, 1280, 512), C//6 frequencies are used and the last C mod 6
    channels are zero (our choice). With `cls_token` a row of zeros comes first.
    """
    frequencies = embed_dim // 6
    if frequencies < 1:
        raise ValueError(f"embed_dim: found {embed_dim}, expected at least 6 for 3D sine-cosine positions")
    omega = 10000.0 ** (-torch.arange(frequencies, dtype=torch.float64) / frequencies)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in axes]  # 3 x (N, C/6)
    table = torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)
    table = F.pad(table, (0, embed_dim - 6 * frequencies, int(cls_token), 0))
    return table.float().unsqueeze(0)


def resample_pos_embed(table: Tensor, source: Grid, target: Grid, num_prefix_tokens: int = 1) -> Tensor:
    """Resample a position table (1, prefix+n, C) trilinearly from one patch grid to another. Prefix rows are kept.

    Both grids are explicit: guessing the grid from the number of tokens scrambles every volume that is not a cube.
    """
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    if patches.shape[1] != math.prod(source):
        raise ValueError(f"position table has {patches.shape[1]} patch rows, the grid {source} has {math.prod(source)}")
    if tuple(source) == tuple(target):
        return table
    volume = patches.transpose(1, 2).reshape(1, -1, *source).float()
    volume = F.interpolate(volume, size=tuple(target), mode="trilinear", align_corners=False)
    return torch.cat([prefix, volume.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)


def fit_pos_embed(
    table: Tensor,
    target_grid: Grid,
    num_prefix_tokens: int = 1,
    source_grid: Sequence[int] | None = None,
    resample: bool = True,
    where: object = "position table",
) -> Tensor:
    """Return the position table of a file, (1, n or 1+n, C), as (1, prefix+N, C) for the patch grid `target_grid`.

    A CLS row is dropped, or added as zeros. The grid of the file is `source_grid`; without it `target_grid` if the
    number of rows fits, else a cube.

    Raises:
        ValueError: the rows fit none of these grids, or the grids differ and `resample` is False.
    """
    if table.ndim != 3:
        raise ValueError(f"{where}: found a position table of shape {tuple(table.shape)}, expected (1, rows, width)")
    rows, target = table.shape[1], tuple(target_grid)
    cubes = [(side,) * 3 for side in (round(n ** (1 / 3)) for n in (rows - 1, rows)) if side > 0]
    candidates = [triple(source_grid, "source_grid")] if source_grid else [target, *cubes]
    grid = next((grid for grid in candidates if rows - math.prod(grid) in (0, 1)), None)
    if grid is None:
        expected = f"the grid {candidates[0]}" if source_grid else f"the grid {target} or a cube"
        raise ValueError(f"{where}: position table: found {rows} rows, expected {expected}; pass source_grid=(d, h, w)")
    if grid != target and not resample:
        raise ValueError(f"{where}: position table: found the grid {grid}, expected {target} as resampling is off")
    prefix = rows - math.prod(grid)
    patches = resample_pos_embed(table[:, prefix:], grid, target, num_prefix_tokens=0)
    cls_row = table[:, :1] if prefix else torch.zeros_like(table[:, :1])
    return torch.cat([cls_row, patches], dim=1) if num_prefix_tokens else patches


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Return the rows `ids` (B, K) of `tokens` (B, N, C) as (B, K, C)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


# ---------------------------------------------------------------- model


class Encoder3D(nn.Module):
    """What both encoders have: checks of the input, recomputing of blocks, freezing, loading of pretrained weights.

    A subclass sets `in_chans`, `patch_size`, `grid_size`, and:

        encoder_names      the tensors that a pretrained checkpoint must provide
        num_prefix_tokens  rows of a position table before those of the patches
        patch_weight       the name of the convolution weight that is applied to the voxels
    """

    num_prefix_tokens = 0
    patch_weight: str
    encoder_names: tuple[str, ...]
    grad_checkpointing = False

    def input_grid(self, x: Tensor) -> Grid:
        """Return the patch grid of an input (B, in_chans, D, H, W). ValueError for other shapes."""
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise ValueError(f"found an input of shape {tuple(x.shape)}, expected (B, {self.in_chans}, D, H, W)")
        return grid_of(x.shape[2:], self.patch_size)

    def run_block(self, block: nn.Module, *args) -> Tensor:
        """Return `block(*args)`, recomputed in the backward pass with gradient checkpointing."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass, which saves memory and takes about a third more time."""
        self.grad_checkpointing = enable

    @torch.no_grad()
    def standardize_input(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Change a random patch embedding so that it embeds (x - mean) / std. The inputs x stay as they are.

        The usual initialisations assume inputs of mean 0 and variance 1. With intensities in [0, 1] the position table
        otherwise outweighs what a patch contains (its variance per channel is 0.5). Not for loaded weights. Our choice.

        Args:
            mean, std: one number per input channel.
        """
        proj = self.get_submodule(self.patch_weight.removesuffix(".weight"))
        mean, std = (proj.weight.new_tensor(list(values)).view(1, -1, 1, 1, 1) for values in (mean, std))
        proj.weight.div_(std)
        proj.bias.sub_((proj.weight * mean).sum(dim=(1, 2, 3, 4)))

    def freeze_encoder(self) -> None:
        """Stop training what a pretrained checkpoint provides. A decoder, a head or a pyramid stays trainable."""
        for name, parameter in self.named_parameters():
            if name in self.encoder_names:
                parameter.requires_grad_(False)

    def load_pretrained_checkpoint(
        self,
        path: str | os.PathLike,
        encoder_only: bool = True,
        interpolate_pos_embed: bool = True,
        checkpoint_key: str | None = None,
        source_grid: Grid | None = None,
        rescale_channels: bool = True,
        **tables,
    ) -> tuple[list[str], list[str]]:
        """Load pretrained weights and print a short report on rank 0.

        Args:
            path: a checkpoint of this repository or of the authors. Nothing in the file is executed.
            encoder_only: load the encoder alone. False also loads other tensors that fit by name and shape.
            interpolate_pos_embed: resample the position table if the patch grids differ. False makes that an error.
            checkpoint_key: where the weights are in the file; by default under `student`, `state_dict` or `model`, or
                at the top level. `"teacher"` is the EMA teacher.
            source_grid: patch grid (d, h, w) of the file's position table. Needed only if the file does not record
                it, and it is neither that of this model nor a cube.
            rescale_channels: divide a 1-channel patch embedding that is repeated over `in_chans` by their number, so
                that an image repeated over the channels has the same features. False is what the authors' loader does.
            **tables: passed to `adapt_tables`.

        Returns:
            (missing_keys, unexpected_keys), without prefixes such as `module.`.

        Raises:
            ValueError: the file cannot be read, or an encoder tensor is missing, does not fit or is not finite. The
                model is then unchanged.
        """
        state, extras = pretrained.read_checkpoint(path, checkpoint_key)
        args = extras.get("args")
        grid = source_grid or (args.get("grid_size") if isinstance(args, dict) else None)
        adapted = self.adapt_tables(state, grid, path, **tables)
        own = self.encoder_names if encoder_only else self.state_dict()
        for name in ("pos_embed", "decoder_pos_embed"):
            if name in state and name in own:
                adapted[name] = fit_pos_embed(
                    state[name], self.grid_size, self.num_prefix_tokens, grid, interpolate_pos_embed, path
                )
        if self.patch_weight in state:
            weight = state[self.patch_weight]
            adapted[self.patch_weight] = pretrained.inflate_channels(weight, self.in_chans, rescale_channels)
        report = pretrained.load_matching(self, adapted, self.encoder_names, encoder_only, path)
        report.resampled = [name for name in report.matched if not pretrained.same(adapted[name], state[name])]
        if int(os.environ.get("RANK", "0")) == 0:
            print(report)
        self.load_report = report
        return report.missing, report.unexpected

    def adapt_tables(self, state: pretrained.State, grid: Sequence[int] | None, path: object) -> pretrained.State:
        """Return a copy of the tensors of a file, with tables of its patch grid `grid` in the shapes of this model."""
        return dict(state)


class PatchEmbed3D(nn.Module):
    """Linear embedding of non-overlapping patches: (B, in_chans, D, H, W) -> (B, N, C)."""

    def __init__(self, patch_size: Grid, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer3D(Encoder3D):
    """3D ViT with fixed sine-cosine positions, a CLS token, pre-norm blocks (LayerNorm eps 1e-6) and a final norm.

    Args:
        img_size: voxels (D, H, W), or one number. Sets the grid of the stored position table. Inputs of any other size
            that the patch size divides are accepted: the table is resampled for them.
        patch_size: voxels (D, H, W), or one number.
        encoder_only: False adds the MAE decoder (`decoder_*`, `mask_token`). Its default width of 576 is our choice:
            that of the authors' own 3D MAE, where the released class has 512.
        class_token: False leaves out the CLS token, as the authors do for segmentation.
        num_classes: more than 0 adds a classification head, as `add_classification_head` does.
        drop_path_rate: stochastic depth, growing linearly from 0 over the blocks.

    Raises:
        ValueError: a size is not positive, the patch size does not divide `img_size`, or the heads do not divide the
            width.
    """

    patch_weight = "patch_embed.proj.weight"

    def __init__(
        self,
        img_size: int | Sequence[int] = 96,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 1,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        encoder_only: bool = True,
        decoder_embed_dim: int = 576,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        class_token: bool = True,
        num_classes: int = 0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(embed_dim, num_heads, depth)
        self.img_size, self.patch_size = triple(img_size, "img_size"), triple(patch_size, "patch_size")
        self.grid_size = grid_of(self.img_size, self.patch_size)
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.num_prefix_tokens = int(class_token)
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm_layer)
        drop_paths = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]

        self.patch_embed = PatchEmbed3D(self.patch_size, in_chans, embed_dim)
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = self._position_table(embed_dim)
        self.blocks = nn.ModuleList(block(embed_dim, num_heads, drop_path=rate) for rate in drop_paths)
        self.norm = norm_layer(embed_dim)
        self.encoder_names = tuple(self.state_dict())

        if not encoder_only:
            check_sizes(decoder_embed_dim, decoder_num_heads)
            self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
            self.decoder_pos_embed = self._position_table(decoder_embed_dim)
            self.decoder_blocks = nn.ModuleList(
                block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth)
            )
            self.decoder_norm = norm_layer(decoder_embed_dim)
            self.decoder_pred = nn.Linear(decoder_embed_dim, math.prod(self.patch_size) * in_chans)
        self.head: nn.Linear | None = None
        self._init_weights()
        if num_classes > 0:
            self.add_classification_head(num_classes)

    def _position_table(self, width: int) -> nn.Parameter:
        table = get_3d_sincos_pos_embed(width, self.grid_size, cls_token=self.num_prefix_tokens == 1)
        return nn.Parameter(table, requires_grad=False)

    def _init_weights(self) -> None:
        """As MAE: Xavier-uniform linear layers and (flattened) patch embedding, tokens from N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        for token in ("cls_token", "mask_token"):
            if hasattr(self, token):
                nn.init.normal_(getattr(self, token), std=0.02)

    # ------------------------------------------------------------ forward

    def forward(
        self,
        x: Tensor,
        ids_keep: Tensor | None = None,
        return_layers: Sequence[int] = (),
        return_features: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]] | dict[str, Tensor]:
        """Encode a volume (B, in_chans, D, H, W). What is returned depends on the arguments:

        ======================  ====================================================================================
        none                    the CLS token (B, C) after the final norm, or the logits of the classification head
        `return_features=True`  dict of `cls_token` (B, C), `patch_features` (B, N, C), `all_features` (B, 1+N, C)
        `ids_keep` (B, K)       tokens (B, 1+K, C) of the kept patches in that order, for an autoencoder
        `return_layers` (3, 6)  (tokens (B, 1+N, C), [hidden states after the blocks 3 and 6, each (B, 1+N, C)]), for a
                                segmentation head; blocks are counted from 0
        ======================  ====================================================================================

        Tokens are those after the final norm, hidden states those before it. With `class_token=False` there is no CLS
        row, and the mean of the patch tokens is returned as `cls_token`.
        """
        tokens, hidden = self.forward_tokens(x, ids_keep, return_layers)
        if return_features:
            patches = tokens[:, self.num_prefix_tokens :]
            return {"cls_token": self._summary(tokens), "patch_features": patches, "all_features": tokens}
        if len(return_layers):
            return tokens, hidden
        if ids_keep is not None:
            return tokens
        summary = self._summary(tokens)
        return summary if self.head is None else self.head(summary)

    def forward_tokens(
        self, x: Tensor, ids_keep: Tensor | None = None, return_layers: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the normed tokens (B, 1+K, C) and the hidden states after `return_layers`, each (B, 1+K, C)."""
        grid = self.input_grid(x)
        pos_embed = resample_pos_embed(self.pos_embed, self.grid_size, grid, self.num_prefix_tokens)  # (1, 1+N, C)
        x = self.patch_embed(x) + pos_embed[:, self.num_prefix_tokens :]  # (B, N, C)
        if ids_keep is not None:
            x = take(x, ids_keep)  # (B, K, C)
        if self.num_prefix_tokens:
            cls_token = self.cls_token + pos_embed[:, :1]
            x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1+K, C)
        hidden = []
        for index, block in enumerate(self.blocks):
            x = self.run_block(block, x)
            if index in return_layers:
                hidden.append(x)
        return self.norm(x), hidden

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor, grid: Grid | None = None) -> Tensor:
        """Predict the voxels of all patches: (B, N, pd*ph*pw*in_chans).

        Args:
            latent: tokens (B, 1+K, C) of the kept patches.
            ids_restore: (B, N), puts the kept patches followed by the removed ones back into raster order.
            grid: patch grid (d, h, w) of the input, by default that of the position table.
        """
        prefix = self.num_prefix_tokens
        x = self.decoder_embed(latent)
        batch, kept = x.shape[0], x.shape[1] - prefix
        removed = self.mask_token.expand(batch, ids_restore.shape[1] - kept, -1).to(x.dtype)
        patches = take(torch.cat([x[:, prefix:], removed], dim=1), ids_restore)  # (B, N, C')
        x = torch.cat([x[:, :prefix], patches], dim=1)
        x = x + resample_pos_embed(self.decoder_pos_embed, self.grid_size, grid or self.grid_size, prefix)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, prefix:]

    def _summary(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.num_prefix_tokens else tokens.mean(dim=1)

    # ------------------------------------------------------------ for training

    def add_classification_head(self, num_classes: int) -> None:
        """Add a linear layer on the CLS token. `model(x)` then returns its logits (B, num_classes)."""
        self.head = nn.Linear(self.embed_dim, num_classes).to(self.norm.weight.device)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def remove_decoder(self) -> None:
        """Delete the MAE decoder."""
        for name in {key.split(".")[0] for key in self.state_dict() if key.startswith(("decoder_", "mask_token"))}:
            delattr(self, name)

    def unfreeze_encoder(self) -> None:
        """Train the encoder again, except for its fixed position table."""
        for name in self.encoder_names:
            self.get_parameter(name).requires_grad_(name != "pos_embed")

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, besides biases and norms, as in timm's ViT."""
        return {"pos_embed", "cls_token", "decoder_pos_embed", "mask_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return patterns that order the parameters by depth, for timm's layer-wise learning-rate decay."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^decoder_|^mask_token", (99999,))],
        }


# ---------------------------------------------------------------- factories


def vit_tiny_patch16_3d(**kwargs) -> VisionTransformer3D:
    """Return the tiny ViT: width 192, 12 blocks, 3 heads. Takes all keyword arguments of `VisionTransformer3D`."""
    return VisionTransformer3D(**(SIZES["tiny"] | kwargs))


def vit_small_patch16_3d(**kwargs) -> VisionTransformer3D:
    """Return the small ViT: width 384, 12 blocks, 6 heads."""
    return VisionTransformer3D(**(SIZES["small"] | kwargs))


def vit_base_patch16_3d(**kwargs) -> VisionTransformer3D:
    """Return the base ViT, GL-MAE's encoder: width 768, 12 blocks, 12 heads."""
    return VisionTransformer3D(**(SIZES["base"] | kwargs))


def vit_large_patch16_3d(**kwargs) -> VisionTransformer3D:
    """Return the large ViT: width 1024, 24 blocks, 16 heads."""
    return VisionTransformer3D(**(SIZES["large"] | kwargs))


def vit_huge_patch16_3d(**kwargs) -> VisionTransformer3D:
    """Return the huge ViT: width 1280, 32 blocks, 16 heads."""
    return VisionTransformer3D(**(SIZES["huge"] | kwargs))
