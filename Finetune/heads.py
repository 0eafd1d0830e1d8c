"""The networks that fine-tuning can train, in one table: `HEADS`, name of `--model` -> `Head`.

A network is a head on one of the two encoders, or has neither and starts from random weights. To add one, write the
nn.Module and add one entry, here or from other code before the settings are read:

    HEADS["mine"] = Head(lambda backbone, a: Mine(backbone, a.out_channels), "one phrase for --help")
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from monai.networks.nets import DynUNet, SwinUNETR
from torch import nn

from common.config import did_you_mean, setting, shown
from common.errors import InputError
from Finetune.encoder3d import grid_of
from Finetune.models_classifier import Classifier
from Finetune.models_light import LightDecoder, MAEDecoder
from Finetune.models_unetr import UNETR, ConvViT3DUNETR, LinearProbe, num_levels

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build a network, in plain types. Stored in every checkpoint.

    A ViT has `embed_dim`, `depth` and `class_token`, and `decoder_*` if MAE's decoder is kept. The hybrid encoder has
    `embed_dims` and `depths`.
    """

    model: str
    in_chans: int = setting(least=1, most=1024)
    out_channels: int = setting(least=1, most=255)
    roi: Triple = setting(least=1, most=1024)
    patch_size: Triple = setting(least=1, most=1024)
    feature_size: int = setting(least=1, most=4096)
    num_heads: int = setting(0, least=0, most=1024)
    embed_dim: int = setting(0, least=0, most=65536)
    depth: int = setting(0, least=0, most=1024)
    embed_dims: tuple[int, ...] = setting((), least=1, most=65536)
    depths: tuple[int, ...] = setting((), least=1, most=1024)
    drop_path: float = setting(0.0, least=0, below=1)
    class_token: bool = False
    decoder_embed_dim: int = setting(0, least=0, most=65536)
    decoder_depth: int = setting(0, least=0, most=1024)
    decoder_num_heads: int = setting(0, least=0, most=1024)

    @property
    def grid_size(self) -> Triple:
        """The patch grid (d, h, w) of a crop."""
        return grid_of(self.roi, self.patch_size)


@dataclass(frozen=True)
class Head:
    """A network that fine-tuning can train.

    Args:
        build: returns the network, given its encoder and the architecture. It maps (B, in_chans, *roi) to logits
            (B, out_channels, *roi), or (B, out_channels) if it classifies, and keeps the encoder as `backbone`.
        help: one phrase for `--help`, which shows the heads that are registered before architectures.py is imported.
        encoder: the encoder that `build` is given and that checkpoints are loaded into. None: `build` is given None,
            and the network starts from random weights only.
        as_pretrained: `build` is given the hybrid encoder as pretraining has it, without its feature pyramid.
        check: raises InputError for an architecture that cannot be built. Called before any data is read.
        classifies: the network is for presets of classification, not of segmentation.
        frozen: train the head alone, as `--freeze` does.
        drop_path: stochastic depth of the encoder unless `--drop_path` is given.
        class_token: the ViT keeps its CLS token unless `--class_token` is given.
        decoder: the ViT keeps MAE's decoder, which a checkpoint must have and which is loaded with the encoder.
        output_bias: returns the bias of the network's last layer, K values or K for each voxel of a patch, for
            `--prior_bias`. None: it starts as the network has it.
        prior_bias: it starts at the classes' shares of the voxels unless `--prior_bias` is given.
    """

    build: Callable[[nn.Module | None, Architecture], nn.Module]
    help: str
    encoder: Literal["vit", "hybrid"] | None = "vit"
    as_pretrained: bool = False
    check: Callable[[Architecture], object] = lambda a: None
    classifies: bool = False
    frozen: bool = False
    drop_path: float = 0.0
    class_token: bool = False
    decoder: bool = False
    output_bias: Callable[[nn.Module], nn.Parameter] | None = None
    prior_bias: bool = False


def check_multiples_of_32(a: Architecture) -> None:
    """Raise InputError unless the crop has a feature map of stride 32 with more than one voxel to normalise."""
    if any(size % 32 for size in a.roi) or max(a.roi) < 64:
        expected = "multiples of 32, at least one of them 64 or more"
        raise InputError(f"--roi {shown(a.roi)}: must be {expected}, for --model {a.model}")


def check_swinunetr(a: Architecture) -> None:
    """Raise InputError unless MONAI's SwinUNETR accepts the sizes."""
    if a.feature_size % 12:
        raise InputError(f"--feature_size {a.feature_size}: must be a multiple of 12 for --model {a.model}")
    check_multiples_of_32(a)


