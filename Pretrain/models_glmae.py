"""GL-MAE: global-local masked autoencoder (arXiv 2306.08913, IEEE TMI 2025).

    B volumes   p global and q local views of each, view-major   K prototypes   E embedding

A student encodes the visible patches of masked global and local views and reconstructs the rest; a teacher, its moving
average, sees the intact global views. The student's CLS tokens are pulled towards the teacher's. The structure (views,
masking, four terms, intact teacher) is the paper's figure; head, temperatures, centre, momentum and weights are printed
in no source we could read and follow DINO (Caron et al., ICCV 2021): our choice.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.distributed import all_reduce_mean
from Finetune.models_3dvit import VisionTransformer3D
from Pretrain.losses import collapse_monitors, cosine_pairs, cross_entropy_pairs
from Pretrain.masking import checked_ratio
from Pretrain.models_mae import Reconstructed, Visible, encode_visible, reconstruct, view_keys, view_major

TERMS = ("rec_global", "rec_local", "global_global", "global_local")


class PrototypeLayer(nn.Module):
    """Weight-normalised linear layer without bias: (..., E) -> (..., K). Its norms `weight_g` are fixed at 1 (DINO).

    Not torch's `weight_norm`: its parameter names are not those that the published checkpoints have.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class ProjectionHead(nn.Module):
    """DINO's head: three linear layers, a unit vector (..., E), and K prototypes. `embed` stops at the unit vector."""

    def __init__(self, in_dim: int, hidden_dim: int, bottleneck_dim: int, out_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )  # fmt: skip
        for layer in self.mlp[::2]:
            nn.init.xavier_uniform_(layer.weight)  # about DINO's N(0, 0.02) at its widths; narrow heads need more
            nn.init.zeros_(layer.bias)
        self.last_layer = PrototypeLayer(bottleneck_dim, out_dim) if out_dim else None

    def embed(self, x: Tensor) -> Tensor:
        return F.normalize(self.mlp(x).float(), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        embedding = self.embed(x)
        return embedding if self.last_layer is None else self.last_layer(embedding)


class GLMAE(nn.Module):
    """Masked autoencoding of global and local views with global-to-global and global-to-local consistency.

    `forward` takes batch["global"] (B, p, C, D, H, W), batch["local"] (B, q, C, d, h, w) and batch["key"] (B,) int64,
    which seeds the masks, and gives the losses `rec_global`, `rec_local`, `global_global`, `global_local` and the
    monitors of collapse.

    Args:
        vit: an encoder with its decoder, the student's backbone; without a decoder the reconstruction terms must be
            left out.
        terms: the losses to compute; what none of them needs is not built (so DDP meets no unused parameter).
        mask_ratio_global, mask_ratio_local: shares of removed patches in the student's views. The teacher's are never
            masked.
        consistency: `ce`, cross-entropy over prototypes with a centred, sharpened teacher; `byol`, 2 - 2 cos with a
            predictor on the student.
        gg_pairs: `all` pairs of global views, or each view with its own masked copy only (`same`).
        momentum, teacher_temp: functions of the step.
        freeze_last_layer: updates during which the prototypes stay as they are.
    """

    def __init__(
        self,
        vit: VisionTransformer3D,
        *,
        terms: Sequence[str] = TERMS,
        mask_ratio_global: float = 0.6,
        mask_ratio_local: float = 0.6,
        norm_pix_loss: bool = True,
        consistency: Literal["ce", "byol"] = "ce",
        gg_pairs: Literal["all", "same"] = "all",
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        out_dim: int = 4096,
        student_temp: float = 0.1,
        teacher_temp: Callable[[int], float] = lambda step: 0.04,
        momentum: Callable[[int], float] = lambda step: 0.996,
        center_momentum: float = 0.9,
        freeze_last_layer: int = 0,
    ):
        super().__init__()
        unknown = set(terms) - set(TERMS)
        if unknown or not terms:
            raise ValueError(f"terms: found {tuple(terms)}, allowed: at least one of {', '.join(TERMS)}")
        self.terms, self.norm_pix_loss = tuple(terms), norm_pix_loss
        self.mask_ratio = {"global": checked_ratio(mask_ratio_global), "local": checked_ratio(mask_ratio_local)}
        self.consistency, self.gg_pairs = consistency, gg_pairs
        self.student_temp, self.teacher_temp, self.momentum = student_temp, teacher_temp, momentum
        self.center_momentum, self.freeze_last_layer = center_momentum, freeze_last_layer

        self.student = nn.ModuleDict({"backbone": vit})
        self.teacher = nn.ModuleDict()
        if self.is_consistent:
            prototypes = out_dim if consistency == "ce" else 0
            self.student["head"] = ProjectionHead(vit.embed_dim, hidden_dim, bottleneck_dim, prototypes)
            self.teacher["backbone"] = encoder_copy(vit)
            self.teacher["head"] = copy.deepcopy(self.student["head"])
            self.teacher.requires_grad_(False)
            if consistency == "byol":  # without it the student could agree by going constant
                self.student["predictor"] = nn.Sequential(
                    nn.Linear(bottleneck_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim)
                )
            self.register_buffer("center", torch.zeros(1, prototypes or bottleneck_dim))
        self._center_sum: Tensor | None = None
        self._center_count = 0

    @property
    def is_consistent(self) -> bool:
        return bool({"global_global", "global_local"} & set(self.terms))

    @property
    def encoder(self) -> VisionTransformer3D:
        """The encoder that is trained."""
        return self.student["backbone"]

    @property
    def probe(self) -> nn.Parameter:
        return self.encoder.norm.weight

    # ------------------------------------------------------------ forward

    def forward(self, batch: dict[str, Tensor], step: int = 0) -> dict[str, Tensor]:
        values, student = {}, {}
        for kind in ("global", "local"):
            if f"rec_{kind}" in self.terms or f"global_{kind}" in self.terms:
                cls_tokens = self._student_pass(batch, kind, values)  # (views*B, C)
                if f"global_{kind}" in self.terms:
                    student[kind] = self._project(cls_tokens).unflatten(0, (-1, len(batch["key"])))  # (views, B, K)
        if student:
            teacher = self._teach(batch["global"], step)  # (p, B, K)
            pairs = cross_entropy_pairs if self.consistency == "ce" else cosine_pairs
            if "global" in student:
                matrix = pairs(teacher, student["global"])  # (p, p), the diagonal: a view and its own masked copy
                values["global_global"] = matrix.mean() if self.gg_pairs == "all" else matrix.diagonal().mean()
            if "local" in student:
                values["global_local"] = pairs(teacher, student["local"]).mean()
            if self.consistency == "ce":
                seen = next(iter(student.values())).detach()
                values |= {f"monitor/{name}": value for name, value in collapse_monitors(teacher, seen).items()}
                values["monitor/center_norm"] = self.center.norm()
        return values

    def _student_pass(self, batch: dict[str, Tensor], kind: str, values: dict[str, Tensor]) -> Tensor:
        """CLS tokens (views*B, C) of the masked views of one kind, in one pass; their loss goes to `values`."""
        x, visible = self._masked_views(batch, kind)
        if f"rec_{kind}" in self.terms:
            values[f"rec_{kind}"], _ = reconstruct(self.encoder, x, visible, self.norm_pix_loss)
        return visible.tokens[:, 0]

    def _masked_views(self, batch: dict[str, Tensor], kind: str) -> tuple[Tensor, Visible]:
        x, keys = view_major(batch[kind]), view_keys(batch["key"], batch[kind].shape[1], kind=int(kind == "global"))
        return x, encode_visible(self.encoder, x, keys, self.mask_ratio[kind])

    def reconstructions(self, batch: dict[str, Tensor]) -> dict[str, Reconstructed]:
        """For pictures: views, masks and predictions, under the name of each kind that is reconstructed."""
        rows = {}
        for kind in ("global", "local"):
            if f"rec_{kind}" in self.terms:
                x, visible = self._masked_views(batch, kind)
                _, prediction = reconstruct(self.encoder, x, visible, self.norm_pix_loss)
                rows[kind] = Reconstructed(x, visible.mask, prediction)
        return rows

    def _project(self, cls_tokens: Tensor) -> Tensor:
        """Student's log-probabilities (M, K), or its predicted embeddings (M, E)."""
        projected = self.student["head"](cls_tokens)
        if self.consistency == "byol":
            return self.student["predictor"](projected)
        return F.log_softmax(projected.float() / self.student_temp, dim=-1)

    @torch.no_grad()
    def _teach(self, views: Tensor, step: int) -> Tensor:
        """Teacher's centred, sharpened probabilities (p, B, K) of the intact views, or its embeddings (p, B, E)."""
        projected = self.teacher["head"](self.teacher["backbone"](view_major(views))).float()
        if self.consistency == "ce":
            if self.training:
                self._collect(projected.mean(dim=0, keepdim=True))
            projected = F.softmax((projected - self.center) / self.teacher_temp(step), dim=-1)
        return projected.unflatten(0, (views.shape[1], -1))

    # ------------------------------------------------------------ around the optimiser step

    def _collect(self, mean_logits: Tensor) -> None:
        self._center_sum = mean_logits if self._center_sum is None else self._center_sum + mean_logits
        self._center_count += 1

    def before_step(self, step: int) -> None:
        if step < self.freeze_last_layer and self.is_consistent and self.consistency == "ce":
            self.student["head"].last_layer.weight_v.grad = None

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """The teacher follows the student, by name; the centre the teacher's mean output over the global batch."""
        if not self.is_consistent:
            return
        student = dict(self.student.named_parameters())
        pairs = [(mine, student[name]) for name, mine in self.teacher.named_parameters()]
        get_ema_multi_avg_fn(self.momentum(step))([mine for mine, _ in pairs], [theirs for _, theirs in pairs], None)
        if self._center_count:
            mean = all_reduce_mean(self._center_sum / self._center_count)
            mean = torch.where(mean.isfinite(), mean, self.center)  # a skipped update must not poison the centre
            self.center.lerp_(mean, 1.0 - self.center_momentum)
            self._center_sum, self._center_count = None, 0

    def schedule_values(self, step: int) -> dict[str, float]:
        return {"momentum": self.momentum(step), "teacher_temp": self.teacher_temp(step)} if self.is_consistent else {}

    # ------------------------------------------------------------ checkpoint

    def checkpoint_state(self) -> dict[str, Any]:
        """`student` with the `module.` that the authors' loaders expect, `teacher` without it, and the centre."""
        state = {"student": {f"module.{name}": value for name, value in self.student.state_dict().items()}}
        if self.is_consistent:
            state |= {"teacher": self.teacher.state_dict(), "dino_loss": {"center": self.center}}
        return state

    def load_checkpoint_state(self, content: dict[str, Any]) -> None:
        self.student.load_state_dict(
            {name.removeprefix("module."): value for name, value in content["student"].items()}
        )
        if self.is_consistent:
            self.teacher.load_state_dict(content["teacher"])
            self.center.copy_(content["dino_loss"]["center"])


def encoder_copy(vit: VisionTransformer3D) -> VisionTransformer3D:
    """A copy of the encoder without its decoder: same weights, no gradient."""
    twin = copy.deepcopy(vit)
    twin.remove_decoder()
    return twin.requires_grad_(False)
