"""MAE and GL-MAE composed of timm's blocks in the obvious way: what a reader of the papers would write down first.

Every patch is embedded before the visible ones are chosen, every patch is predicted and compared with its target before
the loss is restricted to the removed ones, every block is timm's `Block`, and one backward pass follows all losses.
The parameters have the names of Pretrain/models_glmae.py, so that one state dict fits both. Masks and the projection
head are those of Pretrain/.

M views   N patches   K kept   C width   P voxels of a patch
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from common.training.method import Batch
from Finetune.encoder3d import resample_pos_embed, take
from Finetune.models_3dvit import VisionTransformer3D
from Pretrain.losses import patchify
from Pretrain.masking import num_keep, random_masking, uniform
from Pretrain.models_glmae import GLMAE
from Pretrain.models_mae import view_keys, view_major


def timm_blocks(blocks: nn.ModuleList) -> nn.ModuleList:
    """Return timm's blocks of the widths and numbers of heads of `blocks`."""
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    sizes = [(block.norm1.normalized_shape[0], block.attn.num_heads) for block in blocks]
    return nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm_layer) for width, heads in sizes)


class ReferenceViT(nn.Module):
    """The encoder of `vit`, and its decoder where it has one. It takes over the modules of `vit` except the blocks."""

    def __init__(self, vit: VisionTransformer3D):
        super().__init__()
        self.patch_size, self.grid_size, self.embed_dim = vit.patch_size, vit.grid_size, vit.embed_dim
        for name, child in vit.named_children():
            setattr(self, name, timm_blocks(child) if name.endswith("blocks") else child)
        for name, parameter in vit.named_parameters(recurse=False):
            setattr(self, name, parameter)

    def encode(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        grid = tuple(size // patch for size, patch in zip(x.shape[2:], self.patch_size))
        pos_embed = resample_pos_embed(self.pos_embed, self.grid_size, grid)
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2) + pos_embed[:, 1:]  # (M, N, C)
        x = x if ids_keep is None else take(x, ids_keep)  # (M, K, C)
        x = torch.cat([(self.cls_token + pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, tokens: Tensor, ids_restore: Tensor, grid: tuple[int, ...]) -> Tensor:
        x = self.decoder_embed(tokens)
        removed = self.mask_token.expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
        x = torch.cat([x[:, :1], take(torch.cat([x[:, 1:], removed], dim=1), ids_restore)], dim=1)
        x = x + resample_pos_embed(self.decoder_pos_embed, self.grid_size, grid)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # (M, N, P)

    def masked_views(self, views: Tensor, keys: Tensor, kind: int, mask_ratio: float) -> tuple[Tensor, Tensor]:
        """Return the tokens (M, 1+K, C) of the visible patches of (B, q, 1, D, H, W), and the reconstruction loss."""
        x, keys = view_major(views), view_keys(keys, views.shape[1], kind)
        target = patchify(x, self.patch_size)  # (M, N, P)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        patches = target.shape[1]
        ids_keep, ids_restore, mask = random_masking(uniform(keys, patches), num_keep(patches, mask_ratio))[:3]
        tokens = self.encode(x, ids_keep)
        prediction = self.decode(tokens, ids_restore, tuple(s // p for s, p in zip(x.shape[2:], self.patch_size)))
        error = (prediction - target).square().mean(dim=-1)
        return tokens, (error * mask).sum() / mask.sum()


class ReferenceGLMAE(nn.Module):
    """GL-MAE's four losses with cross-entropy over prototypes, from the modules and parameters of `method`."""

    def __init__(self, method: GLMAE):
        super().__init__()
        copied = copy.deepcopy(method)
        self.student, self.teacher = copied.student, copied.teacher
        for network in (self.student, self.teacher):
            network["backbone"] = ReferenceViT(network["backbone"])
        self.teacher.requires_grad_(False)
        self.register_buffer("center", method.center)
        self.mask_ratio, self.student_temp = method.mask_ratio, method.student_temp
        self.teacher_temp = method.teacher_temp(0)
        self.load_state_dict(method.state_dict())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        volumes, vit, student, values = len(batch["key"]), self.student["backbone"], {}, {}
        for kind, number in (("global", 1), ("local", 0)):
            tokens, values[f"rec_{kind}"] = vit.masked_views(batch[kind], batch["key"], number, self.mask_ratio[kind])
            logits = self.student["head"](tokens[:, 0]) / self.student_temp
            student[kind] = F.log_softmax(logits, dim=-1).unflatten(0, (-1, volumes))  # (views, B, K)
        with torch.no_grad():
            logits = self.teacher["head"](self.teacher["backbone"].encode(view_major(batch["global"]))[:, 0])
            teacher = F.softmax((logits - self.center) / self.teacher_temp, dim=-1).unflatten(0, (-1, volumes))
        for kind, log_probabilities in student.items():
            values[f"global_{kind}"] = -torch.einsum("pbk,sbk->psb", teacher, log_probabilities).mean()
        return values
