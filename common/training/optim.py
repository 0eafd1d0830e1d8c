"""The optimiser of pretraining: fused AdamW with timm's parameter groups."""

import torch
from timm.optim import param_groups_weight_decay
from torch import nn


def build_optimizer(
    method: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Fused AdamW with timm's groups: no decay on biases, 1-D parameters and tokens. Only the fused form can skip an
    update on the device."""
    tokens = {n for n, _ in method.named_parameters() if n.rsplit(".", 1)[-1] in ("cls_token", "mask_token")}
    groups = param_groups_weight_decay(method, weight_decay, no_weight_decay_list=tokens)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
