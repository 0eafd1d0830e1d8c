"""What both encoders share: sizes and patch grids, sine-cosine positions, and the base class that loads checkpoints.

    B batch   (D, H, W) voxels   (d, h, w) patch grid   N = d*h*w patches   K kept patches   C width

Needs torch and pretrained.py beside it, nothing else of this repository.
"""

import inspect
import math
import os
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if __package__:
    from . import pretrained
else:
    # a notebook has Finetune/ itself on its path
    import pretrained

Grid = tuple[int, int, int]


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


class ResampledTables:
    """Position tables of an encoder, resampled once per patch grid. A copy or an unpickled one starts empty.

    A table is resampled again when it was replaced, moved or changed in place. One that is trained is never stored.
    """

    # grids per table; inputs of any size may come in prediction
    MAX_GRIDS = 8

    def __init__(self):
        self._found: dict[str, tuple[weakref.ref, tuple, dict[Grid, Tensor]]] = {}

    def __reduce__(self):
        return ResampledTables, ()

    def get(self, name: str, table: Tensor, source: Grid, target: Grid, num_prefix_tokens: int) -> Tensor:
        """Return `resample_pos_embed(table, source, target, num_prefix_tokens)`, stored under `name`."""
        if tuple(source) == tuple(target) or table.requires_grad or table.is_inference():
            return resample_pos_embed(table, source, target, num_prefix_tokens)
        state = table._version, table.device, table.dtype
        reference, stored_state, grids = self._found.get(name, (None, None, {}))
        if reference is None or reference() is not table or stored_state != state or len(grids) >= self.MAX_GRIDS:
            grids = {}
            self._found[name] = weakref.ref(table), state, grids
        if target not in grids:
            # a tensor made in inference mode could not enter a later graph
            with torch.inference_mode(False), torch.no_grad():
                grids[target] = resample_pos_embed(table, source, target, num_prefix_tokens)
        return grids[target]


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
    grid = table_grid(rows, source_grid, target)
    if grid is None:
        expected = f"the grid {tuple(source_grid)}" if source_grid else f"the grid {target} or a cube"
        raise ValueError(f"{where}: position table: found {rows} rows, expected {expected}; pass source_grid=(d, h, w)")
    if grid != target and not resample:
        raise ValueError(f"{where}: position table: found the grid {grid}, expected {target} as resampling is off")
    prefix = rows - math.prod(grid)
    patches = resample_pos_embed(table[:, prefix:], grid, target, num_prefix_tokens=0)
    cls_row = table[:, :1] if prefix else torch.zeros_like(table[:, :1])
    return torch.cat([cls_row, patches], dim=1) if num_prefix_tokens else patches


def table_grid(rows: int, recorded: Sequence[int] | None = None, likely: Grid | None = None) -> Grid | None:
    """Return the patch grid of a position table with `rows` rows, one of which may be that of the CLS token.

    It is `recorded`; if there is no record `likely` if the number of rows fits, else a cube. None if nothing fits.
    """
    cubes = [(side,) * 3 for side in (round(n ** (1 / 3)) for n in (rows - 1, rows)) if side > 0]
    grids = [triple(recorded, "source_grid")] if recorded else [*([likely] if likely else []), *cubes]
    return next((grid for grid in grids if rows - math.prod(grid) in (0, 1)), None)


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Return the rows `ids` (B, K) of `tokens` (B, N, C) as (B, K, C)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def cut_patches(x: Tensor, patch_size: Sequence[int], ids: Tensor | None = None) -> Tensor:
    """Return patches of volumes (B, in_chans, D, H, W) as (B, N, in_chans, pd, ph, pw), in raster order.

    Args:
        ids: (B, K), which patches, in which order. Only these are copied.
    """
    (pd, ph, pw), (d, h, w) = patch_size, grid_of(x.shape[2:], patch_size)
    patches = x.reshape(*x.shape[:2], d, pd, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, d, h, w, C, ...)
    if ids is None:
        return patches.flatten(1, 3)
    volume = torch.arange(len(x), device=x.device).unsqueeze(1)
    return patches[volume, ids // (h * w), ids // w % h, ids % w]


# ---------------------------------------------------------------- base class


class Encoder3D(nn.Module):
    """What both encoders have: checks of the input, recomputing of blocks, freezing, loading of pretrained weights.

    A subclass sets `in_chans`, `patch_size`, `grid_size`, `num_heads`, and:

        encoder_names      the tensors that a pretrained checkpoint must provide
        num_prefix_tokens  rows of a position table before those of the patches
        patch_weight       the name of the convolution weight that is applied to the voxels
        patch_features(x)  a method: the features (B, N, C) of all patches, after the final norm, in raster order
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

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, revision: str | None = None, **arguments) -> "Encoder3D":
        """Return the encoder of a folder written by Finetune.export, in evaluation mode.

        Args:
            source: the folder, or the id `owner/name` of a model with its files on the Hugging Face hub.
            revision: branch, tag or commit on the hub.
            **arguments: replace those of the folder, e.g. `img_size`, for which the position table is resampled.

        Raises:
            ValueError: there is no such folder or model, its config.json has another format or is of another class, or
                the weights are damaged or do not fit.
        """
        folder = pretrained.locate(source, revision)
        card = pretrained.read_card(folder, cls.__name__)
        own = {name: card[name] for name in inspect.signature(cls).parameters if name in card}
        try:
            model = cls(**(own | arguments))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: {cls.__name__} cannot be built from its {pretrained.CARD}: {error}") from None
        model.load_pretrained_checkpoint(folder)
        return model.eval()

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
            path: a checkpoint of this repository or of the authors, or an exported folder. Nothing in it is executed.
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
            ValueError: the file cannot be read, it records another number of attention heads, or an encoder tensor is
                missing, does not fit or is not finite. The model is then unchanged.
        """
        state, extras = pretrained.read_checkpoint(path, checkpoint_key)
        args = extras.get("args")
        # no tensor of a ViT shows them, and with another number its features would be others
        if (heads := pretrained.recorded_heads(args) or self.num_heads) != self.num_heads:
            raise ValueError(
                f"{path}: found an encoder with num_heads {heads}, expected {self.num_heads} as this model has"
            )
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
