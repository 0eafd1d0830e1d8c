"""MiM: mask in mask, a masked autoencoder on three levels of one volume (arXiv 2404.15580, IEEE TMI 2025).

    B volumes of g*s voxels per axis   s: size of every encoder input (96)   T = d*h*w tokens of 16^3 voxels per input
    S mid volumes per volume   Q down volumes per mid volume   E decoder width

    up     the whole volume, averaged down to s                       masked in whole units: the g^3 regions that become
    mid volumes mid    S of its removed units, each s voxels wide as they are     masked token by token
    down   Q removed tokens of each mid volume, 16 -> s voxels        masked token by token

One encoder and one decoder serve all levels. Each level reconstructs its removed tokens; a child's mean decoded token
is pulled towards its parent's decoded token at the place the child was cut from. Structure: the authors' code; where
that is at odds with itself (flat 27-token chunks for octants, level 2 aligned with itself, a parent's mean for a
parent's patch) we build what it says it does, and keep what it does as `align="published"`. The body of the paper was
not readable to us: the temperature and the default alignment are our choice.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from Finetune.models_3dvit import Grid, get_3d_sincos_pos_embed, load_matching, read_checkpoint, take
from Finetune.models_convvit3d import ConvViT3D, convvit3d_base_patch16, convvit3d_tiny_patch16, to_map, to_tokens
from Pretrain.losses import masked_mse, norm_pix, patchify
from Pretrain.masking import derive, num_keep, random_masking, uniform
from Pretrain.models_mae import Reconstructed

LEVELS = ("up", "mid", "down")
Align = Literal["none", "cosine", "infonce", "published"]
HEADS = {
    "none": (),
    "cosine": ("aggregate_mid", "aggregate_down"),
    "infonce": ("aggregate_mid", "aggregate_down"),
    "published": ("aggregate_mid", "aggregate_down", "aggregate_pred_up_feature", "aggregate_pred_mid_feature"),
}


# ---------------------------------------------------------------- functions


class Masking(NamedTuple):
    """Which tokens of M volumes are seen; as `random_masking` returns them."""

    ids_keep: Tensor  # (M, K)
    ids_restore: Tensor  # (M, T)
    mask: Tensor  # (M, T), 1 = removed


def unit_masking(noise: Tensor, keep: int, grid: Grid) -> tuple[Masking, Tensor]:
    """Keep `keep` of the g^3 cubic units of a token grid (d, h, w), those of lowest noise (B, g^3), and all tokens in
    them.

    Returns the masking of tokens, and the mask of units (B, g^3) with 1 = removed.
    """
    units = noise.shape[1]
    group = round(units ** (1 / 3))
    _, rank, unit_mask = random_masking(noise, keep)  # ranks, unlike noise, are never equal
    blocks = rank.float().view(-1, 1, group, group, group)
    tokens = F.interpolate(blocks, size=grid, mode="nearest-exact").flatten(1)  # (B, T)
    return Masking(*random_masking(tokens, keep * tokens.shape[1] // units)), unit_mask


def choose_removed(noise: Tensor, mask: Tensor, count: int) -> Tensor:
    """`count` places of highest noise among the removed (B, n), visible ones only where the removed do not suffice: (B,
    count).
    """
    return (mask + noise).topk(count, dim=1).indices


def cut_blocks(x: Tensor, block: Sequence[int], ids: Tensor) -> Tensor:
    """Blocks `ids` (B, k) of the volumes (B, C, D, H, W), counted in raster order of the grid of blocks: (B*k, C,
    *block).
    """
    batch, chans = x.shape[:2]
    (pd, ph, pw), (d, h, w) = block, [s // p for s, p in zip(x.shape[2:], block)]
    x = x.reshape(batch, chans, d, pd, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, d, h, w, C, pd, ph, pw)
    rows = torch.arange(batch, device=ids.device).unsqueeze(1)
    return x[rows, ids // (h * w), ids // w % h, ids % w].flatten(0, 1)


def pool_units(tokens: Tensor, grid: Grid, group: int) -> Tensor:
    """Mean over the cubic units of the grid: (B, T, E) -> (B, g^3, E), one row for each place a mid volume may come
    from.
    """
    return to_tokens(F.avg_pool3d(to_map(tokens, grid), [n // group for n in grid]))


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """2 - 2 cos over the last axis, in float32."""
    return 2.0 - 2.0 * F.cosine_similarity(a.float(), b.float(), dim=-1)


def align_cosine(child: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    """Each child (R, E) with its own place `labels` (R,) among its parent's features (R, n, E). Mean over children."""
    own = keys[torch.arange(len(labels), device=labels.device), labels]  # (R, E)
    return cosine_distance(child, own).mean()


