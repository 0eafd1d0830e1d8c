"""GL-MAE: global-local masked autoencoder (arXiv 2306.08913, IEEE TMI 2025).

    B volumes   p global and q local views of each, view-major   K prototypes   E embedding

A student encodes the visible patches of masked global and local views and reconstructs the rest. A teacher, its moving
average, encodes the full global views. Consistency losses pull the student's CLS tokens towards the teacher's. The
structure (views, masking, four losses, unmasked teacher) is that of the paper's figure. Head, temperatures, centre,
momentum and weights are in no source that we could read; they follow DINO (Caron et al., ICCV 2021): our choice.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.config import setting
from common.distributed import all_reduce_mean
from common.training.method import Batch, Method, Reconstruction
from Finetune.models_3dvit import VisionTransformer3D
from Pretrain.losses import collapse_monitors, cosine_pairs, cross_entropy_pairs, entropy_of_mean
from Pretrain.masking import checked_ratio
from Pretrain.models_mae import (
    Visible,
    checked_fraction,
    complete_reconstruction,
    encode_visible,
    reconstruct,
    view_content,
    view_keys,
    view_major,
)

TERMS = ("rec_global", "rec_local", "global_global", "global_local")


@dataclass(kw_only=True)
class GLMAESettings:
    """Settings of GL-MAE. The recipe scripts/pretrain_glmae.sh says which of the defaults are the paper's."""

    global_views: int = setting(2, "p: global views per volume", least=0, most=1024)
    global_size: tuple[int, int, int] = setting((160, 160, 160), "voxels of a global view (D H W)", least=1, most=1024)
    mask_ratio_global: float = setting(0.6, "share of patches removed from global views", least=0, below=1)

    weight_rec_global: float = setting(1.0, "weight of the global reconstruction; 0 omits the loss", least=0)
    weight_rec_local: float = setting(1.0, "weight of the local reconstruction", least=0)
    weight_global_global: float = setting(1.0, "weight of the global-to-global consistency", least=0)
    weight_global_local: float = setting(1.0, "weight of the global-to-local consistency", least=0)
    consistency: Literal["ce", "byol"] = setting("ce", "ce: cross-entropy over prototypes; byol: cosine with predictor")
    gg_pairs: Literal["all", "same"] = setting("all", "pairs of global views; same: a view and its masked copy")

    out_dim: int = setting(4096, "prototypes of the projection head", least=1, most=2**20)
    hidden_dim: int = setting(2048, "hidden width of the projection head", least=1, most=65536)
    bottleneck_dim: int = setting(256, "width of the embedding before the prototypes", least=1, most=65536)
    student_temp: float = setting(0.1, "temperature of the student", above=0)
    teacher_temp: tuple[float, float] = setting((0.04, 0.07), "temperature of the teacher: start, end", above=0)
    teacher_temp_epochs: float = setting(30.0, "epochs from its start to its end", least=0)
    momentum: tuple[float, float] = setting((0.996, 1.0), "EMA momentum of the teacher: start, end", least=0, most=1)
    center_momentum: float = setting(0.9, "momentum of the teacher's centre", least=0, most=1)
    freeze_last_layer: float = setting(1.0, "epochs during which the prototypes are not trained", least=0)


