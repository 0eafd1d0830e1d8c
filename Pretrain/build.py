"""From settings to a pretraining method: the model, the views it wants, and the weights of its losses."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from common.config import setting
from common.errors import InputError
from common.training.schedules import cosine, linear
from common.training.settings import BatchPlan, LoopSettings
from common.training.state import Weights
from Finetune import models_3dvit
from Finetune.models_3dvit import VisionTransformer3D
from Pretrain import models_mim
from Pretrain.catalog import DataSettings
from Pretrain.models_glmae import GLMAE, TERMS
from Pretrain.models_mae import MAE
from Pretrain.views import ViewSpec

Triple = tuple[int, int, int]
Quadruple = tuple[int, int, int, int]


@dataclass(kw_only=True)
class PretrainSettings(DataSettings, LoopSettings):
    """Settings of a pretraining run. The defaults are GL-MAE's; scripts/pretrain_glmae.sh says what is the paper's."""

    method: Literal["mae", "glmae", "mim"] = setting("glmae", "the pretraining method")

    global_views: int = setting(2, "p: global views per volume (GL-MAE)", least=0)
    local_views: int = setting(8, "q: local views per volume", least=0)
    global_size: Triple = setting((160, 160, 160), "voxels of a global view")
    local_size: Triple = setting(
        (96, 96, 96), "voxels of a local view; MiM: of every encoder input, its volume is group times that"
    )
    crop_mode: Literal["resize", "fixed"] = setting(
        "resize", "resize: a share of the scan; fixed: the view's size in voxels"
    )
    global_scale: tuple[float, float] = setting(
        (0.5, 1.0), "share of each axis that a global view, or MiM's volume, covers (resize)"
    )
    local_scale: tuple[float, float] = setting((0.2, 0.5), "share of each axis that a local view covers (resize)")
    flip_prob: float = setting(0.2, "probability of a flip, per axis", least=0)

    model: Literal["tiny", "small", "base", "large", "huge"] = setting(
        "base", "size of the encoder (MiM has tiny and base)"
    )
    patch_size: Triple = setting((16, 16, 16), "voxels of a patch")
    embed_dim: int | None = setting(None, "width of the ViT instead of the model's own")
    depth: int | None = setting(None, "blocks of the ViT instead of the model's own")
    embed_dims: Quadruple | None = setting(
        None, "widths of the hybrid encoder's stages instead of the model's own (MiM)"
    )
    depths: Quadruple | None = setting(None, "blocks of the hybrid encoder's stages instead of the model's own (MiM)")
    num_heads: int | None = setting(None, "heads instead of the model's own")
    decoder_embed_dim: int = setting(576, "width of the decoder", least=1)
    decoder_depth: int = setting(8, "blocks of the decoder", least=0)
    decoder_num_heads: int = setting(16, "heads of the decoder", least=1)

    mask_ratio_global: float = setting(0.6, "share of patches removed from global views")
    mask_ratio_local: float = setting(0.6, "share of patches removed from local views")
    norm_pix_loss: bool = setting(True, "reconstruct patches normalised to mean 0 and variance 1")

    group: int = setting(2, "g: mid volumes per axis of the whole; must divide the token grid (MiM)")
    num_mid: int = setting(4, "S: mid volumes per volume (MiM)")
    num_down: int = setting(4, "down volumes per mid volume (MiM)")
    down_parts: int | None = setting(None, "pieces in which the down level is back-propagated; none: num_down (MiM)")
    mask_ratio_up: float = setting(0.5, "share of units (future mid volumes) removed from the whole (MiM)")
    mask_ratio_mid: float = setting(0.6, "share of patches removed from mid volumes (MiM)")
    mask_ratio_down: float = setting(0.5, "share of patches removed from down volumes (MiM)")
    align: Literal["none", "cosine", "infonce", "published"] = setting(
        "cosine",
        "alignment of a child with the place it was cut from; published: what the authors' code computes (MiM)",
    )
    align_temp: float = setting(0.2, "temperature of infonce (MiM)", above=0)
    weight_rec_up: float = setting(1.0, "weight of the up level's reconstruction (MiM)", least=0)
    weight_rec_mid: float = setting(1.0, "weight of the mid level's reconstruction (MiM)", least=0)
    weight_rec_down: float = setting(1.0, "weight of the down level's reconstruction (MiM)", least=0)
    weight_align_up_mid: float = setting(0.1, "weight of the alignment of mid volumes with the whole (MiM)", least=0)
    weight_align_mid_down: float = setting(
        0.1, "weight of the alignment of down volumes with mid volumes (MiM)", least=0
    )
    level_mode: Literal["concurrent", "coarse_to_fine", "fine_to_coarse"] = setting(
        "concurrent", "constant weights; or up falls from twice its weight and down rises from 0; or the reverse (MiM)"
    )

    weight_rec_global: float = setting(1.0, "weight of the global reconstruction; 0 leaves a term out", least=0)
    weight_rec_local: float = setting(1.0, "weight of the local reconstruction", least=0)
    weight_global_global: float = setting(1.0, "weight of the global-to-global consistency", least=0)
    weight_global_local: float = setting(1.0, "weight of the global-to-local consistency", least=0)
    consistency: Literal["ce", "byol"] = setting("ce", "cross-entropy over prototypes, or 2 - 2 cos with a predictor")
    gg_pairs: Literal["all", "same"] = setting(
        "all", "global-to-global: all pairs, or each view with its own masked copy"
    )
    out_dim: int = setting(4096, "prototypes of the projection head", least=1)
    hidden_dim: int = setting(2048, "hidden width of the projection head", least=1)
    bottleneck_dim: int = setting(256, "width of the embedding before the prototypes", least=1)
    student_temp: float = setting(0.1, "student temperature", above=0)
    teacher_temp: tuple[float, float] = setting(
        (0.04, 0.07), "teacher temperature at the start and after its warm-up", above=0
    )
    teacher_temp_epochs: float = setting(30.0, "epochs of that warm-up", least=0)
    momentum: tuple[float, float] = setting((0.996, 1.0), "EMA momentum of the teacher at the start and at the end")
    center_momentum: float = setting(0.9, "momentum of the centre")
    freeze_last_layer: float = setting(1.0, "epochs during which the prototypes are not trained", least=0)

    blr: float = setting(1.5e-4, "learning rate at 256 views (MiM: volumes) per update, scaled linearly", least=0)
    lr: float | None = setting(None, "learning rate as it is, instead of blr", least=0)

    loader_only: bool = setting(
        False, "measure the loader alone over one epoch and stop: volumes and views per second, bytes read"
    )


@dataclass(frozen=True)
class Task:
    """What is trained: a method, the kinds of views in its batches, the weights of its losses by step."""

    method: nn.Module
    specs: dict[str, ViewSpec]
    weights: Weights

    @property
    def views(self) -> int:
        """Views per volume."""
        return sum(spec.count for spec in self.specs.values())


def build_task(settings: PretrainSettings, plan: BatchPlan) -> Task:
    """The task that the settings ask for. InputError where they contradict themselves."""
    try:
        return {"mae": build_mae, "glmae": build_glmae, "mim": build_mim}[settings.method](settings, plan)
    except (ValueError, AssertionError) as error:  # a model's own check of its sizes
        raise error if isinstance(error, InputError) else InputError(f"--method {settings.method}: {error}") from None


def build_vit(settings: PretrainSettings) -> VisionTransformer3D:
    """The encoder with its decoder; its position table is that of a local view, the size that is fine-tuned."""
    factory = getattr(models_3dvit, f"vit_{settings.model}_patch16_3d")
    own = {k: v for k in ("embed_dim", "depth", "num_heads") if (v := getattr(settings, k)) is not None}
    return factory(
        img_size=settings.local_size,
        patch_size=settings.patch_size,
        in_chans=settings.channels,
        encoder_only=False,
        decoder_embed_dim=settings.decoder_embed_dim,
        decoder_depth=settings.decoder_depth,
        decoder_num_heads=settings.decoder_num_heads,
        **own,
    )


def view_spec(settings: PretrainSettings, kind: Literal["global", "local"]) -> ViewSpec:
    count, size, scale = (getattr(settings, f"{kind}_{name}") for name in ("views", "size", "scale"))
    return ViewSpec(count, size, scale, settings.crop_mode, settings.flip_prob)


def build_mae(settings: PretrainSettings, plan: BatchPlan) -> Task:
    method = MAE(build_vit(settings), settings.mask_ratio_local, settings.norm_pix_loss)
    return Task(method, {"local": view_spec(settings, "local")}, lambda step: {"rec_local": 1.0})


def build_glmae(settings: PretrainSettings, plan: BatchPlan) -> Task:
    weights = {term: w for term in TERMS if (w := getattr(settings, f"weight_{term}")) > 0}
    if not weights:
        raise InputError("--weight_*: all four are 0, at least one must be positive")
    if settings.global_views < 1 and set(weights) != {"rec_local"}:
        raise InputError(f"--global_views {settings.global_views}: the terms {', '.join(weights)} need at least 1")
    specs = {"global": view_spec(settings, "global"), "local": view_spec(settings, "local")}
    models_3dvit.grid_of(settings.global_size, settings.patch_size)
    if not {"rec_local", "global_local"} & set(weights):
        specs.pop("local")
    elif settings.local_views < 1:
        raise InputError(f"--local_views {settings.local_views}: the terms {', '.join(weights)} need at least 1")
    vit = build_vit(settings)
    if not {"rec_global", "rec_local"} & set(weights):
        vit.remove_decoder()
    method = GLMAE(
        vit,
        terms=tuple(weights),
        mask_ratio_global=settings.mask_ratio_global,
        mask_ratio_local=settings.mask_ratio_local,
        norm_pix_loss=settings.norm_pix_loss,
        consistency=settings.consistency,
        gg_pairs=settings.gg_pairs,
        hidden_dim=settings.hidden_dim,
        bottleneck_dim=settings.bottleneck_dim,
        out_dim=settings.out_dim,
        student_temp=settings.student_temp,
        teacher_temp=scheduled(linear, settings.teacher_temp, settings.teacher_temp_epochs * plan.steps_per_epoch),
        momentum=scheduled(cosine, settings.momentum, plan.total_steps),
        center_momentum=settings.center_momentum,
        freeze_last_layer=round(settings.freeze_last_layer * plan.steps_per_epoch),
    )
    return Task(method, specs, lambda step: weights)


def build_mim(settings: PretrainSettings, plan: BatchPlan) -> Task:
    if settings.model not in ("tiny", "base") or settings.patch_size != (16, 16, 16):
        raise InputError(
            f"--model {settings.model}, --patch_size {settings.patch_size}: MiM has tiny and base, with patch 16"
        )
    if settings.embed_dim or settings.depth:
        raise InputError("--embed_dim, --depth: the ViT's; MiM's encoder has --embed_dims and --depths, one per stage")
    names = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "group", "num_mid", "num_down")
    names += ("down_parts", "mask_ratio_up", "mask_ratio_mid", "mask_ratio_down", "align", "norm_pix_loss")
    own = {k: v for k in ("embed_dims", "depths", "num_heads") if (v := getattr(settings, k)) is not None}
    if settings.embed_dims and not settings.num_heads:
        own["num_heads"] = max(1, settings.embed_dims[3] // 32)  # as fine-tuning assumes where no number was recorded
    own |= {name: getattr(settings, name) for name in names} | {"in_chans": settings.channels}
    factory = getattr(models_mim, f"mim_convvit3d_{settings.model}_patch16")
    method = factory(img_size=settings.local_size, temperature=settings.align_temp, **own)
    terms = [f"rec_{level}" for level in models_mim.LEVELS]
    terms += [] if settings.align == "none" else ["align_up_mid", "align_mid_down"]

    def weights(step: int) -> dict[str, float]:
        factors = models_mim.level_factors(settings.level_mode, step / plan.total_steps)
        return {t: getattr(settings, f"weight_{t}") * factors.get(t.removeprefix("rec_"), 1.0) for t in terms}

    size = tuple(settings.group * n for n in settings.local_size)
    spec = ViewSpec(1, size, settings.global_scale, settings.crop_mode, settings.flip_prob)
    return Task(method, {"image": spec}, weights)


def scheduled(schedule: Callable[..., float], ends: tuple[float, float], total: float) -> Callable[[int], float]:
    return partial(schedule, total=total, start=ends[0], end=ends[1])
