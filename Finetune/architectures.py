"""From settings to a network, and from a fine-tuned checkpoint back to it. `Architecture` is all that is needed to
build one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from monai.networks.nets import DynUNet, SwinUNETR
from torch import Tensor, nn

from common import checkpoint
from common.config import from_dict, setting
from common.errors import InputError, one_line
from Finetune.models_3dvit import VisionTransformer3D, grid_of
from Finetune.models_classifier import Classifier
from Finetune.models_convvit3d import STRIDE, ConvViT3D
from Finetune.models_unetr import UNETR, ConvViT3DUNETR, LinearProbe
from Finetune.presets import Preset
from Finetune.pretrained import read_checkpoint

Triple = tuple[int, int, int]
Quadruple = tuple[int, int, int, int]
VIT_SIZES = {  # width, blocks, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
HYBRID_SIZES = {"tiny": (12, 24, 48, 96), "base": (48, 96, 192, 384)}  # widths of the stages; 32 channels a head
HYBRID_DEPTHS = (2, 2, 2, 11)
ENCODERS = ("unetr", "linear", "mim", "classifier")  # the others have no encoder of ours, and start from scratch


@dataclass(kw_only=True)
class ModelSettings:
    """Settings that choose the network."""

    model: Literal["unetr", "mim", "linear", "swinunetr", "dynunet", "classifier"] = setting(
        "unetr",
        "unetr: ViT with UNETR's decoder; mim: hybrid encoder with Swin UNETR's decoder; "
        "linear: one layer on the frozen ViT; swinunetr, dynunet (nnU-Net-like): MONAI's, from scratch only; "
        "classifier: the ViT for presets that classify, where it is the default",
    )
    size: Literal["auto", "tiny", "small", "base", "large", "huge"] = setting(
        "auto", "size of the encoder (MiM has tiny and base); auto: that of the checkpoint, base from scratch"
    )
    embed_dim: int | None = setting(None, "width of the ViT instead of the size's own")
    depth: int | None = setting(None, "blocks of the ViT instead of the size's own")
    embed_dims: Quadruple | None = setting(
        None, "widths of the hybrid encoder's stages instead of the size's own (mim)"
    )
    depths: Quadruple | None = setting(None, "blocks of the hybrid encoder's stages instead of 2 2 2 11 (mim)")
    num_heads: int | None = setting(None, "attention heads instead of the size's own")
    patch_size: Triple | None = setting(None, "voxels of a patch (D H W); none: the checkpoint's, else the preset's")
    roi: Triple | None = setting(None, "voxels of a crop and of the sliding window (D H W); none: the preset's")
    feature_size: int = setting(
        16, "width of the decoder at full resolution: 16 MONAI's default, 48 the authors'; swinunetr: a multiple of 12"
    )
    drop_path: float | None = setting(None, "stochastic depth of the encoder; none: 0, or 0.2 for mim (the authors')")


@dataclass(frozen=True)
class Architecture:
    """What a network is, in plain types; stored in every checkpoint. A ViT has embed_dim and depth, the hybrid
    embed_dims and depths."""

    model: str
    in_chans: int
    out_channels: int
    roi: Triple
    patch_size: Triple
    feature_size: int
    num_heads: int = 0
    embed_dim: int = 0
    depth: int = 0
    embed_dims: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    drop_path: float = 0.0

    @property
    def grid_size(self) -> Triple:
        return grid_of(self.roi, self.patch_size)


# ---------------------------------------------------------------- from settings


def resolve(settings: ModelSettings, preset: Preset, init: Path | None) -> Architecture:
    """The architecture that the settings, the preset and the checkpoint `init` mean together. InputError where they
    disagree."""
    for name in ("embed_dim", "depth", "num_heads", "feature_size"):
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            raise InputError(f"{name}: found {getattr(settings, name)}, needs at least 1")
    if settings.drop_path is not None and not 0 <= settings.drop_path < 1:
        raise InputError(f"drop_path: found {settings.drop_path}, needs at least 0 and less than 1")
    roi = tuple(settings.roi or preset.roi)
    if settings.model in ("unetr", "linear", "classifier"):
        encoder, patch = _vit(settings, preset, init)
    elif settings.model == "mim":
        encoder, patch = _hybrid(settings, init), (STRIDE,) * 3
    else:
        encoder, patch = {}, (1, 1, 1)
        if init:
            raise InputError(f"{init}: --model {settings.model} starts from scratch only, it has none of our encoders")
        if settings.model == "swinunetr" and settings.feature_size % 12:
            raise InputError(f"feature_size: found {settings.feature_size}, --model swinunetr needs a multiple of 12")
    if settings.model == "dynunet" and len(dynunet_strides(roi)) < 3:
        raise InputError(
            f"roi: found {roi}, --model dynunet halves an axis while it is even and keeps 4 voxels, and needs to twice"
        )
    if settings.model in ("mim", "swinunetr") and (any(size % 32 for size in roi) or max(roi) < 64):
        raise InputError(
            f"roi: found {roi}, --model {settings.model} needs multiples of 32 voxels, one of them 64 or more"
        )
    try:
        grid_of(roi, patch)
    except ValueError:
        raise InputError(f"roi: found {roi}, the patch size {patch} must divide it") from None
    return Architecture(
        model=settings.model,
        in_chans=preset.channels,
        out_channels=preset.out_channels,
        roi=roi,
        patch_size=tuple(patch),
        feature_size=settings.feature_size,
        drop_path=(0.2 if settings.model == "mim" else 0.0) if settings.drop_path is None else settings.drop_path,
        **encoder,
    )


def _vit(settings: ModelSettings, preset: Preset, init: Path | None) -> tuple[dict[str, Any], Triple]:
    known = read_encoder(init, vit_of, "a ViT") if init else {}
    if known and settings.size == "auto":
        width, depth, heads = known["embed_dim"], known["depth"], known["num_heads"]
    else:
        width, depth, heads = VIT_SIZES["base" if settings.size == "auto" else settings.size]
    wanted = {"embed_dim": settings.embed_dim or width, "depth": settings.depth or depth}
    patch = settings.patch_size or known.get("patch_size") or preset.patch_size
    _agree(init, known, wanted | {"patch_size": tuple(patch)})
    return wanted | {"num_heads": _heads(settings.num_heads or heads, wanted["embed_dim"])}, patch


def _hybrid(settings: ModelSettings, init: Path | None) -> dict[str, Any]:
    known = read_encoder(init, hybrid_of, "MiM's hybrid") if init else {}
    size = "base" if settings.size == "auto" else settings.size
    if size not in HYBRID_SIZES:
        raise InputError(f"size: found {size}, --model mim has {', '.join(HYBRID_SIZES)}")
    for name, allowed in (("embed_dim", None), ("depth", None), ("patch_size", (STRIDE,) * 3)):
        if getattr(settings, name) not in (None, allowed):
            raise InputError(
                f"{name}: found {getattr(settings, name)}, --model mim has patches of {STRIDE} and takes "
                "--embed_dims and --depths, one for each stage"
            )
    given = known if settings.size == "auto" else {}
    wanted = {
        "embed_dims": tuple(settings.embed_dims or given.get("embed_dims") or HYBRID_SIZES[size]),
        "depths": tuple(settings.depths or given.get("depths") or HYBRID_DEPTHS),
    }
    _agree(init, known, wanted)
    width = wanted["embed_dims"][3]
    heads = settings.num_heads or given.get("num_heads") or max(1, width // 32)
    return wanted | {"num_heads": _heads(heads, width)}


def _heads(heads: int | None, width: int) -> int:
    if not heads or width % heads:
        raise InputError(f"num_heads: found {heads}, must divide the width {width}")
    return heads


def _agree(init: Path | None, known: dict[str, Any], asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        if known and known[name] != value:
            raise InputError(f"{init}: its encoder has {name} {known[name]}, the settings ask for {value}")


# ---------------------------------------------------------------- from checkpoints


def read_encoder(
    path: Path, describe: Callable[[dict[str, Tensor], dict], dict[str, Any]], kind: str
) -> dict[str, Any]:
    """What `describe` reads off the tensors of a checkpoint. InputError when the file cannot be read or holds another
    encoder."""
    try:
        state, extras = read_checkpoint(path)
    except ValueError as error:
        raise InputError(str(error)) from None
    args = extras.get("args") or {}
    try:
        return describe(state, args.get("architecture") or args)
    except (KeyError, ValueError, IndexError):
        raise InputError(f"{path}: holds no encoder of {kind}, found {some_names(state)}") from None


def vit_of(state: dict[str, Tensor], args: dict) -> dict[str, Any]:
    """Width, blocks and patch of a ViT from its tensors; heads from its settings, or 64 channels a head as in all
    sizes but huge."""
    width = state["pos_embed"].shape[-1]
    known = {embed_dim: heads for embed_dim, _, heads in VIT_SIZES.values()}
    return {
        "embed_dim": width,
        "depth": _count(state, "blocks"),
        "num_heads": args.get("num_heads") or known.get(width),
        "patch_size": tuple(state["patch_embed.proj.weight"].shape[2:]),
    }


def hybrid_of(state: dict[str, Tensor], args: dict) -> dict[str, Any]:
    """Widths and blocks of the hybrid encoder's stages from its tensors; heads from its settings."""
    return {
        "embed_dims": tuple(state[f"patch_embed{stage}.proj.weight"].shape[0] for stage in (1, 2, 3, 4)),
        "depths": tuple(_count(state, f"blocks{stage}") for stage in (1, 2, 3, 4)),
        "num_heads": args.get("num_heads"),
    }


