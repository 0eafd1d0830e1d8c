"""3D vision transformer: the encoder of MAE and GL-MAE, with the decoder of MAE.

    B batch   (D, H, W) voxels   (d, h, w) patch grid   N = d*h*w patches   K kept patches   C width
    tokens (B, 1+N, C): the CLS token first, then the patches in raster order of (d, h, w)

Needs torch, timm, and encoder3d.py, vit_blocks.py and pretrained.py beside it, nothing else of this repository:

    from models_3dvit import vit_base_patch16_3d
    model = vit_base_patch16_3d(img_size=(96, 96, 96))
    missing_keys, unexpected_keys = model.load_pretrained_checkpoint("checkpoint-1599.pth")

Architecture and parameter names are those of the weights released with GL-MAE (arXiv 2306.08913, IEEE TMI 2025), so
that these load. The blocks compute what timm's `Block` does.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__:
    from . import encoder3d, vit_blocks
else:
    # a notebook has Finetune/ itself on its path
    import encoder3d
    import vit_blocks

SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}


# ---------------------------------------------------------------- model


class PatchEmbed3D(nn.Module):
    """Linear embedding of non-overlapping patches: (B, in_chans, D, H, W) -> (B, N, C).

    The weights are those of a convolution, applied as a linear layer: 2.6 times faster on a CPU, forward and backward.
    """

    def __init__(self, patch_size: encoder3d.Grid, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """Embed all patches, or those of `ids` (B, K) alone: (B, K, C)."""
        patches = encoder3d.cut_patches(x, self.patch_size, ids).flatten(2)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer3D(encoder3d.Encoder3D):
    """3D ViT with fixed sine-cosine positions, a CLS token, pre-norm blocks (LayerNorm eps 1e-6) and a final norm.

    Args:
        img_size: voxels (D, H, W), or one number. Sets the grid of the stored position table. Inputs of any other size
            that the patch size divides are accepted: the table is resampled for them.
        patch_size: voxels (D, H, W), or one number.
        encoder_only: False adds the MAE decoder (`decoder_*`, `mask_token`). Its default width of 576 is our choice:
            that of the authors' own 3D MAE, where the released class has 512.
        decoder: `self`, self-attention over all tokens, as in MAE. `cross`: each removed patch attends to the visible
            tokens alone, as in CrossMAE (Fu et al., arXiv 2401.14391, written from the paper's description; without its
            attention to features of several blocks: our choice). Removed patches can then be decoded in any number.
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
        decoder: Literal["self", "cross"] = "self",
        class_token: bool = True,
        num_classes: int = 0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        encoder3d.check_sizes(embed_dim, num_heads, depth)
        self.img_size, self.patch_size = (
            encoder3d.triple(img_size, "img_size"),
            encoder3d.triple(patch_size, "patch_size"),
        )
        self.grid_size = encoder3d.grid_of(self.img_size, self.patch_size)
        self.in_chans, self.embed_dim, self.num_heads = in_chans, embed_dim, num_heads
        self.num_prefix_tokens = int(class_token)
        drop_paths = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]

        self.patch_embed = PatchEmbed3D(self.patch_size, in_chans, embed_dim)
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = self._position_table(embed_dim)
        self.blocks = nn.ModuleList(
            vit_blocks.Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate) for rate in drop_paths
        )
        self.norm = nn.LayerNorm(embed_dim, eps=vit_blocks.EPS)
        self.encoder_names = tuple(self.state_dict())
        self.decoder = decoder
        self._tables = encoder3d.ResampledTables()

        if not encoder_only:
            encoder3d.check_sizes(decoder_embed_dim, decoder_num_heads)
            self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
            self.decoder_pos_embed = self._position_table(decoder_embed_dim)
            block = vit_blocks.CrossBlock if decoder == "cross" else vit_blocks.Block
            self.decoder_blocks = nn.ModuleList(
                block(decoder_embed_dim, decoder_num_heads, mlp_ratio, qkv_bias) for _ in range(decoder_depth)
            )
            self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=vit_blocks.EPS)
            self.decoder_pred = nn.Linear(decoder_embed_dim, math.prod(self.patch_size) * in_chans)
        self.head: nn.Linear | None = None
        self._init_weights()
        if num_classes > 0:
            self.add_classification_head(num_classes)

    def _position_table(self, width: int) -> nn.Parameter:
        table = encoder3d.get_3d_sincos_pos_embed(width, self.grid_size, cls_token=self.num_prefix_tokens == 1)
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
        # the last block computes the CLS token alone when only that is returned
        only_cls = self.num_prefix_tokens and ids_keep is None and not (return_features or len(return_layers))
        rows = slice(1) if only_cls else vit_blocks.ALL
        tokens, hidden = self.forward_tokens(x, ids_keep, return_layers, rows)
        if return_features:
            patches = tokens[:, self.num_prefix_tokens :]
            return {"cls_token": self._summary(tokens), "patch_features": patches, "all_features": tokens}
        if len(return_layers):
            return tokens, hidden
        if ids_keep is not None:
            return tokens
        summary = self._summary(tokens)
        return summary if self.head is None else self.head(summary)

    def patch_features(self, x: Tensor) -> Tensor:
        """Return the patch tokens (B, N, C) after the final norm, in raster order."""
        return self(x, return_features=True)["patch_features"]

    def forward_tokens(
        self,
        x: Tensor,
        ids_keep: Tensor | None = None,
        return_layers: Sequence[int] = (),
        rows: slice = vit_blocks.ALL,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the normed tokens (B, 1+K, C) and the hidden states after `return_layers`, each (B, 1+K, C).

        Args:
            rows: the rows of the tokens that are wanted; the last block computes no others.
        """
        prefix, patches, hidden = *self._positions("pos_embed", self.input_grid(x), ids_keep), []
        x = self.patch_embed(x, ids_keep) + patches  # (B, K, C)
        if self.num_prefix_tokens:
            x = torch.cat([(self.cls_token + prefix).expand(len(x), -1, -1), x], dim=1)  # (B, 1+K, C)
        for index, block in enumerate(self.blocks):
            x = self.run_block(block, x, rows if index == len(self.blocks) - 1 else vit_blocks.ALL)
            if index in return_layers:
                hidden.append(x)
        return self.norm(x), hidden

    def forward_decoder(
        self,
        latent: Tensor,
        ids_keep: Tensor,
        ids_removed: Tensor | None = None,
        grid: encoder3d.Grid | None = None,
    ) -> Tensor:
        """Predict the voxels of the removed patches: (B, R, pd*ph*pw*in_chans).

        Args:
            latent: tokens (B, 1+K, C) of the kept patches.
            ids_keep: (B, K), which patches these are.
            ids_removed: (B, R), the patches to predict. None: the kept ones are decoded, without any mask token.
            grid: patch grid (d, h, w) of the input, by default that of the position table.
        """
        grid = grid or self.grid_size
        prefix, kept = self._positions("decoder_pos_embed", grid, ids_keep)
        x = self.decoder_embed(latent)
        x = torch.cat([x[:, : prefix.shape[1]] + prefix, x[:, prefix.shape[1] :] + kept], dim=1)  # (B, 1+K, C')
        if ids_removed is None:
            x = self._self_decoder(x, slice(prefix.shape[1], None))  # (B, K, C')
        else:
            removed = self.mask_token + self._positions("decoder_pos_embed", grid, ids_removed)[1]  # (B, R, C')
            decode = self._cross_decoder if self.decoder == "cross" else self._mask_token_decoder
            x = decode(x, removed)  # (B, R, C')
        return self.decoder_pred(self.decoder_norm(x))

    def _self_decoder(self, x: Tensor, rows: slice) -> Tensor:
        """Return the rows `rows` of decoded tokens (B, T, C'). The last block computes no others."""
        for index, block in enumerate(self.decoder_blocks):
            x = block(x, rows if index == len(self.decoder_blocks) - 1 else vit_blocks.ALL)
        return x if len(self.decoder_blocks) else x[:, rows]

    def _mask_token_decoder(self, visible: Tensor, removed: Tensor) -> Tensor:
        return self._self_decoder(torch.cat([visible, removed], dim=1), slice(visible.shape[1], None))

    def _cross_decoder(self, visible: Tensor, removed: Tensor) -> Tensor:
        for block in self.decoder_blocks:
            removed = block(removed, visible)
        return removed

    def _positions(self, name: str, grid: encoder3d.Grid, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the rows of a table for a grid: of the CLS token (1, 0 or 1, C), and of the patches (1, N, C), or with
        `ids` (B, K) of these alone, (B, K, C)."""
        table = self._tables.get(name, getattr(self, name), self.grid_size, grid, self.num_prefix_tokens)
        prefix, patches = table[:, : self.num_prefix_tokens], table[:, self.num_prefix_tokens :]
        return prefix, patches if ids is None else patches[0][ids]

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
