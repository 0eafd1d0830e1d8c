"""Pretrain an encoder on unlabelled volumes: plain MAE or GL-MAE.

    python -m Pretrain.main_pretrain --method glmae --datalist data/sample_abdomen/dataset.json --section pretraining --out_dir runs/x
    torchrun --nproc_per_node=8 -m Pretrain.main_pretrain ...

Recipes: scripts/pretrain_*.sh. The checkpoints' layout: common/checkpoint.py.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import nn

from common import cache, distributed
from common.config import InputError, parse, run_program, setting, to_dict
from common.datalist import read_cases
from common.engine import LoopSettings, Plan, build_optimizer, fit, plan_updates
from common.logging import RunLog, say
from common.schedules import cosine, linear, warmup_cosine
from common.volumes import Preprocessing
from Finetune import models_3dvit
from Finetune.models_3dvit import VisionTransformer3D
from Pretrain.data import ViewDataset
from Pretrain.models_glmae import GLMAE, TERMS
from Pretrain.models_mae import MAE, view_keys
from Pretrain.views import ViewSpec
from Pretrain.visualize import picture, reconstruction_volumes

Triple = tuple[int, int, int]


@dataclass(kw_only=True)
class PretrainSettings(LoopSettings):
    """Settings of a pretraining run. Defaults are the GL-MAE recipe's; what of it is the paper's says scripts/pretrain_glmae.sh."""

    method: Literal["mae", "glmae"] = setting("glmae", "the pretraining method")

    datalist: Path = setting(help="a Decathlon JSON, a folder of NIfTI files or DICOM series, or a text file of paths")
    data_root: Path | None = setting(None, "what the list's paths are relative to; none: the list's own folder")
    section: str = setting("training", "the section of a JSON list to read")
    cache_dir: Path = setting(Path("cache"), "where preprocessed volumes are kept; missing ones are added at the start")
    spacing: tuple[float, float, float] | None = setting(None, "mm per voxel (D H W); none: as scanned")
    intensity: Literal["window", "percentiles"] = setting("window", "window: low..high HU; percentiles: low..high of each case")
    low: float = setting(-1000.0, "HU or percentile that becomes 0")
    high: float = setting(1000.0, "HU or percentile that becomes 1")

    global_views: int = setting(2, "p: global views per volume (GL-MAE)")
    local_views: int = setting(8, "q: local views per volume")
    global_size: Triple = setting((160, 160, 160), "voxels of a global view")
    local_size: Triple = setting((96, 96, 96), "voxels of a local view")
    crop_mode: Literal["resize", "fixed"] = setting("resize", "resize: a share of the scan; fixed: the view's size in voxels")
    global_scale: tuple[float, float] = setting((0.5, 1.0), "share of each axis that a global view covers (resize)")
    local_scale: tuple[float, float] = setting((0.2, 0.5), "share of each axis that a local view covers (resize)")
    flip_prob: float = setting(0.2, "probability of a flip, per axis")

    model: Literal["tiny", "small", "base", "large", "huge"] = setting("base", "size of the ViT")
    patch_size: Triple = setting((16, 16, 16), "voxels of a patch")
    in_chans: int = setting(1, "channels of a volume")
    embed_dim: int | None = setting(None, "width instead of the model's own")
    depth: int | None = setting(None, "blocks instead of the model's own")
    num_heads: int | None = setting(None, "heads instead of the model's own")
    decoder_embed_dim: int = setting(576, "width of the decoder")
    decoder_depth: int = setting(8, "blocks of the decoder")
    decoder_num_heads: int = setting(16, "heads of the decoder")

    mask_ratio_global: float = setting(0.6, "share of patches removed from global views")
    mask_ratio_local: float = setting(0.6, "share of patches removed from local views")
    norm_pix_loss: bool = setting(True, "reconstruct patches normalised to mean 0 and variance 1")

    weight_rec_global: float = setting(1.0, "weight of the global reconstruction; 0 leaves a term out")
    weight_rec_local: float = setting(1.0, "weight of the local reconstruction")
    weight_global_global: float = setting(1.0, "weight of the global-to-global consistency")
    weight_global_local: float = setting(1.0, "weight of the global-to-local consistency")
    consistency: Literal["ce", "byol"] = setting("ce", "cross-entropy over prototypes, or 2 - 2 cos with a predictor")
    gg_pairs: Literal["all", "same"] = setting("all", "global-to-global: all pairs, or each view with its own masked copy")
    out_dim: int = setting(4096, "prototypes of the projection head")
    hidden_dim: int = setting(2048, "hidden width of the projection head")
    bottleneck_dim: int = setting(256, "width of the embedding before the prototypes")
    student_temp: float = setting(0.1, "student temperature")
    teacher_temp: tuple[float, float] = setting((0.04, 0.07), "teacher temperature at the start and after its warm-up")
    teacher_temp_epochs: float = setting(30.0, "epochs of that warm-up")
    momentum: tuple[float, float] = setting((0.996, 1.0), "EMA momentum of the teacher at the start and at the end")
    center_momentum: float = setting(0.9, "momentum of the centre")
    freeze_last_layer: float = setting(1.0, "epochs during which the prototypes are not trained")

    blr: float = setting(1.5e-4, "learning rate at 256 views per update, scaled linearly")
    lr: float | None = setting(None, "learning rate as it is, instead of blr")


def main() -> None:
    settings = parse(PretrainSettings, description=__doc__)
    run = distributed.setup(settings.device)
    try:
        pretrain(settings, run)
    finally:
        distributed.shutdown()


def pretrain(settings: PretrainSettings, run: distributed.Run) -> Path:
    """The whole run; returns its last checkpoint."""
    prepare_out_dir(settings.out_dir)
    cases = read_cases(settings.datalist, settings.data_root, settings.section)
    preprocessing = Preprocessing(
        spacing=settings.spacing, intensity=settings.intensity, low=settings.low, high=settings.high
    )
    with distributed.main_first():
        volumes = cache.ensure(cases, preprocessing, settings.cache_dir, settings.workers)
    plan = plan_updates(settings, len(volumes), run.world_size)
    torch.manual_seed(settings.seed)
    method, specs, weights = BUILDERS[settings.method](settings, plan)
    views = sum(spec.count for spec in specs.values())
    peak = settings.lr if settings.lr is not None else settings.blr * plan.batch * views / 256
    say(
        f"{settings.method}: {len(volumes)} volumes, {plan.total_steps} updates ({plan.steps_per_epoch} per epoch), effective batch "
        f"{plan.batch} volumes = {plan.batch * views} views ({run.world_size} process(es) x {plan.micro_batch} x {plan.accum} accumulated), "
        f"learning rate {peak:.3g}, on {run.device}"
    )
    dataset = ViewDataset(volumes, specs, settings.seed)
    vit: VisionTransformer3D = method.vit
    vit.set_grad_checkpointing(settings.grad_checkpointing)
    args = to_dict(settings) | {"grid_size": list(vit.grid_size), "data": [volume.content_hash for volume in volumes]}
    warmup = round(settings.warmup_epochs * plan.steps_per_epoch)
    return fit(
        method,
        dataset,
        settings,
        run,
        plan,
        learning_rate=partial(warmup_cosine, total=plan.total_steps, warmup=warmup, peak=peak),
        weights=lambda step: weights,
        args=args,
        optimizer=build_optimizer(method, settings.weight_decay),
        after_epoch=partial(draw_reconstructions, settings, vit, dataset) if run.rank == 0 else None,
    )


def prepare_out_dir(out_dir: Path) -> None:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        probe = out_dir / ".write_test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out_dir {out_dir}: cannot be written ({error.strerror})") from None


# ---------------------------------------------------------------- methods


def build_vit(settings: PretrainSettings) -> VisionTransformer3D:
    """The encoder with its decoder; its position table is that of a local view, the size that is fine-tuned."""
    factory = getattr(models_3dvit, f"vit_{settings.model}_patch16_3d")
    own = {k: v for k in ("embed_dim", "depth", "num_heads") if (v := getattr(settings, k)) is not None}
    try:
        vit = factory(
            img_size=settings.local_size,
            patch_size=settings.patch_size,
            in_chans=settings.in_chans,
            encoder_only=False,
            decoder_embed_dim=settings.decoder_embed_dim,
            decoder_depth=settings.decoder_depth,
            decoder_num_heads=settings.decoder_num_heads,
            **own,
        )
        if settings.method == "glmae":
            models_3dvit.grid_of(settings.global_size, settings.patch_size)
    except (ValueError, AssertionError) as error:
        raise InputError(f"--global_size, --local_size, --patch_size, --embed_dim, --num_heads: {error}") from None
    return vit


def view_spec(settings: PretrainSettings, kind: Literal["global", "local"]) -> ViewSpec:
    count, size, scale = (getattr(settings, f"{kind}_{name}") for name in ("views", "size", "scale"))
    return ViewSpec(count, size, scale, settings.crop_mode, settings.flip_prob)


Built = tuple[nn.Module, dict[str, ViewSpec], dict[str, float]]


def build_mae(settings: PretrainSettings, plan: Plan) -> Built:
    method = MAE(build_vit(settings), settings.mask_ratio_local, settings.norm_pix_loss)
    return method, {"local": view_spec(settings, "local")}, {"rec_local": 1.0}


def build_glmae(settings: PretrainSettings, plan: Plan) -> Built:
    weights = {term: w for term in TERMS if (w := getattr(settings, f"weight_{term}")) > 0}
    if not weights:
        raise InputError("--weight_*: all four are 0, at least one must be positive")
    if settings.global_views < 1 and set(weights) != {"rec_local"}:
        raise InputError(f"--global_views {settings.global_views}: the terms {', '.join(weights)} need at least 1")
    specs = {"global": view_spec(settings, "global"), "local": view_spec(settings, "local")}
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
    return method, specs, weights


def scheduled(schedule: Callable[..., float], ends: tuple[float, float], total: float) -> Callable[[int], float]:
    return partial(schedule, total=total, start=ends[0], end=ends[1])


BUILDERS: dict[str, Callable[[PretrainSettings, Plan], Built]] = {"mae": build_mae, "glmae": build_glmae}


# ---------------------------------------------------------------- pictures


def draw_reconstructions(
    settings: PretrainSettings, vit: VisionTransformer3D, dataset: ViewDataset, epoch: int, log: RunLog
) -> dict[str, float]:
    """One view of each kind with its reconstruction, the same ones every time, as reconstruction-{epoch}.png and in TensorBoard."""
    if not vit.has_decoder or ((epoch + 1) % settings.save_every and epoch + 1 != settings.epochs):
        return {}
    vit.eval()
    sample, rows = dataset[(0, 0)], {}
    device = vit.norm.weight.device
    for kind, ratio in (("global", settings.mask_ratio_global), ("local", settings.mask_ratio_local)):
        if kind in sample:
            x, keys = sample[kind][:1].to(device), view_keys(sample["key"].reshape(1), 1, kind=int(kind == "global"))
            volumes = reconstruction_volumes(vit, x, keys.to(device), ratio, settings.norm_pix_loss)
            rows[kind] = tuple(volume[0] for volume in volumes)
    pixels = picture(rows)
    Image.fromarray(pixels).save(settings.out_dir / f"reconstruction-{epoch}.png")
    log.image("reconstruction", pixels, epoch)
    return {}


if __name__ == "__main__":
    sys.exit(run_program(main))
