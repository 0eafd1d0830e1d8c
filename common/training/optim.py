"""The optimiser: fused AdamW with timm's parameter groups."""

from dataclasses import dataclass

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from common.config import setting


@dataclass(kw_only=True)
class OptimSettings:
    """Settings of AdamW and of its learning rate. The defaults are those of pretraining."""

    blr: float = setting(1.5e-4, "learning rate at 256 views (MiM: volumes) per update, scaled linearly", least=0)
    lr: float | None = setting(None, "learning rate as it is, instead of blr", least=0)
    warmup_epochs: float = setting(40.0, "epochs of linear warm-up", least=0)
    weight_decay: float = setting(0.05, "weight decay, not applied to biases, norms and tokens", least=0)
    clip_grad: float | None = setting(3.0, "largest norm of the gradient; none: no clipping", above=0)

    def peak_lr(self, batch: int, reference: int = 256) -> float:
        """Return the learning rate after warm-up for `batch` samples per update: `lr`, or `blr` scaled linearly."""
        return self.lr if self.lr is not None else self.blr * batch / reference


def build_optimizer(
    method: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Return fused AdamW over the parameters of `method`, without weight decay on biases, 1-D parameters and tokens.

    Fused, because only that form can skip an update on the device (`found_inf`).
    """
    tokens = {n for n, _ in method.named_parameters() if n.rsplit(".", 1)[-1] in ("cls_token", "mask_token")}
    groups = param_groups_weight_decay(method, weight_decay, no_weight_decay_list=tokens)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times the group's `lr_scale` where it has one (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
