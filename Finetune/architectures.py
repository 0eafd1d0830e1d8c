"""From settings to a network, and from a checkpoint to a network. The networks themselves are in heads.py.

resolve         settings, preset and pretrained checkpoint -> `Architecture`
build_model     `Architecture` -> network with random weights
load_encoder    pretrained checkpoint -> the encoder of a network
load_finetuned  fine-tuned checkpoint -> the network with its weights
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common import checkpoint
from common.config import from_dict, setting, shown
from common.errors import InputError, one_line
from Finetune import models_3dvit, models_convvit3d
from Finetune.encoder3d import triple
from Finetune.heads import HEADS, Architecture, Head, Triple, find_head
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_convvit3d import STRIDE, ConvViT3D
from Finetune.presets import Preset, check
from Finetune.pretrained import is_dense, read_checkpoint, recorded_heads, shorten

Quadruple = tuple[int, int, int, int]
Size = Literal["auto", "tiny", "small", "base", "large", "huge"]
State = dict[str, Tensor]
Sizes = dict[str, Any]
# the defaults of pretraining
DECODER = {"decoder_embed_dim": 576, "decoder_depth": 8, "decoder_num_heads": 16}
KEEP_CLASS_TOKEN = [name for name, head in HEADS.items() if head.class_token]
DECODER_HELP = "none: the checkpoint's, else pretraining's default"


@dataclass(kw_only=True)
class EncoderSettings:
    """Settings that choose the sizes of the encoder."""

    size: Size = setting("auto", "size of the encoder (mim: tiny, base); auto: that of the checkpoint, else base")
    embed_dim: int | None = setting(None, "width of the ViT; none: that of its size", least=1, most=65536)
    depth: int | None = setting(None, "blocks of the ViT; none: those of its size", least=1, most=1024)
    embed_dims: Quadruple | None = setting(None, "widths of the stages (mim); none: the size's", least=1, most=65536)
    depths: Quadruple | None = setting(None, "blocks of the stages (mim); none: the size's", least=1, most=1024)
    num_heads: int | None = setting(
        None, "attention heads; none: those of the checkpoint, else of the size", least=1, most=1024
    )
    patch_size: Triple | None = setting(
        None, "voxels of a patch; none: the checkpoint's or preset's", least=1, most=1024
    )
    roi: Triple | None = setting(None, "voxels of crops and windows; none: the preset's", least=1, most=1024)


@dataclass(kw_only=True)
class ModelSettings(EncoderSettings):
    """Settings that choose the network."""

    model: str = setting("unetr", "; ".join(f"{name}: {head.help}" for name, head in HEADS.items()))
    feature_size: int = setting(16, "width of the decoder; MONAI: 16, the authors: 48", least=1, most=4096)
    decoder_embed_dim: int | None = setting(None, f"width of MAE's decoder; {DECODER_HELP}", least=1, most=65536)
    decoder_depth: int | None = setting(None, f"blocks of MAE's decoder; {DECODER_HELP}", least=0, most=1024)
    decoder_num_heads: int | None = setting(None, f"heads of MAE's decoder; {DECODER_HELP}", least=1, most=1024)
    drop_path: float | None = setting(None, "stochastic depth; none: 0, or 0.2 for mim (authors)", least=0, below=1)
    class_token: Literal["auto", "keep", "drop"] = setting(
        "auto",
        f"CLS token of the ViT; auto: drop, as the authors do, but keep for {' and '.join(KEEP_CLASS_TOKEN)}; "
        "the classifier pools a token that is kept",
    )

    def __post_init__(self):
        find_head(self.model)


# ---------------------------------------------------------------- encoders


@dataclass(frozen=True)
class Encoder:
    """One of the two encoders.

    Args:
        name: its name in messages.
        choose: settings, preset and the sizes of the checkpoint ({} without one) -> sizes, as in `Architecture`.
        read: tensors and settings of a checkpoint -> sizes. KeyError or ValueError if it holds another encoder.
        build: returns the encoder with random weights, as heads need it.
        as_pretrained: returns it as pretraining has it, its output being the features.
    """

    name: str
    choose: Callable[[ModelSettings, Preset, Sizes], Sizes]
    read: Callable[[State, dict], Sizes]
    build: Callable[[Architecture], nn.Module]
    as_pretrained: Callable[[Architecture], nn.Module]


def choose_vit(settings: ModelSettings, preset: Preset, found: Sizes) -> Sizes:
    """Return the sizes of the ViT: those given, else the checkpoint's, else those of `--size`.

    The heads are the checkpoint's also where `--size` is given: with others its features would not be those it learned.
    """
    size = models_3dvit.SIZES["base" if settings.size == "auto" else settings.size]
    base = found if found and settings.size == "auto" else size
    width = settings.embed_dim or base["embed_dim"]
    # a checkpoint without a record: as usual for its width, else they must be given
    unrecorded = usual_heads(width) if found and settings.size == "auto" else size["num_heads"]
    return {
        "embed_dim": width,
        "depth": settings.depth or base["depth"],
        "num_heads": _check_heads(settings.num_heads or found.get("num_heads") or unrecorded, width),
        "patch_size": tuple(settings.patch_size or found.get("patch_size") or preset.patch_size),
        **choose_decoder(settings, found),
    }


def choose_decoder(settings: ModelSettings, found: Sizes) -> Sizes:
    """Return the sizes of MAE's decoder: those given, else the checkpoint's, else the defaults. {} for other heads."""
    given = {name: getattr(settings, name) for name in DECODER if getattr(settings, name) is not None}
    if not find_head(settings.model).decoder:
        for name, value in given.items():
            raise InputError(f"--{name} {value}: --model {settings.model} has no decoder of MAE")
        return {}
    sizes = DECODER | {name: found[name] for name in DECODER if found.get(name) is not None} | given
    _check_heads(sizes["decoder_num_heads"], sizes["decoder_embed_dim"], "decoder_num_heads")
    return sizes


def choose_hybrid(settings: ModelSettings, preset: Preset, found: Sizes) -> Sizes:
    """Return the sizes of the hybrid encoder: those given, else the checkpoint's, else those of `--size`.

    InputError for a setting that only the ViT has.
    """
    size = "base" if settings.size == "auto" else settings.size
    if size not in models_convvit3d.SIZES:
        raise InputError(f"--size {size}: must be {' or '.join(models_convvit3d.SIZES)} for the hybrid encoder")
    for name, alternative in (("embed_dim", "--embed_dims"), ("depth", "--depths")):
        if getattr(settings, name) is not None:
            raise InputError(f"--{name} {getattr(settings, name)}: the hybrid encoder has {alternative}")
    patch = (STRIDE,) * 3
    if settings.patch_size not in (None, patch):
        raise InputError(f"--patch_size {shown(settings.patch_size)}: must be {STRIDE} for the hybrid encoder")
    base = models_convvit3d.SIZES[size] | (found if settings.size == "auto" else {})
    widths = tuple(settings.embed_dims or base["embed_dims"])
    heads = settings.num_heads or found.get("num_heads") or max(1, widths[3] // 32)
    return {
        "embed_dims": widths,
        "depths": tuple(settings.depths or base["depths"]),
        "num_heads": _check_heads(heads, widths[3]),
        "patch_size": patch,
    }


def _check_heads(heads: int | None, width: int, name: str = "num_heads") -> int:
    if not heads or width % heads:
        raise InputError(f"--{name} {shown(heads)}: must divide the width {width}")
    return heads


def read_vit(state: State, args: dict) -> Sizes:
    """Return the sizes of a ViT, and of MAE's decoder if there is one, from the tensors.

    The heads are those of the settings; None where these do not record them.
    """
    return {
        "embed_dim": state["pos_embed"].shape[-1],
        "depth": _count(state, "blocks"),
        "num_heads": recorded_heads(args),
        "patch_size": triple(state["patch_embed.proj.weight"].shape[2:]),
        **read_decoder(state, args),
    }


def usual_heads(width: int) -> int | None:
    """Return the attention heads of the named ViT of this width, None where there is none."""
    return {size["embed_dim"]: size["num_heads"] for size in models_3dvit.SIZES.values()}.get(width)


def read_decoder(state: State, args: dict) -> Sizes:
    """Return the sizes of MAE's decoder from its tensors, and its heads from the settings. {} if there is none, or one
    with cross-attention, which decodes removed patches only."""
    if "decoder_embed.weight" not in state or "decoder_blocks.0.attn.kv.weight" in state:
        return {}
    return {
        "decoder_embed_dim": len(state["decoder_embed.weight"]),
        "decoder_depth": sum(bool(re.fullmatch(r"decoder_blocks\.\d+\.norm1\.weight", name)) for name in state),
        "decoder_num_heads": args.get("decoder_num_heads"),
    }


def read_hybrid(state: State, args: dict) -> Sizes:
    """Return the sizes of a hybrid encoder from its tensors, and its heads from the settings."""
    return {
        "embed_dims": tuple(state[f"patch_embed{stage}.proj.weight"].shape[0] for stage in (1, 2, 3, 4)),
        "depths": tuple(_count(state, f"blocks{stage}") for stage in (1, 2, 3, 4)),
        "num_heads": recorded_heads(args),
        "patch_size": (STRIDE,) * 3,
    }


def _count(state: State, blocks: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith(f"{blocks}."))


def build_vit(a: Architecture) -> VisionTransformer3D:
    """Return the ViT with random weights."""
    return VisionTransformer3D(
        img_size=a.roi,
        patch_size=a.patch_size,
        in_chans=a.in_chans,
        embed_dim=a.embed_dim,
        depth=a.depth,
        num_heads=a.num_heads,
        encoder_only=not a.decoder_embed_dim,
        decoder_embed_dim=a.decoder_embed_dim,
        decoder_depth=a.decoder_depth,
        decoder_num_heads=a.decoder_num_heads,
        class_token=a.class_token,
        drop_path_rate=a.drop_path,
    )


def build_hybrid(a: Architecture, pyramid: bool = True) -> ConvViT3D:
    """Return the hybrid encoder, with its feature pyramid for segmentation or without as in pretraining."""
    sizes = (a.roi, a.in_chans, a.embed_dims, a.depths, a.num_heads)
    return ConvViT3D(*sizes, pyramid=pyramid, drop_path_rate=a.drop_path)


ENCODERS = {
    "vit": Encoder("the ViT", choose_vit, read_vit, build_vit, build_vit),
    "hybrid": Encoder(
        "MiM's hybrid encoder", choose_hybrid, read_hybrid, build_hybrid, partial(build_hybrid, pyramid=False)
    ),
}


# ---------------------------------------------------------------- from settings


def model_for(model: str, preset: Preset) -> str:
    """Return the network to train: `model`, or the classifier if `model` is the default and the preset classifies.

    Raises:
        InputError: the network is for another task.
    """
    classifies = preset.task == "classification"
    name = "classifier" if classifies and model == "unetr" else model
    if find_head(name).classifies != classifies:
        raise InputError(f"--model {name}: the task of preset {preset.name} is {preset.task}")
    return name


def resolve(settings: ModelSettings, preset: Preset, init: Path | None, key: str | None = None) -> Architecture:
    """Return the architecture that the settings, the preset and the pretrained checkpoint `init` ask for.

    `key` is where the weights are in the checkpoint, as in `read_checkpoint`.

    Raises:
        InputError: they contradict each other, or cannot be built.
    """
    head = find_head(settings.model)
    if head.encoder:
        sizes = encoder_sizes(ENCODERS[head.encoder], settings, preset, init, key)
    elif init:
        raise InputError(f"{init}: --model {settings.model} has no encoder to load, it starts from random weights only")
    else:
        sizes = {"patch_size": (1, 1, 1)}
    architecture = Architecture(
        model=settings.model,
        in_chans=preset.channels,
        out_channels=preset.out_channels,
        roi=tuple(settings.roi or preset.roi),
        feature_size=settings.feature_size,
        drop_path=head.drop_path if settings.drop_path is None else settings.drop_path,
        class_token=keeps_class_token(settings, head),
        **sizes,
    )
    head.check(architecture)
    if any(size % patch for size, patch in zip(architecture.roi, architecture.patch_size)):
        roi, patch = shown(architecture.roi), shown(architecture.patch_size)
        raise InputError(f"--roi {roi}: must be divisible by the patch size {patch}")
    return architecture


def keeps_class_token(settings: ModelSettings, head: Head) -> bool:
    """Return whether the encoder has a CLS token. InputError if one is asked for where there is no ViT."""
    if settings.class_token != "auto" and head.encoder != "vit":
        raise InputError(f"--class_token {settings.class_token}: --model {settings.model} has no ViT")
    return head.class_token if settings.class_token == "auto" else settings.class_token == "keep"


def encoder_sizes(
    encoder: Encoder, settings: ModelSettings, preset: Preset, init: Path | None, key: str | None
) -> Sizes:
    """Return the sizes of an encoder as `resolve` chooses them. InputError if settings and checkpoint disagree."""
    found = read_encoder(init, encoder, key) if init else {}
    sizes = encoder.choose(settings, preset, found)
    if init and find_head(settings.model).decoder and "decoder_embed_dim" not in found:
        raise InputError(f"{init}: found no decoder, expected that of MAE for --model {settings.model}")
    for name, value in found.items():
        if name in sizes and value is not None and value != sizes[name]:
            raise InputError(f"{init}: found an encoder with {name} {shown(value)}, expected {shown(sizes[name])}")
    return sizes


def build_model(a: Architecture) -> nn.Module:
    """Return the network with random weights: (B, in_chans, *roi) -> logits, as `Head` describes."""
    head = find_head(a.model)
    if head.encoder is None:
        return head.build(None, a)
    encoder = ENCODERS[head.encoder]
    return head.build(encoder.as_pretrained(a) if head.as_pretrained else encoder.build(a), a)


# ---------------------------------------------------------------- from checkpoints


def read_encoder(path: Path, encoder: Encoder, key: str | None = None) -> Sizes:
    """Return the sizes of the encoder in a checkpoint. InputError if it cannot be read or holds another encoder."""
    try:
        state, extras = read_checkpoint(path, key)
    except ValueError as error:
        raise InputError(str(error)) from None
    args = extras["args"] if isinstance(extras.get("args"), dict) else {}
    recorded = args.get("architecture") if isinstance(args.get("architecture"), dict) else args
    try:
        return encoder.read(state, recorded)
    except (KeyError, ValueError, IndexError):
        raise InputError(f"{path}: found {shorten(sorted(state))}, expected the weights of {encoder.name}") from None


def load_encoder(model: nn.Module, path: Path, key: str | None = None, decoder: bool = False) -> None:
    """Load a pretrained encoder into `model.backbone`, with MAE's decoder if `decoder` is true.

    Raises:
        InputError: not all tensors are there and fit.
    """
    try:
        missing, _ = model.backbone.load_pretrained_checkpoint(path, encoder_only=not decoder, checkpoint_key=key)
        if decoder and missing:
            raise ValueError(f"{path}: found no {shorten(missing)} that fits, expected all tensors of the decoder")
    except ValueError as error:
        raise InputError(str(error)) from None


def load_finetuned(path: str | Path) -> tuple[nn.Module, Architecture, Preset, dict[str, Any]]:
    """Return (model, architecture, preset, args) from a checkpoint of `Finetune.main_finetune` and nothing else.

    Raises:
        InputError: the file is no such checkpoint, or its network is not registered.
    """
    content = checkpoint.load(path)
    args = content.get("args")
    if "state_dict" not in content or not isinstance(args, dict) or "architecture" not in args:
        found = shorten(sorted(map(str, content)))
        raise InputError(f"{path}: found {found}, expected 'state_dict' and 'args' of a fine-tuned network")
    architecture = from_dict(args["architecture"], Architecture, f"{path}: architecture")
    preset = check(from_dict(args.get("preset"), Preset, f"{path}: preset"), f"{path}: preset")
    find_head(architecture.model, f"{path}: model")
    model = build_with_weights(architecture, content["state_dict"], path)
    return model.eval(), architecture, preset, args


def build_with_weights(architecture: Architecture, state: State, where: str | Path) -> nn.Module:
    """Return the network with the weights `state`. InputError if it cannot be built or they do not fit."""
    check_dense(state, where)
    try:
        # compares the shapes before memory is allocated for them; MONAI's networks cannot be built on this device
        if find_head(architecture.model).encoder:
            with torch.device("meta"):
                skeleton = build_model(architecture).to("meta")
            load_state(skeleton, {name: value.to("meta") for name, value in state.items()}, where)
        model = build_model(architecture)
    except InputError:
        raise
    # raised by a layer that does not accept the sizes
    except (ValueError, ZeroDivisionError, AssertionError) as error:
        raise InputError(f"{where}: the network cannot be built ({one_line(error)})") from None
    load_state(model, state, where)
    return model


def check_dense(state: object, where: str | Path) -> None:
    """Raise InputError unless the weights of a checkpoint are a dict of names and dense tensors."""
    if not isinstance(state, dict):
        raise InputError(f"{where}: found {type(state).__name__}, expected a dict of weights")
    if wrong := [str(name) for name, value in state.items() if not isinstance(name, str) or not is_dense(value)]:
        raise InputError(f"{where}: found {len(wrong)} values that are not dense tensors: {shorten(wrong)}")


def load_state(model: nn.Module, state: State, where: str | Path) -> None:
    """Load a state dict strictly. InputError with the first tensors that do not fit; `where` names its file."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{where}: does not fit the model: {one_line(error)}") from None
