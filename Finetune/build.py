"""From settings to a network, and from a fine-tuned checkpoint back to it. `Architecture` is all that is needed to
build one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from common import checkpoint
from common.config import InputError, from_dict, setting
from Finetune.models_3dvit import VisionTransformer3D, grid_of, read_checkpoint
from Finetune.models_unetr import UNETR, LinearProbe
from Finetune.presets import Preset

SIZES = {  # width, blocks, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
HEADS = {width: heads for width, _, heads in SIZES.values()}
Triple = tuple[int, int, int]


@dataclass(kw_only=True)
class ModelSettings:
    """Settings that choose the network."""

    model: Literal["unetr", "linear"] = setting(
        "unetr", "unetr: ViT with UNETR's decoder; linear: one layer on the ViT"
    )
    size: Literal["auto", "tiny", "small", "base", "large", "huge"] = setting(
        "auto", "size of the encoder; auto: that of the checkpoint, base from scratch"
    )
    embed_dim: int | None = setting(None, "width of the encoder instead of the size's own")
    depth: int | None = setting(None, "blocks of the encoder instead of the size's own")
    num_heads: int | None = setting(None, "attention heads instead of the size's own")
    patch_size: Triple | None = setting(None, "voxels of a patch (D H W); none: the checkpoint's, else the preset's")
    roi: Triple | None = setting(None, "voxels of a crop and of the sliding window (D H W); none: the preset's")
    feature_size: int = setting(16, "width of the decoder at full resolution: 16 MONAI's default, 48 the authors'")
    drop_path: float = setting(0.0, "stochastic depth of the encoder")


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

    @property
    def grid_size(self) -> Triple:
        return grid_of(self.roi, self.patch_size)


def resolve(settings: ModelSettings, preset: Preset, init: Path | None) -> Architecture:
    """The architecture that the settings, the preset and the checkpoint `init` mean together. InputError where they
    disagree."""
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
        drop_path=settings.drop_path,
        **wanted,
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
