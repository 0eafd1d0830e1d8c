"""From settings to a pretraining method: the model, the views that it needs, and the weights of its losses.

A method of your own is one entry in `METHODS`; docs/extending.md shows an example.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from common.cache.statistics import InputStatistics
from common.config import group, setting, shown
from common.errors import InputError
from common.training.loop import LossWeights
from common.training.method import Method
from common.training.schedules import cosine, linear
from common.training.settings import BatchPlan, LoopSettings
from Finetune import encoder3d, models_3dvit, models_convvit3d
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_convvit3d import ConvViT3D
from Pretrain import models_mim
from Pretrain.catalog import DataSettings
from Pretrain.health import HealthSettings
from Pretrain.masking import num_keep
from Pretrain.models_glmae import GLMAE, TERMS, GLMAESettings
from Pretrain.models_mae import MAE, ViTSettings
from Pretrain.models_mim import MiM, MiMSettings
from Pretrain.views import ViewSettings, ViewSpec


@dataclass(kw_only=True)
class EncoderSettings:
    """Settings of encoder and decoder that all methods share."""

    model: Literal[tuple(models_3dvit.SIZES)] = setting("base", "size; MiM has tiny and base")
    patch_size: tuple[int, int, int] = setting((16, 16, 16), "voxels of a patch (D H W)", least=1, most=1024)
    num_heads: int | None = setting(None, "attention heads; none: those of the model", least=1, most=1024)
    decoder_embed_dim: int = setting(576, "width of the decoder", least=1, most=65536)
    decoder_depth: int = setting(8, "blocks of the decoder", least=0, most=1024)
    decoder_num_heads: int = setting(16, "attention heads of the decoder", least=1, most=1024)
    norm_pix_loss: bool = setting(True, "reconstruct patches normalised to mean 0 and variance 1")
    norm_pix_eps: float = setting(
        1e-6, "added to the variance of a patch when it is normalised; noise of CT in [0, 1] has about 1e-4", above=0
    )
    standardize: bool = setting(
        True, "initialise the patch embedding for the mean and standard deviation of the data; inputs stay in [0, 1]"
    )


@dataclass(kw_only=True)
class PretrainSettings(LoopSettings):
    """Settings of a pretraining run that do not depend on the method. `settings_class` adds those of the methods."""

    method: str = setting("glmae", "the pretraining method")
    loader_only: bool = setting(False, "measure the speed of data loading alone over one epoch, and stop")
    data: DataSettings = group(DataSettings, "Data")
    views: ViewSettings = group(ViewSettings, "Views")
    encoder: EncoderSettings = group(EncoderSettings, "Encoder and decoder")
    health: HealthSettings = group(HealthSettings, "Health")


@dataclass(frozen=True)
class Task:
    """What is trained: a method, the kinds of views in its batches, and the weights of its losses by step."""

    method: Method
    specs: dict[str, ViewSpec]
    loss_weights: LossWeights

    @property
    def views(self) -> int:
        """Views per volume."""
        return sum(spec.count for spec in self.specs.values())


@dataclass(frozen=True)
class MethodEntry:
    """A pretraining method: how it is built, and its settings by the field that holds them, `settings.<field>`."""

    build: Callable[[Any, BatchPlan, InputStatistics | None], Task]
    settings: Mapping[str, type] = field(default_factory=dict)


def settings_class() -> type[PretrainSettings]:
    """Return `PretrainSettings` with the settings of every method in `METHODS`, each used by its methods only."""
    classes = {attribute: cls for entry in METHODS.values() for attribute, cls in entry.settings.items()}
    fields = [("method", Literal[tuple(METHODS)], setting("glmae", "the pretraining method"))]
    for attribute, cls in classes.items():
        users = tuple(name for name, entry in METHODS.items() if attribute in entry.settings)
        fields.append((attribute, cls, group(cls, TITLES.get(attribute, attribute), method=users)))
    return dataclasses.make_dataclass("PretrainSettings", fields, bases=(PretrainSettings,), kw_only=True)


def build_task(settings: PretrainSettings, plan: BatchPlan, inputs: InputStatistics | None = None) -> Task:
    """Return the task that the settings describe. InputError when they contradict each other.

    Args:
        inputs: what the patch embedding is initialised for; None leaves it as it is.
    """
    try:
        return METHODS[settings.method].build(settings, plan, inputs)
    except InputError:
        raise
    except (ValueError, AssertionError) as error:
        # a model's own check of its sizes
        raise InputError(f"--method {settings.method}: {error}") from None


def arguments_of(function: Callable, *groups: Any) -> dict[str, Any]:
    """Return the settings of `groups` that are parameters of `function`, without those that are none."""
    values = {name: value for settings in groups for name, value in vars(settings).items() if value is not None}
    return {name: values[name] for name in inspect.signature(function).parameters if name in values}


# ---------------------------------------------------------------- MAE and GL-MAE


def build_vit(settings: Any, inputs: InputStatistics | None = None) -> VisionTransformer3D:
    """Return the ViT with its decoder. Its position table is that of a local view, the size used in fine-tuning."""
    arguments = arguments_of(VisionTransformer3D, settings.encoder, settings.vit)
    vit = VisionTransformer3D(
        img_size=settings.views.local_size,
        in_chans=settings.data.preprocessing.channels,
        encoder_only=False,
        **(models_3dvit.SIZES[settings.encoder.model] | arguments),
    )
    if inputs:
        vit.standardize_input(inputs.mean, inputs.std)
    return vit


def local_spec(views: ViewSettings) -> ViewSpec:
    return views.spec(views.local_views, views.local_size, views.local_scale)


def check_removed(settings: Any, kind: str, size: Sequence[int], ratio: float) -> None:
    """Raise InputError where the masks of views of this size would remove no patch: nothing would be reconstructed."""
    patches = math.prod(encoder3d.grid_of(size, settings.encoder.patch_size))
    if num_keep(patches, ratio) == patches:
        raise InputError(
            f"--{kind}_size {shown(size)}, --mask_ratio_{kind} {ratio:g}: no patch of {patches} is removed, expected a "
            "larger view, smaller patches or a higher ratio"
        )


def build_mae(settings: Any, plan: BatchPlan, inputs: InputStatistics | None = None) -> Task:
    encoder = settings.encoder
    vit, fraction = build_vit(settings, inputs), settings.vit.decode_fraction
    check_removed(settings, "local", settings.views.local_size, settings.vit.mask_ratio_local)
    method = MAE(vit, settings.vit.mask_ratio_local, encoder.norm_pix_loss, encoder.norm_pix_eps, fraction)
    return Task(method, {"local": local_spec(settings.views)}, lambda step: {"rec_local": 1.0})


def build_glmae(settings: Any, plan: BatchPlan, inputs: InputStatistics | None = None) -> Task:
    glmae = settings.glmae
    weights = {term: weight for term in TERMS if (weight := getattr(glmae, f"weight_{term}")) > 0}
    specs = glmae_specs(settings, set(weights))
    vit = build_vit(settings, inputs)
    if not {"rec_global", "rec_local"} & set(weights):
        vit.remove_decoder()
    per_step = {
        "teacher_temp": scheduled(linear, glmae.teacher_temp, glmae.teacher_temp_epochs * plan.steps_per_epoch),
        "momentum": scheduled(cosine, glmae.momentum, plan.total_steps),
        "freeze_last_layer": round(glmae.freeze_last_layer * plan.steps_per_epoch),
    }
    arguments = arguments_of(GLMAE, glmae, settings.vit, settings.encoder)
    method = GLMAE(vit, **(arguments | per_step), terms=tuple(weights))
    return Task(method, specs, lambda step: weights)


def glmae_specs(settings: Any, terms: set[str]) -> dict[str, ViewSpec]:
    """Return the views that GL-MAE's losses need. InputError when there are no losses, or no views of such a kind."""
    views, glmae, names = settings.views, settings.glmae, ", ".join(sorted(terms))
    if not terms:
        raise InputError("--weight_*: all four are 0, at least one must be positive")
    if glmae.global_views < 1 and terms != {"rec_local"}:
        raise InputError(f"--global_views {glmae.global_views}: must be at least 1 for {names}")
    needs_local = bool({"rec_local", "global_local"} & terms)
    if needs_local and views.local_views < 1:
        raise InputError(f"--local_views {views.local_views}: must be at least 1 for {names}")
    encoder3d.grid_of(glmae.global_size, settings.encoder.patch_size)
    if "rec_global" in terms:
        check_removed(settings, "global", glmae.global_size, glmae.mask_ratio_global)
    if "rec_local" in terms:
        check_removed(settings, "local", views.local_size, settings.vit.mask_ratio_local)
    global_spec = views.spec(glmae.global_views, glmae.global_size, views.global_scale)
    return {"global": global_spec} | ({"local": local_spec(views)} if needs_local else {})


