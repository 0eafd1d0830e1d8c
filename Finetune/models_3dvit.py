"""3D vision transformer: the encoder of MAE and GL-MAE, its MAE decoder, and the loading of pretrained weights.

    B batch   (D, H, W) voxels   (d, h, w) grid of patches   N = d*h*w patches   K kept patches   C width
    tokens (B, 1+N, C): the CLS token first, then the patches in raster order of (d, h, w)

Stands alone on torch and timm, so that a notebook needs this one file:

    from models_3dvit import vit_base_patch16_3d
    model = vit_base_patch16_3d(img_size=(96, 96, 96))
    missing_keys, unexpected_keys = model.load_pretrained_checkpoint("checkpoint-1599.pth")

Architecture and parameter names: those of the weights released with GL-MAE (arXiv 2306.08913, IEEE TMI 2025), so that
they load; the numerics of a block are timm's `Block`.
"""

import argparse
import math
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Grid = tuple[int, int, int]


# ---------------------------------------------------------------- functions


def triple(value: int | Sequence[int]) -> Grid:
    """One number for all three axes, or one per axis (D, H, W)."""
    values = (value,) * 3 if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != 3 or min(values) < 1:
        raise ValueError(f"found {value!r}, needs one positive number or three (D, H, W)")
    return values


def grid_of(img_size: Sequence[int], patch_size: Sequence[int]) -> Grid:
    """The grid (d, h, w) of patches in a volume; ValueError when the patch size does not divide it."""
    if any(s % p or s < p for s, p in zip(img_size, patch_size)):
        raise ValueError(f"volume {tuple(img_size)} is not divisible by the patch size {tuple(patch_size)}")
    return tuple(s // p for s, p in zip(img_size, patch_size))


def get_3d_sincos_pos_embed(embed_dim: int, grid: Grid, cls_token: bool = False) -> Tensor:
    """Fixed sine-cosine positions (1, [1+]N, C) on integer coordinates of the grid (d, h, w); the CLS row is zero.

    Three equal parts of the width for d, h, w, each [sin(p*w_k), cos(p*w_k)] with w_k = 10000^(-k/(C/6)), as in the
    authors' code. Where 6 does not divide C (1024, 1280, 512), C//6 frequencies are used and the last C mod 6 channels
    stay zero (our choice).
    """
    frequencies = embed_dim // 6
    if frequencies < 1:
        raise ValueError(f"width {embed_dim} is too small for 3D sine-cosine positions, needs at least 6")
    omega = 10000.0 ** (-torch.arange(frequencies, dtype=torch.float64) / frequencies)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in axes]  # 3 x (N, C/6)
    table = torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)
    table = F.pad(table, (0, embed_dim - 6 * frequencies, int(cls_token), 0))
    return table.float().unsqueeze(0)