def align_infonce(child: Tensor, keys: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Which place of its parent is a child (R, E) from? Cross-entropy over all places of that parent (R, n, E). Mean
    over children.
    """
    child, keys = F.normalize(child.float(), dim=-1), F.normalize(keys.float(), dim=-1)
    logits = (child.unsqueeze(1) * keys).sum(dim=-1) / temperature  # (R, n); a sum, as autocast would lower an einsum
    return F.cross_entropy(logits, labels)


def level_factors(mode: str, progress: float) -> dict[str, float]:
    """Factors of the levels' reconstruction weights at `progress` in [0, 1] of training.

    `concurrent`: all 1. `coarse_to_fine`: up from 2 to 1, down from 0 to 1; `fine_to_coarse` the other way round
    (quarter cosine and sine).
    """
    falling, rising = math.cos(math.pi * progress / 2) + 1, math.sin(math.pi * progress / 2)
    factors = {"concurrent": (1.0, 1.0), "coarse_to_fine": (falling, rising), "fine_to_coarse": (rising, falling)}
    if mode not in factors:
        raise ValueError(f"mode: found {mode!r}, allowed: {', '.join(factors)}")
    up, down = factors[mode]
    return {"up": up, "mid": 1.0, "down": down}


# ---------------------------------------------------------------- model


class MaskedDecoder(nn.Module):
    """Light transformer over all tokens, removed ones as mask tokens. Gives decoded features as well as voxels; has no
    CLS token.
    """

    def __init__(self, embed_dim: int, grid: Grid, patch_voxels: int, width: int, depth: int, num_heads: int):
        super().__init__()
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(get_3d_sincos_pos_embed(width, grid), requires_grad=False)
        block = partial(Block, width, num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm_layer)
        self.decoder_blocks = nn.ModuleList(block() for _ in range(depth))
        self.decoder_norm = norm_layer(width)
        self.decoder_pred = nn.Linear(width, patch_voxels)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, ids_restore: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (M, K, C) of kept tokens and their way back to raster order (M, T) -> features (M, T, E), voxels (M,
        T, P).
        """
        x = self.decoder_embed(latent)
        removed = self.mask_token.expand(len(x), ids_restore.shape[1] - x.shape[1], -1).to(x.dtype)
        x = take(torch.cat([x, removed], dim=1), ids_restore) + self.decoder_pos_embed  # (M, T, E)
        for block in self.decoder_blocks:
            x = block(x)
        feature = self.decoder_norm(x)
        return feature, self.decoder_pred(feature)


class MiM(nn.Module):
    """Mask in mask on `batch["image"]` (B, [1,] C, g*D, g*H, g*W) in [0, 1], all draws from `batch["key"]` (B,) int64.

    `forward` gives `rec_up`, `rec_mid`, `rec_down`, and unless `align="none"` `align_up_mid`, `align_mid_down`.

    The training loop calls it `num_parts` times, once for each piece that fits in memory on its own: up, mid, then the
    down volumes in `down_parts` pieces. A part's values are shares: they add up to the whole. Parents enter the
    alignment without gradient, so the parts' gradients add up to those of the whole too (and what one part leaves for
    the next, `_carry`, holds no graph). Under DDP only the last part is synchronised; it ties in, with weight 0, the
    heads that only earlier parts used.

    Args:
        encoder: the hybrid encoder, its `img_size` the size (D, H, W) of every level's input.
        group: g, mid volumes per axis of the whole; must divide the token grid. With g = 1 there is one
            unit, the volume itself: it cannot be masked in part, so the up level is masked token by token and the only
            mid volume is the whole.
        mask_ratio_up, mask_ratio_mid, mask_ratio_down: shares of removed units, tokens, tokens.
        num_mid, num_down: S and Q. More than were removed are filled up with visible ones.
        down_parts: pieces of the down level; None: one down volume for each mid volume at a time.
        align: `cosine` (2 - 2 cos with the own place) or `infonce` (own place against the others of the parent);
            children pass a trainable head, parents none, so a constant is no solution. `published`: what the authors'
            code computes (it aligns the mid level with itself, and the down level with its parent's mean), for
            comparison.
        temperature: of `infonce`.
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
        down_parts: int | None = None,
        align: Align = "cosine",
        temperature: float = 0.2,
        norm_pix_loss: bool = True,
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
            raise ValueError(f"align: found {align!r}, allowed: {', '.join(HEADS)}")
        places = {"up": units if group > 1 else tokens, "mid": tokens, "down": tokens}
        ratios = {"up": mask_ratio_up, "mid": mask_ratio_mid, "down": mask_ratio_down}
        self.keep = {level: num_keep(places[level], ratios[level]) for level in LEVELS}
        for level in LEVELS:
            if self.keep[level] == places[level]:
                raise ValueError(f"mask_ratio_{level} {ratios[level]} removes none of {places[level]} places")
        self.group, self.num_mid, self.num_down = group, num_mid, num_down
        self.align, self.temperature, self.norm_pix_loss = align, temperature, norm_pix_loss
        self.num_parts = 2 + self.down_parts

        self.encoder = encoder
        patch_voxels = math.prod(encoder.patch_size) * encoder.in_chans
        self.decoder = MaskedDecoder(
            encoder.embed_dim, grid, patch_voxels, decoder_embed_dim, decoder_depth, decoder_num_heads
        )
        for name in HEADS[align]:
            self.add_module(name, Mlp(decoder_embed_dim))
        for module in (m for name, m in self.named_modules() if not name.startswith("encoder")):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self._carry: dict[str, Tensor] = {}
        self._seen: list[Reconstructed] | None = None

    # ------------------------------------------------------------ forward

    def forward(self, batch: dict[str, Tensor], step: int = 0, part: int | None = None) -> dict[str, Tensor]:
        """The losses of one part, or of all levels at once (part None: one graph, the form the parts are tested
        against).
        """
        parts = range(self.num_parts) if part is None else [part]
        values: dict[str, Tensor] = {}
        for index in parts:
            run = self._up if index == 0 else self._mid if index == 1 else partial(self._down, piece=index - 2)
            for name, value in run(batch).items():
                values[name] = values[name] + value if name in values else value
        return values

    def _up(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, keys = self._image(batch), batch["key"]
        units, tokens = self.group**3, math.prod(self.encoder.grid_size)
        x = F.avg_pool3d(image, self.group)  # (B, C, D, H, W); for g = 2 the authors' trilinear resize, exactly
        if self.group > 1:
            masking, unit_mask = unit_masking(uniform(derive(keys, 0), units), self.keep["up"], self.encoder.grid_size)
        else:
            masking = Masking(*random_masking(uniform(derive(keys, 0), tokens), self.keep["up"]))
            unit_mask = torch.ones_like(keys, dtype=torch.float32).unsqueeze(1)
        loss, feature = self._reconstruct(x, masking)
        labels = choose_removed(uniform(derive(keys, 1), units), unit_mask, self.num_mid)  # (B, S)
        self._carry = {"labels": labels, "parent": pool_units(feature.detach(), self.encoder.grid_size, self.group)}
        return {"rec_up": loss}

    def _mid(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        keys, count, tokens = batch["key"], self.num_mid, math.prod(self.encoder.grid_size)
        labels, parent = self._carry["labels"], self._carry["parent"]
        x = cut_blocks(self._image(batch), self.encoder.img_size, labels)  # (B*S, C, D, H, W), intact: masks start anew
        masking = Masking(*random_masking(self._noise(keys, 2, count, tokens), self.keep["mid"]))
        loss, feature = self._reconstruct(x, masking)
        chosen = choose_removed(self._noise(keys, 3, count, tokens), masking.mask, self.num_down)  # (B*S, Q)
        self._carry = {"volumes": x, "labels": chosen, "parent": feature.detach()}
        values = {"rec_mid": loss}
        if self.align != "none":
            child = feature.mean(dim=1)  # (B*S, E)
            if self.align == "published":  # row // S is a row of the mid level where a row of the up level was meant
                rows = torch.arange(len(child), device=child.device) // count
                values["align_up_mid"] = cosine_distance(child[rows], self.aggregate_mid(child)).mean()
            else:
                parent = parent.repeat_interleave(count, dim=0)  # (B*S, g^3, E)
                values["align_up_mid"] = self._align(self.aggregate_mid(child), parent, labels.flatten())
        return values

    def _down(self, batch: dict[str, Tensor], piece: int) -> dict[str, Tensor]:
        volumes, labels, parent = self._carry["volumes"], self._carry["labels"], self._carry["parent"]
        grid, count = self.encoder.grid_size, self.num_down
        rows = torch.arange(labels.numel(), device=labels.device).tensor_split(self.down_parts)[piece]  # of B*S*Q
        own, share = rows // count, len(rows) / labels.numel()
        x = cut_blocks(volumes[own], self.encoder.patch_size, labels.flatten()[rows].unsqueeze(1))  # (R, C, 16, 16, 16)
        x = F.interpolate(x, size=self.encoder.img_size, mode="trilinear", align_corners=False)
        noise = self._noise(batch["key"], 4, self.num_mid * count, math.prod(grid))[rows]
        loss, feature = self._reconstruct(x, Masking(*random_masking(noise, self.keep["down"])))
        values = {"rec_down": loss * share}
        if self.align != "none":
            child = self.aggregate_down(feature.mean(dim=1))  # (R, E)
            if self.align == "published":  # the parent's mean where its patch was meant
                target = self.aggregate_pred_mid_feature(parent.mean(dim=1))[own]
                loss = cosine_distance(target, child).mean()
            else:
                loss = self._align(child, parent[own], labels.flatten()[rows])
            values["align_mid_down"] = loss * share
        if piece == self.down_parts - 1:
            self._carry = {}
            values["rec_down"] = values["rec_down"] + 0.0 * sum(p.sum() for p in self._idle_in_down())
        return values

    def _idle_in_down(self) -> list[nn.Parameter]:
        heads = set(HEADS[self.align]) - {"aggregate_down", "aggregate_pred_mid_feature"}
        return [p for name in sorted(heads) for p in self.get_submodule(name).parameters()]

    def _reconstruct(self, x: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
        """The loss of removed tokens of x (M, C, D, H, W), and the decoded features (M, T, E)."""
        feature, prediction = self.decoder(self.encoder(x, ids_keep=masking.ids_keep), masking.ids_restore)
        if self._seen is not None:
            self._seen.append(Reconstructed(x, masking.mask, prediction))
        target = patchify(x, self.encoder.patch_size)
        return masked_mse(prediction, norm_pix(target) if self.norm_pix_loss else target, masking.mask), feature

    def _align(self, child: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
        if self.align == "cosine":
            return align_cosine(child, keys, labels)
        return align_infonce(child, keys, labels, self.temperature)

    @staticmethod
    def _noise(keys: Tensor, stream: int, volumes: int, tokens: int) -> Tensor:
        """(B*volumes, tokens): every volume of a sample has its own, whichever process or part it is in."""
        return uniform(derive(keys, stream), volumes * tokens).view(-1, tokens)

    def _image(self, batch: dict[str, Tensor]) -> Tensor:
        image, size = batch["image"], tuple(self.group * n for n in self.encoder.img_size)
        if image.ndim == 6 and image.shape[1] == 1:  # one view of each volume
            image = image.squeeze(1)
        if image.ndim != 5 or tuple(image.shape[2:]) != size:
            wanted = f"(B, {self.encoder.in_chans}, {', '.join(map(str, size))})"
            raise ValueError(f"found images {tuple(image.shape)}, needs {wanted}")
        return image

    @torch.no_grad()
    def reconstructions(self, batch: dict[str, Tensor]) -> dict[str, Reconstructed]:
        """What each level was given and what it predicts, for pictures; of the down level its first piece."""
        self._seen = []
        try:
            for part in range(self.num_parts):
                self(batch, part=part)
            return dict(zip(LEVELS, self._seen))
        finally:
            self._seen = None

    # ------------------------------------------------------------ checkpoint

    def checkpoint_state(self) -> dict[str, Any]:
        """`model` under the authors' names: encoder and decoder side by side, without a prefix."""
        return {"model": {_flat(name): value for name, value in self.state_dict().items()}}

    def load_checkpoint_state(self, content: dict[str, Any]) -> None:
        self.load_state_dict(self._nested(content["model"]))

    def load_pretrained_checkpoint(self, path) -> tuple[list[str], list[str]]:
        """Start from a checkpoint of ours or of the authors; returns (missing_keys, unexpected_keys), the flat names of
        the file.

        Encoder and decoder must be there and fit (ValueError otherwise, with the model unchanged); alignment heads are
        taken where both sides have them.
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
    """The tiny encoder; its decoder, a quarter of base's width, is our choice. Takes what `ConvViT3D` and `MiM`
    take.
    """
    return _mim(convvit3d_tiny_patch16, dict(decoder_embed_dim=144, decoder_depth=8, decoder_num_heads=4), kwargs)


def mim_convvit3d_base_patch16(**kwargs) -> MiM:
    """The authors' sizes. Takes every keyword argument of `ConvViT3D` and of `MiM`."""
    return _mim(convvit3d_base_patch16, dict(decoder_embed_dim=576, decoder_depth=8, decoder_num_heads=16), kwargs)
