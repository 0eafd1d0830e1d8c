"""MiM: mask in mask, a masked autoencoder on three levels of one volume (arXiv 2404.15580, IEEE TMI 2025).

    B volumes of g*s voxels per axis   s: size of every encoder input (96)   T = d*h*w tokens of 16^3 voxels per input
    S mid volumes per volume   Q down volumes per mid volume   E decoder width

    level  input                                                   masking
    up     the volume, averaged down to s voxels per axis          by units: the g^3 places of mid volumes
    mid    S of the removed units, s voxels per axis, as they are  by tokens
    down   Q removed tokens of each mid volume, 16 -> s voxels     by tokens

All levels share one encoder and one decoder. Each level reconstructs its removed tokens. The alignment losses pull the
mean decoded token of a child towards the decoded token of its parent at the place the child was cut from.

The structure is that of the authors' code, which differs from its own description in three places: it removes flat runs
of 27 tokens instead of octants, aligns the mid level with itself instead of the up level, and the down level with the
mean of its parent instead of the parent's patch. This module follows the description. `align="published"` does what the
code does in the second and third place. We could not read the body of the paper: the temperature and the default
alignment are our choice.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from common.config import setting
from common.training.method import Batch, Method, Reconstruction
from Finetune.encoder3d import Grid, ResampledTables, get_3d_sincos_pos_embed, grid_of, take
from Finetune.models_convvit3d import ConvViT3D, convvit3d_base_patch16, convvit3d_tiny_patch16, to_map, to_tokens
from Finetune.pretrained import load_matching, read_checkpoint
from Pretrain.losses import (
    align_chance,
    align_cosine,
    align_infonce,
    cosine_distance,
    masked_mse,
    norm_pix,
    patchify,
)
from Pretrain.masking import (
    Masking,
    choose_removed,
    content_patches,
    derive,
    num_keep,
    random_masking,
    uniform,
    unit_masking,
)

LEVELS = ("up", "mid", "down")
Quadruple = tuple[int, int, int, int]
Align = Literal["none", "cosine", "infonce", "published"]
HEADS = {
    "none": (),
    "cosine": ("aggregate_mid", "aggregate_down"),
    "infonce": ("aggregate_mid", "aggregate_down"),
    "published": ("aggregate_mid", "aggregate_down", "aggregate_pred_up_feature", "aggregate_pred_mid_feature"),
}


@dataclass(kw_only=True)
class MiMSettings:
    """Settings of MiM. The recipe scripts/pretrain_mim.sh says which of the defaults are the authors'."""

    embed_dims: Quadruple | None = setting(None, "widths of the encoder; none: the model's", least=1, most=65536)
    depths: Quadruple | None = setting(None, "blocks of its stages; none: the model's", least=1, most=1024)
    group: int = setting(2, "g: mid volumes per axis of the volume; must divide the token grid", least=1)
    num_mid: int = setting(4, "S: mid volumes per volume", least=1)
    num_down: int = setting(4, "Q: down volumes per mid volume", least=1)
    half_down: bool = setting(False, "enlarge removed tokens to half the size of the other levels' inputs; our choice")
    down_parts: int | None = setting(None, "backward passes of the down level; none: num_down", least=1)
    mask_ratio_up: float = setting(0.5, "share of units (places of mid volumes) removed", least=0, below=1)
    mask_ratio_mid: float = setting(0.6, "share of patches removed from mid volumes", least=0, below=1)
    mask_ratio_down: float = setting(0.5, "share of patches removed from down volumes", least=0, below=1)
    align: Align = setting("cosine", "alignment of a child with its place in the parent; published: the authors' code")
    align_temp: float = setting(0.2, "temperature of infonce", above=0)
    weight_rec_up: float = setting(1.0, "weight of the up level's reconstruction", least=0)
    weight_rec_mid: float = setting(1.0, "weight of the mid level's reconstruction", least=0)
    weight_rec_down: float = setting(1.0, "weight of the down level's reconstruction", least=0)
    weight_align_up_mid: float = setting(0.1, "weight of the alignment of mid volumes with the volume", least=0)
    weight_align_mid_down: float = setting(0.1, "weight of the alignment of down with mid volumes", least=0)
    level_mode: Literal["concurrent", "coarse_to_fine", "fine_to_coarse"] = setting(
        "concurrent", "concurrent: constant; coarse_to_fine: up falls from twice to once, down rises from 0; or reverse"
    )