def resample_pos_embed(table: Tensor, source: Grid, target: Grid, num_prefix_tokens: int = 1) -> Tensor:
    """Position table (1, prefix+n, C) of the grid `source` at the grid `target`, trilinear; prefix rows (CLS) are kept.

    The grids are explicit: a grid guessed from a token count scrambles every volume that is not a cube.
    """
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    if patches.shape[1] != math.prod(source):
        raise ValueError(f"position table has {patches.shape[1]} patch rows, the grid {source} has {math.prod(source)}")
    if tuple(source) == tuple(target):
        return table
    volume = patches.transpose(1, 2).reshape(1, -1, *source).float()
    volume = F.interpolate(volume, size=tuple(target), mode="trilinear", align_corners=False)
    return torch.cat([prefix, volume.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (B, K) of `tokens` (B, N, C) -> (B, K, C)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


# ---------------------------------------------------------------- model


class PatchEmbed3D(nn.Module):
    """Non-overlapping patches, linearly embedded: (B, in_chans, D, H, W) -> (B, N, C)."""

    def __init__(self, patch_size: Grid, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer3D(nn.Module):
    """3D ViT: fixed sine-cosine positions, a CLS token, pre-norm timm blocks (LayerNorm eps 1e-6), a final norm.

    Args:
        img_size: voxels (D, H, W) or one number; sets the grid of the stored position table. Inputs of any other size
            that the patch size divides are accepted: the table is resampled from its true grid.
        patch_size: voxels (D, H, W) or one number.
        encoder_only: False adds the MAE decoder (`decoder_*`, `mask_token`). 576 wide by default (our choice: the width
            of the authors' own 3D MAE; the released class has 512).
        class_token: False leaves the CLS token out, as the authors do when they fine-tune for segmentation.
        num_classes: more than 0 adds a classification head at once, as `add_classification_head` does later.
    """

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
        self.img_size, self.patch_size = triple(img_size), triple(patch_size)
        self.grid_size = grid_of(self.img_size, self.patch_size)
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.num_prefix_tokens = int(class_token)
        self.grad_checkpointing = False
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm_layer)
        drop_paths = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]

        self.patch_embed = PatchEmbed3D(self.patch_size, in_chans, embed_dim)
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = self._position_table(embed_dim)
        self.blocks = nn.ModuleList(block(embed_dim, num_heads, drop_path=rate) for rate in drop_paths)
        self.norm = norm_layer(embed_dim)
        self._encoder_names = tuple(self.state_dict())

        self.has_decoder = not encoder_only
        if self.has_decoder:
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
        """MAE's: xavier-uniform linears, the patch embedding likewise on its flattened view, tokens N(0, 0.02)."""
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
        """A volume (B, in_chans, D, H, W) to what its caller needs.

        ======================  ====================================================================================
        `model(x)`              the CLS token (B, C) after the final norm, or the classification head's logits
        `return_features=True`  dict of `cls_token` (B, C), `patch_features` (B, N, C), `all_features` (B, 1+N, C)
        `ids_keep` (B, K)       an autoencoder's: tokens (B, 1+K, C) of the kept patches alone, normed, in that order
        `return_layers` (3, 6)  a segmentation head's: (tokens (B, 1+N, C) normed, [hidden states of blocks 3, 6]),
                                counted from 0, before the final norm; each (B, 1+N, C)
        ======================  ====================================================================================

        With `class_token=False` there is no CLS row: token counts drop by one, and the mean patch token stands in for
        `cls_token`.
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
        """Normed tokens (B, 1+K, C) and the hidden states after the blocks `return_layers`, each (B, 1+K, C)."""
        x, pos_embed = self._embed(x)  # (B, N, C), (1, 1+N, C)
        x = x + pos_embed[:, self.num_prefix_tokens :]
        if ids_keep is not None:
            x = take(x, ids_keep)  # (B, K, C)
        if self.num_prefix_tokens:
            cls_token = self.cls_token + pos_embed[:, :1]
            x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1+K, C)
        hidden = []
        for index, block in enumerate(self.blocks):
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if index in return_layers:
                hidden.append(x)
        return self.norm(x), hidden

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor, grid: Grid | None = None) -> Tensor:
        """The removed patches predicted: (B, N, pd*ph*pw*in_chans), for all patches of the grid (d, h, w).

        `latent` (B, 1+K, C) are the tokens of the kept patches; `ids_restore` (B, N) puts kept, then removed patches
        back into raster order.
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

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise ValueError(f"found an input of shape {tuple(x.shape)}, needs (B, {self.in_chans}, D, H, W)")
        grid = grid_of(x.shape[2:], self.patch_size)
        return self.patch_embed(x), resample_pos_embed(self.pos_embed, self.grid_size, grid, self.num_prefix_tokens)

    def _summary(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.num_prefix_tokens else tokens.mean(dim=1)

    # ------------------------------------------------------------ for fine-tuning

    def add_classification_head(self, num_classes: int) -> None:
        """A linear head on the CLS token; from then on `model(x)` gives its logits (B, num_classes)."""
        self.head = nn.Linear(self.embed_dim, num_classes).to(self.norm.weight.device)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def remove_decoder(self) -> None:
        """Leave the encoder alone, as `encoder_only=True` builds it."""
        for name in {key.split(".")[0] for key in self.state_dict() if key.startswith(("decoder_", "mask_token"))}:
            delattr(self, name)
        self.has_decoder = False

    def freeze_encoder(self) -> None:
        """No gradient for the encoder; decoder and head stay as they are."""
        self._set_encoder_trainable(False)

    def unfreeze_encoder(self) -> None:
        """Gradients for the encoder again, except for the position table, which is fixed by design."""
        self._set_encoder_trainable(True)

    def _set_encoder_trainable(self, trainable: bool) -> None:
        for name in self._encoder_names:
            if name != "pos_embed":
                self.get_parameter(name).requires_grad_(trainable)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass: less memory, about a third more time."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names that weight decay leaves alone besides biases and norms, as in timm's ViT."""
        return {"pos_embed", "cls_token", "decoder_pos_embed", "mask_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Depth of each parameter for timm's layer-wise learning-rate decay."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    # ------------------------------------------------------------ loading

    def load_pretrained_checkpoint(
        self,
        path: str | os.PathLike,
        encoder_only: bool = True,
        interpolate_pos_embed: bool = True,
        checkpoint_key: str | None = None,
        source_grid: Grid | None = None,
        rescale_channels: bool = True,
    ) -> tuple[list[str], list[str]]:
        """Load pretrained weights and print a short report; returns (missing_keys, unexpected_keys), under clean names.

        Args:
            path: a checkpoint of ours or of the authors. The weights are taken from `student`, `state_dict`, `model` or
                the top level, whichever comes first; the EMA teacher only when asked for with
                `checkpoint_key="teacher"`. Nothing is ever unpickled beyond tensors, plain types and
                `argparse.Namespace`.
            encoder_only: take the encoder and leave decoder and head alone. False also loads those that fit by name and
                shape.
            interpolate_pos_embed: resample the position table when the grids differ; False makes that an error.
            source_grid: the (d, h, w) grid of the file's position table. Needed only for a table that is neither
                recorded in the file, nor of this model's grid, nor of a cube.
            rescale_channels: a 1-channel patch embedding is repeated over `in_chans` and divided by it, so that an
                image repeated over the channels gives the same features; False repeats only, as the authors' loader
                does.

        Raises:
            ValueError: the file cannot be read safely, or an encoder tensor is missing or does not fit. The model is
                then unchanged.
        """
        state, extras = read_checkpoint(path, checkpoint_key)
        args = extras.get("args")
        recorded = args.get("grid_size") if isinstance(args, dict) else None
        fit_table = partial(
            fit_pos_embed,
            target_grid=self.grid_size,
            num_prefix_tokens=self.num_prefix_tokens,
            source_grid=source_grid or recorded,
            resample=interpolate_pos_embed,
            where=path,
        )
        fitted = {name: fit_table(state[name]) for name in ("pos_embed", "decoder_pos_embed") if name in state}
        weight = "patch_embed.proj.weight"
        if weight in state:
            fitted[weight] = inflate_channels(state[weight], self.in_chans, rescale_channels)
        self.load_report = load_matching(self, state | fitted, self._encoder_names, encoder_only, path)
        self.load_report.resampled = [
            n for n in self.load_report.matched if n in fitted and not same(fitted[n], state[n])
        ]
        if int(os.environ.get("RANK", "0")) == 0:
            print(self.load_report)
        return self.load_report.missing, self.load_report.unexpected


# ---------------------------------------------------------------- factories


def _vit(defaults: dict, overrides: dict) -> VisionTransformer3D:
    return VisionTransformer3D(**dict(defaults, **overrides))


def vit_tiny_patch16_3d(**kwargs) -> VisionTransformer3D:
    """192 wide, 12 blocks, 3 heads. Every keyword argument of `VisionTransformer3D` may be given, `patch_size` too."""
    return _vit(dict(patch_size=16, embed_dim=192, depth=12, num_heads=3), kwargs)


def vit_small_patch16_3d(**kwargs) -> VisionTransformer3D:
    """384 wide, 12 blocks, 6 heads."""
    return _vit(dict(patch_size=16, embed_dim=384, depth=12, num_heads=6), kwargs)


def vit_base_patch16_3d(**kwargs) -> VisionTransformer3D:
    """768 wide, 12 blocks, 12 heads: GL-MAE's encoder."""
    return _vit(dict(patch_size=16, embed_dim=768, depth=12, num_heads=12), kwargs)


def vit_large_patch16_3d(**kwargs) -> VisionTransformer3D:
    """1024 wide, 24 blocks, 16 heads."""
    return _vit(dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16), kwargs)


def vit_huge_patch16_3d(**kwargs) -> VisionTransformer3D:
    """1280 wide, 32 blocks, 16 heads."""
    return _vit(dict(patch_size=16, embed_dim=1280, depth=32, num_heads=16), kwargs)


# ---------------------------------------------------------------- loading


@dataclass
class LoadReport:
    """What became of a checkpoint's tensors. Names are clean (without `module.` and the like)."""

    path: str
    matched: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    encoder_total: int = 0
    encoder_matched: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.encoder_matched} of {self.encoder_total} encoder tensors, {len(self.matched)} in all"
        ]
        for label, names in (("resampled", self.resampled), ("missing", self.missing), ("dropped", self.unexpected)):
            if names:
                lines.append(f"  {label} {len(names)}: {shorten(names)}")
        return "\n".join(lines)


