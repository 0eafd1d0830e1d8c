"""MONAI's `MaskedAutoEncoderViT` with the sizes, weights and masks of Pretrain/models_mae.py, and the loss of MAE.

MONAI's `mlp_dim` of 512 would be another network: MAE's MLPs are 4 times as wide as the tokens.
"""

import torch
from monai.networks.nets import MaskedAutoEncoderViT
from torch import Tensor, nn

from common.training.method import Batch
from Finetune.models_3dvit import VisionTransformer3D
from Pretrain.losses import patchify
from Pretrain.masking import num_keep, random_masking, uniform
from Pretrain.models_mae import MAE, view_keys, view_major


class MonaiMAE(nn.Module):
    """MONAI's network with a copy of the weights of `method`."""

    def __init__(self, method: MAE):
        super().__init__()
        vit, self.mask_ratio = method.encoder, method.mask_ratio
        width, decoder_width = vit.embed_dim, vit.decoder_embed.out_features
        self.patch_size = vit.patch_size
        self.net = MaskedAutoEncoderViT(
            in_channels=vit.in_chans,
            img_size=vit.img_size,
            patch_size=vit.patch_size,
            hidden_size=width,
            mlp_dim=4 * width,
            num_layers=len(vit.blocks),
            num_heads=vit.blocks[0].attn.num_heads,
            masking_ratio=method.mask_ratio,
            decoder_hidden_size=decoder_width,
            decoder_mlp_dim=4 * decoder_width,
            decoder_num_layers=len(vit.decoder_blocks),
            decoder_num_heads=vit.decoder_blocks[0].attn.num_heads,
            # its own 3D sine-cosine positions need other widths; they are replaced below
            pos_embed_type="learnable",
            decoder_pos_embed_type="learnable",
            qkv_bias=True,
        )
        self.net._masking = self._masking
        copy_weights(vit, self.net)
        self._masks: tuple[Tensor, Tensor] | None = None

    def _masking(self, x: Tensor, masking_ratio: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        ids_keep, mask = self._masks
        return x[torch.arange(len(x), device=x.device).unsqueeze(1), ids_keep], ids_keep, mask

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of views batch["local"] (B, q, C, D, H, W) under the masks of batch["key"]."""
        views = batch["local"]
        x, keys = view_major(views), view_keys(batch["key"], views.shape[1], kind=0)
        target = patchify(x, self.patch_size)  # (M, N, P)
        patches = target.shape[1]
        masking = random_masking(uniform(keys, patches), num_keep(patches, self.mask_ratio))
        self._masks = masking.ids_keep, masking.mask
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        prediction, mask = self.net(x)
        error = (prediction - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()


@torch.no_grad()
def copy_weights(vit: VisionTransformer3D, net: MaskedAutoEncoderViT) -> None:
    """Give MONAI's network the weights, positions and LayerNorm epsilon of ours."""
    own, state = vit.state_dict(), {}
    state["cls_token"], state["mask_tokens"] = own["cls_token"], own["mask_token"]
    state["patch_embedding.position_embeddings"] = own["pos_embed"][:, 1:]
    state["decoder_pos_embedding"] = own["decoder_pos_embed"][:, 1:]
    renamed = {"norm1": "norm1", "attn.qkv": "attn.qkv", "attn.proj": "attn.out_proj", "norm2": "norm2"}
    renamed |= {"mlp.fc1": "mlp.linear1", "mlp.fc2": "mlp.linear2"}
    layers = {"decoder_embed": "decoder_embed", "decoder_pred": "decoder_pred"}
    layers["patch_embed.proj"] = "patch_embedding.patch_embeddings"
    for blocks, norm in (("blocks", "norm"), ("decoder_blocks", "decoder_norm")):
        depth = len(getattr(vit, blocks))
        layers[norm] = f"{blocks}.{depth}"
        layers |= {f"{blocks}.{i}.{a}": f"{blocks}.{i}.{b}" for i in range(depth) for a, b in renamed.items()}
    state |= {f"{b}.{kind}": own[f"{a}.{kind}"] for a, b in layers.items() for kind in ("weight", "bias")}
    missing, unexpected = net.load_state_dict(state, strict=False)
    # MONAI makes a norm for cross-attention that it does not use
    missing = [name for name in missing if "norm_cross_attn" not in name]
    if missing or unexpected:
        raise ValueError(f"weights of MONAI's network: {missing} are missing, {unexpected} unknown")
    # fixed, as ours are
    net.patch_embedding.position_embeddings.requires_grad_(False)
    net.decoder_pos_embedding.requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = vit.norm.eps