def _count(state: dict[str, Tensor], blocks: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith(f"{blocks}."))


def some_names(state: dict) -> str:
    """A few names of a state dict, for messages."""
    names = sorted(state)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def load_encoder(model: nn.Module, path: Path) -> None:
    """The pretrained encoder into `model.backbone`; InputError unless every tensor of it fits."""
    try:
        model.backbone.load_pretrained_checkpoint(path)
    except ValueError as error:
        raise InputError(str(error)) from None


def load_finetuned(path: str | Path) -> tuple[nn.Module, Architecture, Preset, dict[str, Any]]:
    """(model, architecture, preset, args) from a checkpoint of main_finetune alone. InputError when it is none."""
    content = checkpoint.load(path)
    args = content.get("args")
    if "state_dict" not in content or not isinstance(args, dict) or "architecture" not in args:
        raise InputError(
            f"{path}: not a fine-tuned checkpoint (needs 'state_dict' and its settings), found {some_names(content)}"
        )
    architecture = from_dict(args["architecture"], Architecture, f"{path}: architecture")
    preset = from_dict(args["preset"], Preset, f"{path}: preset")
    model = build_model(architecture)
    load_state(model, content["state_dict"], path)
    return model.eval(), architecture, preset, args


def load_state(model: nn.Module, state: dict[str, Tensor], where: str | Path) -> None:
    """Strictly; InputError with the first lines of what does not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{where}: does not fit the model: {one_line(error)}") from None


# ---------------------------------------------------------------- networks


def build_model(a: Architecture) -> nn.Module:
    """The network with random weights: (B, in_chans, *roi) -> logits (B, out_channels, *roi)."""
    if a.model == "swinunetr":
        return SwinUNETR(in_channels=a.in_chans, out_channels=a.out_channels, feature_size=a.feature_size)
    if a.model == "dynunet":
        return dynunet(a)
    if a.model == "mim":
        backbone = ConvViT3D(
            a.roi, a.in_chans, a.embed_dims, a.depths, a.num_heads, pyramid=True, drop_path_rate=a.drop_path
        )
        return ConvViT3DUNETR(backbone, a.out_channels)
    backbone = VisionTransformer3D(
        img_size=a.roi,
        patch_size=a.patch_size,
        in_chans=a.in_chans,
        embed_dim=a.embed_dim,
        depth=a.depth,
        num_heads=a.num_heads,
        class_token=False,  # as the authors fine-tune
        drop_path_rate=a.drop_path,
    )
    if a.model == "classifier":
        return Classifier(backbone, a.out_channels)
    if a.model == "linear":
        return LinearProbe(backbone, a.out_channels)
    return UNETR(backbone, a.in_chans, a.out_channels, a.feature_size)


def dynunet_strides(roi: Triple) -> list[Triple]:
    """Of each level: an axis is halved while it is even and keeps 4 voxels, at most 5 times."""
    strides, size = [(1, 1, 1)], list(roi)
    while len(strides) < 6:
        stride = tuple(2 if s >= 8 and s % 2 == 0 else 1 for s in size)
        if max(stride) == 1:
            break
        strides.append(stride)
        size = [s // n for s, n in zip(size, stride)]
    return strides


def dynunet(a: Architecture) -> DynUNet:
    """nnU-Net's plain U-Net by its own rules of thumb: halved by `dynunet_strides`, widths double from 2 x feature_size
    (32) up to 320. Without deep supervision, which is a matter of the loss (so it is nnU-Net-like, not nnU-Net)."""
    strides = dynunet_strides(a.roi)
    return DynUNet(
        spatial_dims=3,
        in_channels=a.in_chans,
        out_channels=a.out_channels,
        kernel_size=[3] * len(strides),
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=[min(320, 2 * a.feature_size * 2**level) for level in range(len(strides))],
    )


def freeze_encoder(model: nn.Module) -> None:
    """No gradient for what pretraining hands on. The hybrid's pyramid has parts of its own, which stay trainable."""
    names = set(getattr(model.backbone, "encoder_names", None) or dict(model.backbone.named_parameters()))
    for name, parameter in model.backbone.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