# ---------------------------------------------------------------- functions


def cut_blocks(x: Tensor, block: Sequence[int], ids: Tensor) -> Tensor:
    """Return the blocks `ids` (B, k) of the volumes (B, C, D, H, W), numbered in raster order: (B*k, C, *block)."""
    batch, chans = x.shape[:2]
    (pd, ph, pw), (d, h, w) = block, [s // p for s, p in zip(x.shape[2:], block)]
    x = x.reshape(batch, chans, d, pd, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, d, h, w, C, pd, ph, pw)
    rows = torch.arange(batch, device=ids.device).unsqueeze(1)
    return x[rows, ids // (h * w), ids // w % h, ids % w].flatten(0, 1)


def cut_content(content: Tensor, block: Sequence[int], grid: Sequence[int], ids: Tensor) -> Tensor:
    """Return the content boxes of `cut_blocks`: of volumes (B, 3, 2) -> of their blocks `ids` (B, k), (B*k, 3, 2).

    Args:
        content: [start, stop) in voxels. That of a block of nothing but padding is empty, at 0 or at its size.
        grid: blocks of a volume along (D, H, W).
    """
    _, h, w = grid
    places = ids // (h * w), ids // w % h, ids % w  # (B, k) each
    cut = [
        (content[:, None, axis] - (place * size).unsqueeze(-1)).clamp(0, size)  # (B, k, 2)
        for axis, (place, size) in enumerate(zip(places, block))
    ]
    return torch.stack(cut, dim=2).flatten(0, 1)


def pool_units(tokens: Tensor, grid: Grid, group: int) -> Tensor:
    """Average over the cubic units of the grid: (B, T, E) -> (B, g^3, E), one row per place of a mid volume."""
    return to_tokens(F.avg_pool3d(to_map(tokens, grid), [n // group for n in grid]))


def level_factors(mode: str, progress: float) -> dict[str, float]:
    """Return factors of the levels' reconstruction weights at `progress` in [0, 1] of training.

    `concurrent`: all 1. `coarse_to_fine`: up falls from 2 to 1 and down rises from 0 to 1 along a quarter of a cosine
    and sine; `fine_to_coarse`: the reverse.
    """
    falling, rising = math.cos(math.pi * progress / 2) + 1, math.sin(math.pi * progress / 2)
    factors = {"concurrent": (1.0, 1.0), "coarse_to_fine": (falling, rising), "fine_to_coarse": (rising, falling)}
    if mode not in factors:
        raise ValueError(f"level_mode: found {mode!r}, expected one of {', '.join(factors)}")
    up, down = factors[mode]
    return {"up": up, "mid": 1.0, "down": down}


# ---------------------------------------------------------------- model


class MaskedDecoder(nn.Module):
    """Light transformer over all tokens, with mask tokens for the removed ones and without a CLS token."""

    def __init__(self, embed_dim: int, grid: Grid, patch_voxels: int, width: int, depth: int, num_heads: int):
        super().__init__()
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.grid_size = grid
        self.decoder_pos_embed = nn.Parameter(get_3d_sincos_pos_embed(width, grid), requires_grad=False)
        self._tables = ResampledTables()
        block = partial(Block, width, num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm_layer)
        self.decoder_blocks = nn.ModuleList(block() for _ in range(depth))
        self.decoder_norm = norm_layer(width)
        self.decoder_pred = nn.Linear(width, patch_voxels)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, ids_restore: Tensor, grid: Grid | None = None) -> Tensor:
        """Return decoded features (M, T, E) of all tokens in raster order. `decoder_pred` makes voxels (P) of them.

        Args:
            latent: (M, K, C), encoded visible tokens.
            ids_restore: (M, T), sorts visible and removed tokens back into raster order.
            grid: their grid, if it is not that of the position table, which is then resampled.
        """
        x = self.decoder_embed(latent)
        removed = self.mask_token.expand(len(x), ids_restore.shape[1] - x.shape[1], -1).to(x.dtype)
        table, target = self.decoder_pos_embed, grid or self.grid_size
        positions = self._tables.get("decoder_pos_embed", table, self.grid_size, target, num_prefix_tokens=0)
        x = take(torch.cat([x, removed], dim=1), ids_restore) + positions  # (M, T, E)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)


class MiM(Method):
    """Mask in mask. It reads `batch["image"]` (B, [1,] C, g*D, g*H, g*W) in [0, 1] and `batch["key"]` (B,), its seeds.

    Where padding is ignored it also reads `batch["image_content"]` (B, [1,] 3, 2), the box of the volume without
    padding. On every level tokens of nothing but padding have no reconstruction loss, and the next level is cut at
    places without content only when there are too few others. The alignment is over all volumes that were cut.

    `forward` returns `rec_up`, `rec_mid`, `rec_down`, and unless `align="none"` `align_up_mid` and `align_mid_down`.

    The training loop calls it `num_parts` times, so that only one part of the graph is in memory: up, mid, then the
    down volumes in `down_parts` parts. The values of the parts add up to those of the complete step. So do their
    gradients, because parents enter the alignment without gradient (`_carry`, what one part passes on to the next,
    holds no graph). DDP synchronises only the last part; the heads that only earlier parts used enter it with weight 0.

    Args:
        encoder: the hybrid encoder. Its `img_size` is the size (D, H, W) of every level's input.
        group: g, mid volumes per axis of the volume; must divide the token grid. With g = 1 the only unit is the volume
            itself. It cannot be masked in part, so the up level is masked by tokens, and the mid volume is the volume.
        mask_ratio_up, mask_ratio_mid, mask_ratio_down: shares of removed units, tokens and tokens.
        num_mid, num_down: S and Q. When fewer places were removed, visible ones are added.
        half_down: enlarge a removed token to half the size of the other levels' inputs. The down level, most of the
            work, then has an eighth of the tokens; for 96^3 they show 16/3 voxels of the volume per axis, not 16/6.
        down_parts: backward passes of the down level. None: `num_down`, one down volume per mid volume each.
        align: `cosine` (2 - 2 cos with the child's place) or `infonce` (the child's place against the others of the
            parent). Children pass through a trainable head and parents do not, so a constant is no solution.
            `published`: as the authors' code computes it (the mid level aligned with itself, the down level with its
            parent's mean), for comparison.
        align_temp: temperature of `infonce`.
        norm_pix_loss: normalise the target of each patch.
        norm_pix_eps: added to its variance.
        decoder_embed_dim, decoder_depth, decoder_num_heads: sizes of the decoder.

    Raises:
        ValueError: the sizes do not fit each other; the message names the argument.
    """

    def __init__(
        self,
        encoder: ConvViT3D,
        *,
        group: int = 2,
        mask_ratio_up: float = 0.5,
        mask_ratio_mid: float = 0.6,
        mask_ratio_down: float = 0.5,
        num_mid: int = 4,
        num_down: int = 4,
        half_down: bool = False,
        down_parts: int | None = None,
        align: Align = "cosine",
        align_temp: float = 0.2,
        norm_pix_loss: bool = True,
        norm_pix_eps: float = 1e-6,
        decoder_embed_dim: int = 576,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
    ):
        super().__init__()
        grid, units = encoder.grid_size, group**3
        tokens = math.prod(grid)
        if group < 1 or any(n % group for n in grid):
            raise ValueError(f"group {group} does not divide the token grid {grid}")
        if not 1 <= num_mid <= units or not 1 <= num_down <= tokens:
            raise ValueError(
                f"num_mid {num_mid} must be in 1..{units} (group^3), num_down {num_down} in 1..{tokens} (tokens)"
            )
        self.down_parts = num_down if down_parts is None else down_parts
        if not 1 <= self.down_parts <= num_mid * num_down:
            raise ValueError(f"down_parts {down_parts} must be in 1..{num_mid * num_down} (down volumes per volume)")
        if align not in HEADS:
            raise ValueError(f"align: found {align!r}, expected one of {', '.join(HEADS)}")
        if half_down and any(n % 2 for n in grid):
            raise ValueError(f"half_down: found the token grid {grid}, expected even numbers")
        self.down_size = tuple(n // 2 if half_down else n for n in encoder.img_size)
        self.down_grid = grid_of(self.down_size, encoder.patch_size)
        places = {"up": units if group > 1 else tokens, "mid": tokens, "down": math.prod(self.down_grid)}
        ratios = {"up": mask_ratio_up, "mid": mask_ratio_mid, "down": mask_ratio_down}
        self.keep = {level: num_keep(places[level], ratios[level]) for level in LEVELS}
        for level in (level for level in LEVELS if self.keep[level] == places[level]):
            raise ValueError(f"mask_ratio_{level} {ratios[level]} removes none of {places[level]} places")
        self.group, self.num_mid, self.num_down = group, num_mid, num_down
        self.align, self.align_temp = align, align_temp
        self.norm_pix_loss, self.norm_pix_eps = norm_pix_loss, norm_pix_eps
        self._align = align_cosine if align == "cosine" else partial(align_infonce, temperature=align_temp)
        self.num_parts = 2 + self.down_parts

        self.encoder = encoder
        patch_voxels = math.prod(encoder.patch_size) * encoder.in_chans
        sizes = decoder_embed_dim, decoder_depth, decoder_num_heads
        self.decoder = MaskedDecoder(encoder.embed_dim, grid, patch_voxels, *sizes)
        for name in HEADS[align]:
            self.add_module(name, Mlp(decoder_embed_dim))
        for module in (m for name, m in self.named_modules() if not name.startswith("encoder")):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self._carry: dict[str, Tensor] = {}
        # filled by `reconstructions`
        self._seen: list[Reconstruction] | None = None

    # ------------------------------------------------------------ forward

    def forward(self, batch: Batch, step: int = 0, part: int | None = None) -> dict[str, Tensor]:
        """Return the losses of one part, or with None of all levels in one graph (the reference in tests)."""
        parts = range(self.num_parts) if part is None else [part]
        values: dict[str, Tensor] = {}
        for index in parts:
            run = self._up if index == 0 else self._mid if index == 1 else partial(self._down, piece=index - 2)
            for name, value in run(batch).items():
                values[name] = values[name] + value if name in values else value
        return values

    def _up(self, batch: Batch) -> dict[str, Tensor]:
        image, keys, boxes = self._image(batch), batch["key"], self._boxes(batch)
        grid, units = self.encoder.grid_size, self.group**3
        # a token of the averaged volume is g times as wide in the volume
        content = self._content(boxes, [self.group * n for n in self.encoder.patch_size], grid)  # (B, T)
        unit_content = self._content(boxes, self.encoder.img_size, (self.group,) * 3)  # (B, g^3)
        # for g = 2 exactly the authors' trilinear resize
        x = F.avg_pool3d(image, self.group)  # (B, C, D, H, W)
        if self.group > 1:
            noise = uniform(derive(keys, 0), units)
            masking, unit_mask = unit_masking(noise, self.keep["up"], grid, unit_content, content)
        else:
            masking = random_masking(uniform(derive(keys, 0), math.prod(grid)), self.keep["up"], content)
            unit_mask = torch.ones_like(keys, dtype=torch.float32).unsqueeze(1)
        loss, feature = self.reconstruct(x, masking)
        labels = choose_removed(uniform(derive(keys, 1), units), unit_mask, self.num_mid, unit_content)  # (B, S)
        self._carry = {"labels": labels, "parent": pool_units(feature.detach(), grid, self.group)}
        return {"rec_up": loss}

    def _mid(self, batch: Batch) -> dict[str, Tensor]:
        keys, count, tokens = batch["key"], self.num_mid, math.prod(self.encoder.grid_size)
        labels, parent, boxes = self._carry["labels"], self._carry["parent"], self._boxes(batch)
        # from the unmasked volume: every level draws its own mask
        x = cut_blocks(self._image(batch), self.encoder.img_size, labels)  # (B*S, C, D, H, W)
        if boxes is not None:
            boxes = cut_content(boxes, self.encoder.img_size, (self.group,) * 3, labels)  # (B*S, 3, 2)
        content = self._content(boxes, self.encoder.patch_size, self.encoder.grid_size)  # (B*S, T)
        masking = random_masking(self._noise(keys, 2, count, tokens), self.keep["mid"], content)
        loss, feature = self.reconstruct(x, masking)
        chosen = choose_removed(self._noise(keys, 3, count, tokens), masking.mask, self.num_down, content)  # (B*S, Q)
        self._carry = {"volumes": x, "labels": chosen, "parent": feature.detach()}
        if boxes is not None:
            self._carry["boxes"] = boxes
        values, child = {"rec_mid": loss}, feature.mean(dim=1)  # (B*S, E)
        if self.align == "published":
            # row // S indexes the mid level, where a row of the up level was meant
            rows = torch.arange(len(child), device=child.device) // count
            values["align_up_mid"] = cosine_distance(child[rows], self.aggregate_mid(child)).mean()
        elif self.align != "none":
            parent = parent.repeat_interleave(count, dim=0)  # (B*S, g^3, E)
            child = self.aggregate_mid(child)
            values["align_up_mid"] = self._align(child, parent, labels.flatten())
            values |= self._chance("up_mid", child, parent)
        return values

    def _down(self, batch: Batch, piece: int) -> dict[str, Tensor]:
        volumes, labels, parent = self._carry["volumes"], self._carry["labels"], self._carry["parent"]
        count = self.num_down
        # R of the B*S*Q down volumes
        rows = torch.arange(labels.numel(), device=labels.device).tensor_split(self.down_parts)[piece]  # (R,)
        own, share = rows // count, len(rows) / labels.numel()
        x = cut_blocks(volumes[own], self.encoder.patch_size, labels.flatten()[rows].unsqueeze(1))  # (R, C, 16, 16, 16)
        x = F.interpolate(x, size=self.down_size, mode="trilinear", align_corners=False)
        noise = self._noise(batch["key"], 4, self.num_mid * count, math.prod(self.down_grid))[rows]
        content = self._down_content(own, labels.flatten()[rows])  # (R, T)
        loss, feature = self.reconstruct(x, random_masking(noise, self.keep["down"], content))
        values = {"rec_down": loss * share}
        if self.align != "none":
            child = self.aggregate_down(feature.mean(dim=1))  # (R, E)
            if self.align == "published":
                # the parent's mean, where its patch was meant
                target = self.aggregate_pred_mid_feature(parent.mean(dim=1))[own]
                loss = cosine_distance(target, child).mean()
            else:
                loss = self._align(child, parent[own], labels.flatten()[rows])
                values |= self._chance("mid_down", child, parent[own], share)
            values["align_mid_down"] = loss * share
        if piece == self.down_parts - 1:
            self._carry = {}
            values["rec_down"] = values["rec_down"] + 0.0 * sum(p.sum() for p in self._heads_not_in_down())
        return values

    def _down_content(self, own: Tensor, labels: Tensor) -> Tensor | None:
        """Return `_content` of down volumes, from the rows of their parents and their places in them, (R,) each."""
        boxes, grid = self._carry.get("boxes"), self.encoder.grid_size
        if boxes is None:
            return None
        boxes = cut_content(boxes[own], self.encoder.patch_size, grid, labels.unsqueeze(1))  # (R, 3, 2)
        # enlarged from a patch to `down_grid` patches; the blur beyond the edge counts as padding
        boxes = torch.stack([boxes[:, axis] * factor for axis, factor in enumerate(self.down_grid)], dim=1)
        return self._content(boxes, self.encoder.patch_size, self.down_grid)

    def _heads_not_in_down(self) -> list[nn.Parameter]:
        heads = set(HEADS[self.align]) - {"aggregate_down", "aggregate_pred_mid_feature"}
        return [p for name in sorted(heads) for p in self.get_submodule(name).parameters()]

    def reconstruct(self, x: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
        """Return the loss of the removed tokens of x (M, C, D, H, W), and the decoded features (M, T, E)."""
        grid = grid_of(x.shape[2:], self.encoder.patch_size)
        feature = self.decoder(self.encoder(x, ids_keep=masking.ids_keep), masking.ids_restore, grid)
        if self._seen is not None:
            self._seen.append(Reconstruction(x, masking.mask, self.decoder.decoder_pred(feature)))
        removed = masking.ids_removed
        prediction = self.decoder.decoder_pred(take(feature, removed))  # (M, T-K, P)
        target = patchify(x, self.encoder.patch_size, removed)
        target = norm_pix(target, self.norm_pix_eps) if self.norm_pix_loss else target
        return masked_mse(prediction, target, masking.mask.gather(1, removed)), feature

    def _chance(self, levels: str, child: Tensor, keys: Tensor, share: float = 1.0) -> dict[str, Tensor]:
        """Return the alignment by chance while the model is evaluated and there are places to choose from."""
        if self.training or keys.shape[1] == 1:
            return {}
        temperature = self.align_temp if self.align == "infonce" else None
        return {f"chance_{levels}": align_chance(child, keys, temperature) * share}

    @staticmethod
    def _boxes(batch: Batch) -> Tensor | None:
        """Return the content boxes (B, 3, 2) of the volumes, None unless padding is ignored."""
        boxes = batch.get("image_content")
        return None if boxes is None else boxes.view(-1, 3, 2)

    @staticmethod
    def _content(boxes: Tensor | None, patch_size: Sequence[int], grid: Sequence[int]) -> Tensor | None:
        return None if boxes is None else content_patches(boxes, patch_size, grid)

    @staticmethod
    def _noise(keys: Tensor, stream: int, volumes: int, tokens: int) -> Tensor:
        """Return noise (B*volumes, tokens), a function of the sample and the volume, not of process or part."""
        return uniform(derive(keys, stream), volumes * tokens).view(-1, tokens)

    def _image(self, batch: Batch) -> Tensor:
        image, size = batch["image"], tuple(self.group * n for n in self.encoder.img_size)
        # one view of each volume
        if image.ndim == 6 and image.shape[1] == 1:
            image = image.squeeze(1)
        if image.ndim != 5 or tuple(image.shape[2:]) != size:
            wanted = f"(B, {self.encoder.in_chans}, {', '.join(map(str, size))})"
            raise ValueError(f"batch['image']: found shape {tuple(image.shape)}, expected {wanted}")
        return image

    @torch.no_grad()
    def reconstructions(self, batch: Batch) -> dict[str, Reconstruction]:
        """Return input and prediction of each level; of the down level only the first part."""
        self._seen = []
        try:
            # up, mid and the first part of down
            for part in range(len(LEVELS)):
                self(batch, part=part)
            return dict(zip(LEVELS, self._seen))
        finally:
            self._seen, self._carry = None, {}

    # ------------------------------------------------------------ checkpoint

    def checkpoint_state(self) -> dict[str, Any]:
        """Return `model` under the authors' names, which have no prefixes for encoder and decoder."""
        return {"model": {_flat(name): value for name, value in self.state_dict().items()}}

    def load_checkpoint_state(self, content: dict[str, Any]) -> None:
        self.load_state_dict(self._nested(content["model"]))

    def load_pretrained_checkpoint(self, path) -> tuple[list[str], list[str]]:
        """Load encoder, decoder and those alignment heads that the file has, of this repository or the authors.

        Returns:
            (missing_keys, unexpected_keys), under the names of the file.

        Raises:
            ValueError: a tensor of the encoder or decoder is missing or does not fit. The model is unchanged.
        """
        state, _ = read_checkpoint(path)
        required = [name for name in self.state_dict() if not name.startswith("aggregate_")]
        self.load_report = load_matching(self, self._nested(state), required, False, path)
        for names in (self.load_report.matched, self.load_report.missing, self.load_report.unexpected):
            names[:] = map(_flat, names)
        return self.load_report.missing, self.load_report.unexpected

    def _nested(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {_flat(name): name for name in self.state_dict()}
        return {own.get(name, name): value for name, value in state.items()}


def _flat(name: str) -> str:
    return name.removeprefix("encoder.").removeprefix("decoder.")


# ---------------------------------------------------------------- factories


def _mim(encoder: Callable[..., ConvViT3D], defaults: dict, overrides: dict) -> MiM:
    settings = dict(defaults, **overrides)
    names = [name for name in inspect.signature(ConvViT3D).parameters if name in settings]
    return MiM(encoder(**{name: settings.pop(name) for name in names}), **settings)


def mim_convvit3d_tiny_patch16(**kwargs) -> MiM:
    """MiM with the tiny encoder. Its decoder, a quarter of base's width, is our choice. Arguments as for base."""
    return _mim(convvit3d_tiny_patch16, dict(decoder_embed_dim=144, decoder_depth=8, decoder_num_heads=4), kwargs)


def mim_convvit3d_base_patch16(**kwargs) -> MiM:
    """MiM in the authors' sizes. Takes every keyword argument of `ConvViT3D` and of `MiM`."""
    return _mim(convvit3d_base_patch16, dict(decoder_embed_dim=576, decoder_depth=8, decoder_num_heads=16), kwargs)