def shorten(names: Sequence[str], most: int = 4) -> str:
    """The first few names and how many more there are."""
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


_WRAPPERS = re.compile(r"^(module|_orig_mod|backbone|vit|encoder)\.")


def clean_keys(state: dict[str, Tensor], where: object = "state dict") -> dict[str, Tensor]:
    """Names without the prefixes that DDP, torch.compile and surrounding modules add. Only at the start, as often as
    they stand there."""
    cleaned = {}
    for key, value in state.items():
        name = key
        while _WRAPPERS.match(name):
            name = _WRAPPERS.sub("", name)
        if name in cleaned:
            raise ValueError(f"{where}: two tensors are both called '{name}' without their prefixes (one is '{key}')")
        cleaned[name] = value
    return cleaned


def read_checkpoint(path: str | os.PathLike, checkpoint_key: str | None = None) -> tuple[dict[str, Tensor], dict]:
    """The weights of a checkpoint under clean names, and what else the file holds (epoch, args, ...).

    Raises:
        ValueError: no such file, torn, altered (each of its records has a CRC32), holding code (a pickle of anything
            but tensors, plain types and `argparse.Namespace`), or without weights under a known key.
    """
    try:
        if zipfile.is_zipfile(path):  # torch does not compare the checksums that it writes
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"damaged: the checksum of record {damaged} does not match")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch raises a different type for each way a file can be broken
        reason = str(error).strip().splitlines()
        refused = [line for line in reason if "Unsupported" in line or "GLOBAL" in line]
        detail = (refused or reason or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({detail})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, needs a dict of weights")
    extras = {key: value for key, value in content.items() if not isinstance(value, (dict, Tensor)) or key == "args"}
    if isinstance(extras.get("args"), argparse.Namespace):
        extras["args"] = vars(extras["args"])
    keys = [checkpoint_key] if checkpoint_key else ["student", "state_dict", "model"]
    for key in keys:
        if isinstance(content.get(key), dict):
            return _tensors(content[key], path), extras
    if checkpoint_key is None and any(isinstance(value, Tensor) for value in content.values()):
        return _tensors(content, path), extras
    hint = (
        "; it has a teacher: ask for it with checkpoint_key='teacher'"
        if "teacher" in content and not checkpoint_key
        else ""
    )
    raise ValueError(
        f"{path}: no weights under {' or '.join(map(repr, keys))}, found the keys {sorted(map(str, content))}{hint}"
    )


def _tensors(state: dict, path: object) -> dict[str, Tensor]:
    return clean_keys({key: value for key, value in state.items() if isinstance(value, Tensor)}, path)


def fit_pos_embed(
    table: Tensor,
    target_grid: Grid,
    num_prefix_tokens: int = 1,
    source_grid: Grid | None = None,
    resample: bool = True,
    where: object = "position table",
) -> Tensor:
    """A file's position table (1, n or 1+n, C) as (1, prefix+N, C) of `target_grid`: CLS row added (zero) or dropped,
    grid resampled.

    The source grid is `source_grid` where given; else the target's where the row count allows it; else a cube. Nothing
    else is guessed.
    """
    rows = table.shape[1]
    cubes = [(side,) * 3 for side in (round(n ** (1 / 3)) for n in (rows - 1, rows)) if side > 0]
    for grid in [triple(source_grid)] if source_grid else [tuple(target_grid), *cubes]:
        prefix = rows - math.prod(grid)
        if prefix in (0, 1):
            break
    else:
        known = f"the grid {tuple(source_grid)}" if source_grid else f"neither the grid {tuple(target_grid)} nor a cube"
        raise ValueError(f"{where}: position table of {rows} rows fits {known}; pass source_grid=(d, h, w)")
    if grid != tuple(target_grid) and not resample:
        raise ValueError(
            f"{where}: position table of grid {grid}, the model has {tuple(target_grid)}, resampling is off"
        )
    patches = resample_pos_embed(table[:, prefix:], grid, target_grid, num_prefix_tokens=0)
    cls_row = table[:, :1] if prefix else torch.zeros_like(table[:, :1])
    return torch.cat([cls_row, patches], dim=1) if num_prefix_tokens else patches


def inflate_channels(weight: Tensor, in_chans: int, rescale: bool = True) -> Tensor:
    """A 1-channel convolution (C, 1, ...) for `in_chans` channels; divided by their number, an image repeated over them
    gives the same."""
    if weight.shape[1] != 1 or in_chans == 1:
        return weight
    return weight.repeat(1, in_chans, *[1] * (weight.ndim - 2)) / (in_chans if rescale else 1)


def load_matching(
    model: nn.Module, state: dict[str, Tensor], required: Iterable[str], required_only: bool, where: object
) -> LoadReport:
    """Copy `state` into `model`: every name of `required` must be there and fit; others are taken where they fit,
    unless `required_only`.

    Raises ValueError, with the model unchanged, when a required tensor is missing or has another shape.
    """
    own, required = model.state_dict(), list(required)
    wanted = required if required_only else list(own)
    fits = {name: state[name] for name in wanted if name in state and state[name].shape == own[name].shape}
    report = LoadReport(
        path=str(where),
        matched=list(fits),
        missing=[name for name in wanted if name not in fits],
        unexpected=[name for name in state if name not in fits],
        encoder_total=len(required),
        encoder_matched=sum(name in fits for name in required),
    )
    misfits = [
        f"{name} found {tuple(state[name].shape)}, needs {tuple(own[name].shape)}"
        if name in state
        else f"{name} is missing"
        for name in required
        if name not in fits
    ]
    if misfits:
        raise ValueError(
            f"{where}: only {report.encoder_matched} of {len(required)} encoder tensors fit this model: "
            f"{shorten(misfits)}"
        )
    model.load_state_dict(fits, strict=False)
    return report