def check_dynunet(a: Architecture) -> None:
    """Raise InputError unless the crop can be halved twice."""
    if len(dynunet_strides(a.roi)) < 3:
        expected = "an axis that can be halved twice, down to 4 voxels or more"
        raise InputError(f"--roi {shown(a.roi)}: must have {expected}, for --model {a.model}")


def dynunet_strides(roi: Triple) -> list[Triple]:
    """Return the strides of the levels: an axis is halved while it is even and keeps 4 voxels, at most 5 times."""
    strides, size = [(1, 1, 1)], list(roi)
    while len(strides) < 6:
        stride = tuple(2 if s >= 8 and s % 2 == 0 else 1 for s in size)
        if max(stride) == 1:
            break
        strides.append(stride)
        size = [s // n for s, n in zip(size, stride)]
    return strides


def dynunet(a: Architecture) -> DynUNet:
    """Return a plain U-Net by nnU-Net's rules of thumb, without the deep supervision of its loss.

    Widths double from 2 x feature_size (32) up to 320.
    """
    strides = dynunet_strides(a.roi)
    sizes, filters = [3] * len(strides), [min(320, 2 * a.feature_size * 2**level) for level in range(len(strides))]
    return DynUNet(3, a.in_chans, a.out_channels, sizes, strides, upsample_kernel_size=strides[1:], filters=filters)


def bias_of(layer: str) -> Callable[[nn.Module], nn.Parameter]:
    """Return a function of a network that returns the bias of its layer of this name."""
    return lambda model: model.get_submodule(layer).bias


def last_bias(model: LightDecoder) -> nn.Parameter:
    """Return the bias of the last layer of a light decoder."""
    return model.decoder[-1].proj.bias


HEADS = {
    "unetr": Head(
        lambda backbone, a: UNETR(backbone, a.in_chans, a.out_channels, a.feature_size),
        "the ViT with UNETR's decoder",
        check=lambda a: num_levels(a.patch_size),
        output_bias=bias_of("out.conv.conv"),
    ),
    "mim": Head(
        lambda backbone, a: ConvViT3DUNETR(backbone, a.out_channels),
        "the hybrid encoder with Swin UNETR's decoder",
        encoder="hybrid",
        check=check_multiples_of_32,
        drop_path=0.2,
        output_bias=bias_of("out.conv.conv"),
    ),
    "linear": Head(
        lambda backbone, a: LinearProbe(backbone, a.out_channels),
        "one linear layer on the frozen ViT",
        frozen=True,
        output_bias=bias_of("head"),
        prior_bias=True,
    ),
    "mae_decoder": Head(
        lambda backbone, a: MAEDecoder(backbone, a.out_channels),
        "the ViT with MAE's decoder and a new last layer",
        class_token=True,
        decoder=True,
        output_bias=bias_of("out.proj"),
        prior_bias=True,
    ),
    "primus": Head(
        lambda backbone, a: LightDecoder(backbone, a.out_channels),
        "the ViT with a light decoder similar to that of Primus",
        class_token=True,
        output_bias=last_bias,
        prior_bias=True,
    ),
    "mim_light": Head(
        lambda backbone, a: LightDecoder(backbone, a.out_channels),
        "the hybrid encoder as in pretraining, with the decoder of primus",
        encoder="hybrid",
        as_pretrained=True,
        output_bias=last_bias,
        prior_bias=True,
    ),
    "swinunetr": Head(
        lambda _, a: SwinUNETR(in_channels=a.in_chans, out_channels=a.out_channels, feature_size=a.feature_size),
        "MONAI's, from random weights only",
        encoder=None,
        check=check_swinunetr,
        output_bias=bias_of("out.conv.conv"),
    ),
    "dynunet": Head(
        lambda _, a: dynunet(a),
        "MONAI's, similar to nnU-Net's, from random weights only",
        encoder=None,
        check=check_dynunet,
        output_bias=bias_of("output_block.conv.conv"),
    ),
    "classifier": Head(
        lambda backbone, a: Classifier(backbone, a.out_channels),
        "the ViT with a linear layer, for presets of classification",
        classifies=True,
    ),
}


def find_head(name: str, where: str = "--model") -> Head:
    """Return the head called `name`.

    Raises:
        InputError: there is none; the nearest name is suggested. `where` is the setting in the message.
    """
    if name not in HEADS:
        raise InputError(
            f"{where} {name}: unknown network; {did_you_mean(name, HEADS)}expected one of {', '.join(HEADS)}"
        )
    return HEADS[name]
