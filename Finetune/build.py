"""From settings to a network, and from a fine-tuned checkpoint back to it. `Architecture` is all that is needed to
build one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from common import checkpoint
from common.config import InputError, from_dict, setting
from Finetune.models_3dvit import VisionTransformer3D, grid_of, read_checkpoint
from Finetune.models_convvit3d import STRIDE, ConvViT3D
from Finetune.models_unetr import UNETR, ConvViT3DUNETR, LinearProbe
from Finetune.presets import Preset

SIZES = {  # width, blocks, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
HYBRID_SIZES = {  # widths and blocks of the four stages, heads
    "tiny": ((12, 24, 48, 96), (2, 2, 2, 11), 3),
    "base": ((48, 96, 192, 384), (2, 2, 2, 11), 12),
}
HEADS = {width: heads for width, _, heads in SIZES.values()}
Triple = tuple[int, int, int]


@dataclass(kw_only=True)
class ModelSettings:
    """Settings that choose the network."""

    model: Literal["unetr", "linear", "mim"] = setting(
        "unetr", "unetr: ViT with UNETR's decoder; linear: one layer on the ViT; mim: hybrid encoder with MiM's decoder"
    )
    size: Literal["auto", "tiny", "small", "base", "large", "huge"] = setting(
        "auto", "size of the encoder (mim: tiny, base); auto: that of the checkpoint, base from scratch"
    )
    embed_dim: int | None = setting(None, "width of the encoder instead of the size's own")
    depth: int | None = setting(None, "blocks of the encoder instead of the size's own")
    num_heads: int | None = setting(None, "attention heads instead of the size's own")
    patch_size: Triple | None = setting(None, "voxels of a patch (D H W); none: the checkpoint's, else the preset's")
    roi: Triple | None = setting(None, "voxels of a crop and of the sliding window (D H W); none: the preset's")
    feature_size: int = setting(
        16, "unetr: width of the decoder at full resolution, 16 MONAI's default, 48 the authors'; mim: its encoder's"
    )
    drop_path: float | None = setting(None, "stochastic depth of the encoder; none: 0, and mim's own 0.2")
    stride32_norm: Literal["batch", "instance"] = setting(
        "batch", "mim: norm of its coarsest map; instance: single crops"
    )


@dataclass(frozen=True)
class Architecture:
    """What a network is, in plain types; stored in every checkpoint."""

    model: str
    in_chans: int
    out_channels: int
    roi: Triple
    patch_size: Triple
    embed_dim: int
    depth: int
    num_heads: int
    feature_size: int
    drop_path: float = 0.0
    embed_dims: tuple[int, ...] = ()  # of the hybrid encoder's four stages
    depths: tuple[int, ...] = ()
    stride32_norm: Literal["batch", "instance"] = "batch"

    @property
    def grid_size(self) -> Triple:
        return grid_of(self.roi, self.patch_size)


def resolve(settings: ModelSettings, preset: Preset, init: Path | None) -> Architecture:
    """The architecture that the settings, the preset and the checkpoint `init` mean together. InputError where they
    disagree."""
    if settings.model == "mim":
        return resolve_mim(settings, preset, init)
    known = encoder_of(init) if init else {}
    if settings.size != "auto" or not known:
        width, depth, heads = SIZES["base" if settings.size == "auto" else settings.size]
    else:
        width, depth, heads = known["embed_dim"], known["depth"], known["num_heads"]
    width, depth = settings.embed_dim or width, settings.depth or depth
    heads = settings.num_heads or heads
    if not heads or width % heads:
        raise InputError(f"num_heads: found {heads}, must divide the width {width}")
    patch = settings.patch_size or known.get("patch_size") or preset.patch_size
    roi = settings.roi or preset.roi
    try:
        grid_of(roi, patch)
    except ValueError:
        raise InputError(f"roi: found {roi}, the patch size {patch} must divide it") from None
    wanted = {"embed_dim": width, "depth": depth, "patch_size": tuple(patch)}
    for name, value in wanted.items():
        if known and known[name] != value:
            raise InputError(f"{init}: its encoder has {name} {known[name]}, the settings ask for {value}")
    return Architecture(
        model=settings.model,
        in_chans=preset.channels,
        out_channels=preset.out_channels,
        roi=tuple(roi),
        num_heads=heads,
        feature_size=settings.feature_size,
        drop_path=settings.drop_path or 0.0,
        **wanted,
    )


def resolve_mim(settings: ModelSettings, preset: Preset, init: Path | None) -> Architecture:
    """`resolve` for the hybrid encoder: widths and depths of its four stages are the checkpoint's, else the size's."""
    for name in ("embed_dim", "depth"):
        if getattr(settings, name):
            raise InputError(
                f"{name}: one number says nothing of MiM's four stages; --size tiny or base, or --init FILE"
            )
    if settings.patch_size not in (None, (STRIDE,) * 3):
        raise InputError(f"patch_size: found {settings.patch_size}, MiM's tokens have {STRIDE} voxels an axis")
    roi = tuple(settings.roi or preset.roi)
    if any(n % 32 for n in roi):
        raise InputError(f"roi: found {roi}, MiM's network needs multiples of 32 voxels")
    if settings.stride32_norm == "instance" and roi == (32, 32, 32):
        raise InputError(f"stride32_norm: found instance, the coarsest map of roi {roi} has one voxel; use batch")
    known = hybrid_of(init) if init else {}
    size = HYBRID_SIZES.get("base" if settings.size == "auto" else settings.size)
    if size is None:
        raise InputError(f"size: found {settings.size}, MiM has {' and '.join(HYBRID_SIZES)}")
    widths, depths, heads = size
    if known and settings.size != "auto" and (known["embed_dims"], known["depths"]) != (widths, depths):
        raise InputError(
            f"{init}: its encoder has widths {known['embed_dims']} and depths {known['depths']}, "
            f"--size {settings.size} asks for {widths} and {depths}"
        )
    if known:
        widths, depths, heads = known["embed_dims"], known["depths"], known["num_heads"]
    heads = settings.num_heads or heads
    if not heads or widths[-1] % heads:
        raise InputError(f"num_heads: found {heads}, must divide the width {widths[-1]}")
    return Architecture(
        model="mim",
        in_chans=preset.channels,
        out_channels=preset.out_channels,
        roi=roi,
        patch_size=(STRIDE,) * 3,
        embed_dim=widths[-1],
        depth=depths[-1],
        num_heads=heads,
        feature_size=widths[0],
        drop_path=0.2 if settings.drop_path is None else settings.drop_path,
        embed_dims=widths,
        depths=depths,
        stride32_norm=settings.stride32_norm,
    )


def encoder_of(path: Path) -> dict[str, Any]:
    """Width, blocks, heads and patch of the ViT in a checkpoint, read off its tensors (heads: off its settings, or its
    width)."""
    state, extras = read_weights(path)
    try:
        patch, table = state["patch_embed.proj.weight"], state["pos_embed"]
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    except (KeyError, ValueError):
        raise InputError(
            f"{path}: holds no ViT encoder (patch_embed, pos_embed, blocks); found {shown(state)}"
        ) from None
    width = table.shape[-1]
    args = extras.get("args") or {}
    heads = args.get("num_heads") or (args.get("architecture") or {}).get("num_heads") or HEADS.get(width)
    return {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": tuple(patch.shape[2:])}


def hybrid_of(path: Path) -> dict[str, Any]:
    """Widths, blocks and heads of the hybrid encoder in a checkpoint, read off its tensors (heads: off its settings, or
    32 channels each)."""
    state, extras = read_weights(path)
    try:
        widths = tuple(len(state[f"patch_embed{stage}.proj.weight"]) for stage in (1, 2, 3, 4))
        depths = tuple(
            1 + max(int(name.split(".")[1]) for name in state if name.startswith(f"blocks{stage}."))
            for stage in (1, 2, 3, 4)
        )
    except (KeyError, ValueError):
        raise InputError(
            f"{path}: holds no hybrid encoder (patch_embed1..4, blocks1..4); found {shown(state)}"
        ) from None
    args = extras.get("args") or {}
    _, _, named = HYBRID_SIZES.get(args.get("model"), (None, None, widths[-1] // 32))
    heads = args.get("num_heads") or (args.get("architecture") or {}).get("num_heads") or named
    return {"embed_dims": widths, "depths": depths, "num_heads": heads}


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """`read_checkpoint` with an InputError."""
    try:
        return read_checkpoint(path)
    except ValueError as error:
        raise InputError(str(error)) from None


def shown(state: dict) -> str:
    names = sorted(state)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def build_model(architecture: Architecture) -> nn.Module:
    """The network with random weights: (B, in_chans, *roi) -> logits (B, out_channels, *roi)."""
    a = architecture
    if a.model == "mim":
        hybrid = ConvViT3D(
            img_size=a.roi,
            in_chans=a.in_chans,
            embed_dims=a.embed_dims,
            depths=a.depths,
            num_heads=a.num_heads,
            pyramid=True,
            drop_path_rate=a.drop_path,
            stride32_norm=a.stride32_norm,
        )
        return ConvViT3DUNETR(hybrid, a.out_channels)
    backbone = VisionTransformer3D(
        img_size=a.roi,
        patch_size=a.patch_size,
        in_chans=a.in_chans,
        embed_dim=a.embed_dim,
        depth=a.depth,
        num_heads=a.num_heads,
        class_token=False,
        drop_path_rate=a.drop_path,
    )
    if a.model == "linear":
        return LinearProbe(backbone, a.out_channels)
    return UNETR(backbone, a.in_chans, a.out_channels, a.feature_size)


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
            f"{path}: not a fine-tuned checkpoint (needs 'state_dict' and its settings), found {shown(content)}"
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
        raise InputError(f"{where}: does not fit the model: {' '.join(str(error).split())[:300]}") from None
