"""What Finetune.export reads and writes besides this repository's own folders: see converters.py."""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from Finetune.converters import (
    PLAN_KEYS,
    NotConvertible,
    depth_of,
    from_monai_mae,
    from_monai_unetr,
    from_monai_vit,
    from_nnssl,
    from_plain_mae,
    to_monai_mae,
    to_monai_unetr,
    to_monai_vit,
    to_nnssl,
)
from Finetune.pretrained import State

PLAN = "adaptation_plan.json"
# nnU-Net's reader that turns volumes to RAS, as this repository does. It returns arrays in the order z, y, x
READER = "NibabelIOWithReorient"


@dataclass(frozen=True)
class Converted:
    """Weights for another library: its class, the arguments to build it with, and further files of the export.

    `notes` are lines on what the weights do not compute there, for the screen and the card.
    """

    state: State
    architecture: str
    arguments: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def adaptation_plan(arguments: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `adaptation_plan.json`, with the entries of those published with nnssl's checkpoints.

    nnU-Net (2.8.1) gives its readers' arrays and spacing the order of `transpose_forward`, here our x, y, z, and states
    all sizes of a configuration in that order. What a plan cannot say is in `to_do_by_hand`, a key of our own.
    """
    preprocessing, channels = card["preprocessing"] or {}, arguments["in_chans"]
    scheme, masked, properties = nnunet_intensities(preprocessing)
    configuration = {
        "spacing": preprocessing.get("spacing"),
        "patch_size": list(arguments["img_size"]),
        "normalization_schemes": [scheme] * channels,
        "use_mask_for_norm": [masked] * channels,
    }
    return {
        "to_do_by_hand": list(to_do_by_hand(preprocessing, card["architecture"])),
        "architecture_plans": {
            "arch_class_name": card["architecture"],
            "arch_kwargs": dict(arguments),
            "arch_kwargs_requiring_import": None,
        },
        "pretrain_plan": {
            "dataset_name": ", ".join(card["training"]["data_sets"] or []),
            "plans_name": "mask-volumes",
            "image_reader_writer": READER,
            "transpose_forward": [2, 1, 0],
            "transpose_backward": [2, 1, 0],
            "foreground_intensity_properties_per_channel": {str(channel): properties for channel in range(channels)},
            "configurations": {"pretraining": configuration},
        },
        "pretrain_num_input_channels": arguments["in_chans"],
        "recommended_downstream_patchsize": list(arguments["img_size"]),
        **PLAN_KEYS,
    }


def nnunet_intensities(preprocessing: Mapping[str, Any]) -> tuple[str | None, bool, dict[str, float]]:
    """Return nnU-Net's normalisation for a recorded one: its scheme, whether that is of non-zero voxels alone, and what
    it knows of a channel's intensities. The scheme is None if nothing is recorded.

    CTNormalization clips to two percentiles of the data, subtracts a mean and divides by a standard deviation. With the
    ends of a window as percentiles, its lower end as mean and its width as deviation it is that window, to 0..1.
    """
    low, high = preprocessing.get("low"), preprocessing.get("high")
    if preprocessing.get("intensity") == "window":
        properties = {"percentile_00_5": low, "percentile_99_5": high, "mean": low, "std": high - low}
        return "CTNormalization", False, properties
    schemes = {"zscore": "ZScoreNormalization", "percentiles": "NoNormalization"}
    return schemes.get(preprocessing.get("intensity")), preprocessing.get("intensity") == "zscore", {}


def to_do_by_hand(preprocessing: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """Yield what a user of an adaptation plan has to do, or to expect, as nnU-Net's plans cannot say it."""
    yield f"add the class {architecture} to nnU-Net, which does not know it"
    if not preprocessing:
        yield "set spacing and normalization_schemes: the checkpoint does not record its preprocessing"
        return
    if preprocessing["spacing"] is None:
        yield "set spacing: the encoder was trained on volumes with the spacing that they were scanned with"
    if preprocessing["intensity"] == "percentiles":
        limits = f"{preprocessing['low']:g} and {preprocessing['high']:g}"
        yield f"map the percentiles {limits} of each channel to 0 and 1 in the files: nnU-Net has no scheme for it"
    if preprocessing["intensity"] == "zscore":
        yield "expect small differences: nnU-Net fills holes in its mask of non-zero voxels, here each zero is left out"
    yield "expect small differences: nnU-Net scales intensities before it resamples, this repository after it"


def _monai_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of MONAI's ViT for those of ours."""
    width = arguments["embed_dim"]
    return {
        "in_channels": arguments["in_chans"],
        "img_size": arguments["img_size"],
        "hidden_size": width,
        "mlp_dim": round(width * arguments["mlp_ratio"]),
        "num_heads": arguments["num_heads"],
        "qkv_bias": True,
    }


def _without_class_token(state: State, remedy: str) -> list[str]:
    """Return the notes on weights that are written without the CLS token of the encoder."""
    if "cls_token" not in state:
        return []
    left_out = "the CLS token is left out: features equal those of this encoder without its CLS token"
    return [f"{left_out}, not those of pretraining, where the patches attend to it; {remedy}"]


def _monai_vit(state: State, arguments: Mapping[str, Any], card: Mapping[str, Any]) -> Converted:
    keep, width = card["keep_class_token"], arguments["embed_dim"]
    more = {"patch_size": arguments["patch_size"], "num_layers": arguments["depth"], "pos_embed_type": "learnable"}
    written, notes = to_monai_vit(state, keep), []
    if keep:
        # MONAI's class has the token only with a head; this one returns the token's features unchanged
        more |= {"classification": True, "num_classes": width, "post_activation": "none"}
        written |= {"classification_head.weight": torch.eye(width), "classification_head.bias": torch.zeros(width)}
    else:
        notes = _without_class_token(state, "--class_token keeps it")
    return Converted(written, "monai.networks.nets.ViT", _monai_arguments(arguments) | more, notes=notes)


def _monai_unetr(state: State, arguments: Mapping[str, Any], card: Mapping[str, Any]) -> Converted:
    notes = _without_class_token(state, "MONAI's UNETR has none, its ViT can (--format monai_vit --class_token)")
    # out_channels is the task's
    return Converted(to_monai_unetr(state), "monai.networks.nets.UNETR", _monai_arguments(arguments), notes=notes)


def _monai_mae(state: State, arguments: Mapping[str, Any], card: Mapping[str, Any]) -> Converted:
    if "decoder_embed.weight" not in state:
        raise NotConvertible("found no decoder, expected that of MAE")
    recorded = card["decoder_num_heads"]
    if not recorded:
        raise NotConvertible("found no record of the decoder's attention heads")
    more = {
        "patch_size": arguments["patch_size"],
        "num_layers": arguments["depth"],
        "decoder_hidden_size": len(state["decoder_embed.weight"]),
        "decoder_mlp_dim": len(state["decoder_blocks.0.mlp.fc1.weight"]),
        "decoder_num_layers": depth_of(state, "decoder_blocks"),
        "decoder_num_heads": recorded,
    }
    arguments = _monai_arguments(arguments) | more
    return Converted(to_monai_mae(state), "monai.networks.nets.MaskedAutoEncoderViT", arguments)


def _nnunet(state: State, arguments: Mapping[str, Any], card: Mapping[str, Any]) -> Converted:
    plan = adaptation_plan(arguments, card)
    converted = to_nnssl(state)
    content = io.BytesIO()
    torch.save({"network_weights": converted}, content)
    files = {PLAN: json.dumps(plan, indent=2).encode(), "checkpoint_final.pth": content.getvalue()}
    return Converted(converted, card["architecture"], dict(arguments), files, plan["to_do_by_hand"])


def _from_nnssl_beside(state: State, file: Path) -> State:
    path = file.parent / PLAN
    try:
        plan = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise NotConvertible(f"found no readable {path}") from None
    return from_nnssl(state, plan)


# --source: (state, file) -> state; --format: (state, arguments of our class, card) -> `Converted`
SOURCES: dict[str, Callable[[State, Path], State]] = {
    "monai_vit": lambda state, file: from_monai_vit(state),
    "monai_unetr": lambda state, file: from_monai_unetr(state),
    "monai_mae": lambda state, file: from_monai_mae(state),
    "plain_mae": lambda state, file: from_plain_mae(state),
    "nnssl": _from_nnssl_beside,
}
TARGETS: dict[str, Callable[[State, Mapping[str, Any], Mapping[str, Any]], Converted]] = {
    "monai_vit": _monai_vit,
    "monai_unetr": _monai_unetr,
    "monai_mae": _monai_mae,
    "nnunet": _nnunet,
}