class PrototypeLayer(nn.Module):
    """Weight-normalised linear layer without bias: (..., E) -> (..., K). Its norms `weight_g` are fixed at 1 (DINO).

    torch's `weight_norm` is not used because the published checkpoints have other parameter names.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class ProjectionHead(nn.Module):
    """DINO's head: features (..., C) through three linear layers to a unit vector (..., E), and to logits (..., K) of K
    prototypes. With `out_dim` 0 it ends at the vector."""

    def __init__(self, in_dim: int, hidden_dim: int, bottleneck_dim: int, out_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )  # fmt: skip
        for layer in self.mlp[::2]:
            # about DINO's N(0, 0.02) at its widths; narrow heads need more
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.last_layer = PrototypeLayer(bottleneck_dim, out_dim) if out_dim else None

    def forward(self, x: Tensor) -> Tensor:
        embedding = F.normalize(self.mlp(x).float(), dim=-1)
        return embedding if self.last_layer is None else self.last_layer(embedding)


class GLMAE(Method):
    """Masked autoencoding of global and local views with global-to-global and global-to-local consistency.

    The global and the local views have a backward pass each where the losses allow it (`kinds_of_parts`).

    `forward` reads batch["global"] (B, p, C, D, H, W), batch["local"] (B, q, C, d, h, w) and batch["key"] (B,) int64,
    the seeds of the masks. Its parts return the losses `rec_global`, `rec_local`, `global_global`, `global_local`, and
    values that show a collapse (`monitor/...`). Where padding is ignored it also reads batch["global_content"]
    (B, p, 3, 2) and batch["local_content"], the boxes without padding. They concern the student; the teacher sees all
    patches.

    Args:
        vit: an encoder with its decoder, the student's backbone. Without a decoder there can be no reconstruction loss.
        terms: the losses to compute. Modules that none of them needs are not built, since DDP allows no unused
            parameter.
        mask_ratio_global, mask_ratio_local: shares of removed patches in the student's views. The teacher's views are
            never masked.
        norm_pix_loss: normalise the target of each patch.
        norm_pix_eps: added to its variance.
        decode_fraction: share of the removed patches that is decoded in training; all are in evaluation.
        consistency: `ce`, cross-entropy over prototypes with a centred, sharpened teacher; `byol`, 2 - 2 cos with a
            predictor on the student.
        gg_pairs: `all` pairs of global views, or only each view with its own masked copy (`same`).
        hidden_dim, bottleneck_dim, out_dim: widths of the projection head.
        student_temp: temperature of the student.
        momentum, teacher_temp: functions of the step.
        center_momentum: momentum of the centre that is subtracted from the teacher's logits.
        freeze_last_layer: number of first updates in which the prototypes are not trained.
    """

    def __init__(
        self,
        vit: VisionTransformer3D,
        *,
        terms: Sequence[str] = TERMS,
        mask_ratio_global: float = 0.6,
        mask_ratio_local: float = 0.6,
        norm_pix_loss: bool = True,
        norm_pix_eps: float = 1e-6,
        decode_fraction: float = 1.0,
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
            raise ValueError(f"terms: found {tuple(terms)}, expected at least one of {', '.join(TERMS)}")
        self.terms, self.norm_pix_loss, self.norm_pix_eps = tuple(terms), norm_pix_loss, norm_pix_eps
        self.mask_ratio = {"global": checked_ratio(mask_ratio_global), "local": checked_ratio(mask_ratio_local)}
        self.decode_fraction = checked_fraction(decode_fraction, vit)
        self.parts = kinds_of_parts(self.terms)
        self.num_parts = len(self.parts)
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
            # without a predictor the student could agree by becoming constant
            if consistency == "byol":
                layers = nn.Linear(bottleneck_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim)
                self.student["predictor"] = nn.Sequential(*layers)
            self.register_buffer("center", torch.zeros(1, prototypes or bottleneck_dim))
        # the teacher's mean logits and mean probabilities, (2, K) per pass of this update
        self._teacher_means: list[Tensor] = []
        # targets of the current micro-batch, kept between its parts
        self._targets: Tensor | None = None

    @property
    def is_consistent(self) -> bool:
        return bool({"global_global", "global_local"} & set(self.terms))

    @property
    def encoder(self) -> VisionTransformer3D:
        """The student's encoder."""
        return self.student["backbone"]

    @property
    def grad_norm_parameter(self) -> nn.Parameter:
        return self.encoder.norm.weight

    def train(self, mode: bool = True) -> "GLMAE":
        """Switch to training or evaluation. The teacher stays in evaluation: without dropout."""
        super().train(mode)
        self.teacher.eval()
        return self

    # ------------------------------------------------------------ forward

    def forward(self, batch: Batch, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        if part == 0 and self.is_consistent:
            # before there is a graph in memory
            self._targets = self._teacher_targets(batch["global"], step)  # (p, B, K)
        values: dict[str, Tensor] = {}
        for kind in self.parts[part]:
            values |= self._losses(batch, kind)
        if part == self.num_parts - 1:
            self._targets = None
        return values

    def _losses(self, batch: Batch, kind: str) -> dict[str, Tensor]:
        """Return the losses of one kind of view."""
        values, (x, visible) = {}, self._masked_views(batch, kind)
        if f"rec_{kind}" in self.terms:
            fraction = self.decode_fraction if self.training else 1.0
            values[f"rec_{kind}"], _ = reconstruct(
                self.encoder, x, visible, self.norm_pix_loss, self.norm_pix_eps, fraction
            )
        if f"global_{kind}" in self.terms:
            projected = self._project(visible.tokens[:, 0]).unflatten(0, (-1, len(batch["key"])))  # (views, B, K)
            values |= self._consistency(kind, projected)
        return values

    def _consistency(self, kind: str, student: Tensor) -> dict[str, Tensor]:
        """Return the consistency loss of the student's projections (views, B, K) of a kind of view, and once in all
        parts the collapse monitors."""
        teacher = self._targets
        matrix = (cross_entropy_pairs if self.consistency == "ce" else cosine_pairs)(teacher, student)  # (p, views)
        # on the diagonal of the global views a view and its own masked copy
        same = kind == "global" and self.gg_pairs == "same"
        values = {f"global_{kind}": matrix.diagonal().mean() if same else matrix.mean()}
        first = next(kind for part in self.parts for kind in part if f"global_{kind}" in self.terms)
        if self.consistency == "ce" and kind == first:
            monitors = collapse_monitors(teacher, student.detach())
            values |= {f"monitor/{name}": value for name, value in monitors.items()}
            values["monitor/center_norm"] = self.center.norm()
        return values

    def _masked_views(self, batch: Batch, kind: str) -> tuple[Tensor, Visible]:
        x, keys = view_major(batch[kind]), view_keys(batch["key"], batch[kind].shape[1], kind=int(kind == "global"))
        content = view_content(batch, kind, self.encoder.patch_size)
        return x, encode_visible(self.encoder, x, keys, self.mask_ratio[kind], content)

    def reconstructions(self, batch: Batch) -> dict[str, Reconstruction]:
        rows = {}
        for kind in ("global", "local"):
            if f"rec_{kind}" in self.terms:
                x, visible = self._masked_views(batch, kind)
                rows[kind] = complete_reconstruction(self.encoder, x, visible)
        return rows

    def _project(self, cls_tokens: Tensor) -> Tensor:
        """Return the student's log-probabilities (M, K), or with byol its predicted embeddings (M, E)."""
        projected = self.student["head"](cls_tokens)
        if self.consistency == "byol":
            return self.student["predictor"](projected)
        return F.log_softmax(projected.float() / self.student_temp, dim=-1)

    @torch.no_grad()
    def _teacher_targets(self, views: Tensor, step: int) -> Tensor:
        """Return the teacher's centred, sharpened probabilities (p, B, K), or with byol its embeddings (p, B, E)."""
        projected = self.teacher["head"](self.teacher["backbone"](view_major(views))).float()
        if self.consistency == "ce":
            logits, projected = projected, F.softmax((projected - self.center) / self.teacher_temp(step), dim=-1)
            if self.training:
                self._teacher_means.append(torch.stack([logits.mean(dim=0), projected.mean(dim=0)]))
        return projected.unflatten(0, (views.shape[1], -1))

    # ------------------------------------------------------------ around the optimiser step

    def before_step(self, step: int) -> None:
        if step < self.freeze_last_layer and self.is_consistent and self.consistency == "ce":
            self.student["head"].last_layer.weight_v.grad = None

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, Tensor]:
        """Move the teacher towards the student, and the centre towards the teacher's mean logits of the global batch.

        Parameters are paired by name, since the teacher has no decoder; those that are not trained are equal. Returns
        the entropy of the teacher's mean probabilities over the global batch: that of a micro-batch, often two views of
        one scan, shows no collapse.
        """
        if not self.is_consistent:
            return {}
        student = {name: parameter for name, parameter in self.student.named_parameters() if parameter.requires_grad}
        pairs = [(mine, student[name]) for name, mine in self.teacher.named_parameters() if name in student]
        get_ema_multi_avg_fn(self.momentum(step))([mine for mine, _ in pairs], [theirs for _, theirs in pairs], None)
        if not self._teacher_means:
            return {}
        logits, probabilities = all_reduce_mean(sum(self._teacher_means) / len(self._teacher_means))  # (K,), (K,)
        # the logits of a skipped update may not be finite
        self.center.lerp_(torch.where(logits.isfinite(), logits, self.center), 1.0 - self.center_momentum)
        self._teacher_means = []
        return {"monitor/entropy_of_mean": entropy_of_mean(probabilities)}

    def discard_passes(self) -> None:
        self._teacher_means, self._targets = [], None

    def schedule_values(self, step: int) -> dict[str, float]:
        return {"momentum": self.momentum(step), "teacher_temp": self.teacher_temp(step)} if self.is_consistent else {}

    # ------------------------------------------------------------ checkpoint

    def checkpoint_state(self) -> dict[str, Any]:
        """Return `student` with the prefix `module.` that the authors' loaders expect, `teacher` and the centre."""
        state = {"student": {f"module.{name}": value for name, value in self.student.state_dict().items()}}
        if self.is_consistent:
            state |= {"teacher": self.teacher.state_dict(), "dino_loss": {"center": self.center}}
        return state

    def load_checkpoint_state(self, content: dict[str, Any]) -> None:
        student = {name.removeprefix("module."): value for name, value in content["student"].items()}
        self.student.load_state_dict(student)
        if self.is_consistent:
            self.teacher.load_state_dict(content["teacher"])
            self.center.copy_(content["dino_loss"]["center"])


def kinds_of_parts(terms: Sequence[str]) -> list[list[str]]:
    """Return the kinds of view whose graphs are in memory at once, in the order of the backward passes.

    DDP reduces gradients in the last pass only, so that pass must use every layer: the decoder (reconstruction) and the
    head (consistency), if another does. Where neither kind does, there is one pass for both.
    """
    used = {
        kind: {term[:3] for term in (f"rec_{kind}", f"global_{kind}") if term in terms} for kind in ("global", "local")
    }
    kinds = sorted((kind for kind in used if used[kind]), key=lambda kind: len(used[kind]))
    return [[kind] for kind in kinds] if set.union(*used.values()) == used[kinds[-1]] else [kinds]


def encoder_copy(vit: VisionTransformer3D) -> VisionTransformer3D:
    """Return a copy of the encoder without its decoder and without gradients."""
    twin = copy.deepcopy(vit)
    twin.remove_decoder()
    return twin.requires_grad_(False)