# ---------------------------------------------------------------- MiM


def build_mim(settings: Any, plan: BatchPlan, inputs: InputStatistics | None = None) -> Task:
    mim, views, encoder = settings.mim, settings.views, settings.encoder
    if encoder.model not in models_convvit3d.SIZES:
        raise InputError(f"--model {encoder.model}: --method mim has {' and '.join(models_convvit3d.SIZES)}")
    if encoder.patch_size != (16, 16, 16):
        raise InputError(f"--patch_size {encoder.patch_size}: --method mim has patches of 16 voxels")
    arguments = arguments_of(ConvViT3D, mim, encoder)
    if mim.embed_dims and not encoder.num_heads:
        # fine-tuning assumes the same where the number was not recorded
        arguments["num_heads"] = max(1, mim.embed_dims[3] // 32)
    factory = getattr(models_mim, f"mim_convvit3d_{encoder.model}_patch16")
    channels = settings.data.preprocessing.channels
    method = factory(img_size=views.local_size, in_chans=channels, **arguments, **arguments_of(MiM, mim, encoder))
    if inputs:
        method.encoder.standardize_input(inputs.mean, inputs.std)
    size = tuple(mim.group * n for n in views.local_size)
    return Task(
        method, {"image": views.spec(1, size, views.global_scale)}, partial(mim_loss_weights, mim, plan.total_steps)
    )


def mim_loss_weights(mim: MiMSettings, total_steps: int, step: int) -> dict[str, float]:
    """Return the weights of MiM's losses at a step; those of the levels follow `level_mode`."""
    factors = models_mim.level_factors(mim.level_mode, step / total_steps)
    weights = {f"rec_{level}": getattr(mim, f"weight_rec_{level}") * factor for level, factor in factors.items()}
    if mim.align != "none":
        weights |= {"align_up_mid": mim.weight_align_up_mid, "align_mid_down": mim.weight_align_mid_down}
    return weights


def scheduled(schedule: Callable[..., float], ends: tuple[float, float], total: float) -> Callable[[int], float]:
    """Return a schedule from `ends[0]` to `ends[1]` over `total` steps, as a function of the step."""
    return partial(schedule, total=total, start=ends[0], end=ends[1])


# headings of --help
TITLES = {"vit": "ViT", "glmae": "GL-MAE", "mim": "MiM"}
METHODS: dict[str, MethodEntry] = {
    "mae": MethodEntry(build_mae, {"vit": ViTSettings}),
    "glmae": MethodEntry(build_glmae, {"vit": ViTSettings, "glmae": GLMAESettings}),
    "mim": MethodEntry(build_mim, {"mim": MiMSettings}),
}
