"""The encoder in a checkpoint or exported folder: its class, the arguments of that class, and its tensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from common.errors import InputError, one_line
from Finetune import pretrained
from Finetune.architectures import ENCODERS, usual_heads
from Finetune.converters import NotConvertible
from Finetune.encoder3d import Encoder3D, Grid, fit_pos_embed, table_grid
from Finetune.export_formats import SOURCES
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_convvit3d import ConvViT3D
from Finetune.pretrained import State

CLASSES = {"vit": VisionTransformer3D, "hybrid": ConvViT3D}


@dataclass(frozen=True)
class EncoderFile:
    """An encoder in a file.

    Attributes:
        kind: key in `ENCODERS`.
        state: all tensors of the file, under this repository's names.
        args: settings that the file records, or the card of a folder.
        sizes: sizes of the encoder, as in `Architecture`.
        grid: patch grid of the position table.
    """

    path: Path
    kind: str
    state: State
    args: dict[str, Any]
    sizes: dict[str, Any]
    grid: Grid

    @property
    def cls(self) -> type[Encoder3D]:
        return CLASSES[self.kind]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the encoder's class, as plain types."""
        state, sizes = self.state, self.sizes
        width, block = state["pos_embed"].shape[-1], "blocks4.0" if self.kind == "hybrid" else "blocks.0"
        common = {
            "img_size": [n * p for n, p in zip(self.grid, sizes["patch_size"])],
            "in_chans": state[self.cls.patch_weight].shape[1],
            "num_heads": sizes["num_heads"],
            "mlp_ratio": len(state[f"{block}.mlp.fc1.weight"]) / width,
        }
        if self.kind == "vit":
            own = {"patch_size": list(sizes["patch_size"]), "class_token": "cls_token" in state}
            return common | own | {name: sizes[name] for name in ("embed_dim", "depth")}
        norm = "batch" if "fpn.1.running_mean" in state else "instance"
        own = {"pyramid": "fpn.0.weight" in state, "stride32_norm": norm}
        return common | own | {name: list(sizes[name]) for name in ("embed_dims", "depths")}

    def build(self) -> Encoder3D:
        """Return the encoder with its weights, in evaluation mode. InputError unless all are there and fit."""
        try:
            model, state = self.cls(**self.arguments()), dict(self.state)
            prefix = model.num_prefix_tokens
            state["pos_embed"] = fit_pos_embed(state["pos_embed"], self.grid, prefix, self.grid, False, self.path)
            pretrained.load_matching(model, state, required_names(model), False, self.path)
        except ValueError as error:
            raise InputError(one_line(error)) from None
        return model.eval()


def read_encoder_file(
    path: Path, key: str = "auto", source: str = "own", num_heads: int | None = None, grid: Grid | None = None
) -> EncoderFile:
    """Return the encoder in a file.

    Args:
        key: where the weights are in the file; auto: as `read_checkpoint` finds them.
        source: whose names they have: own, or a key of `SOURCES`.
        num_heads, grid: of an encoder whose file does not record them.

    Raises:
        InputError: the file cannot be read or holds no encoder, or its heads or patch grid are not known.
    """
    default = "network_weights" if source == "nnssl" else None
    try:
        state, extras = pretrained.read_checkpoint(path, default if key == "auto" else key)
        state = state if source == "own" else SOURCES[source](state, path)
    except NotConvertible as error:
        raise InputError(f"{path}: --source {source}: {error}") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    args = extras["args"] if isinstance(extras.get("args"), dict) else {}
    kind, sizes = encoder_in(state, args, path)
    usual = max(1, sizes["embed_dims"][3] // 32) if kind == "hybrid" else usual_heads(sizes["embed_dim"])
    if num_heads and sizes["num_heads"] not in (None, num_heads):
        raise InputError(f"{path}: found an encoder with num_heads {sizes['num_heads']}, expected {num_heads}")
    sizes["num_heads"] = num_heads or sizes["num_heads"] or usual
    if not sizes["num_heads"]:
        raise InputError(f"{path}: found no record of the attention heads, expected --num_heads")
    rows = state["pos_embed"].shape[1]
    known = table_grid(rows, grid or args.get("grid_size"))
    if known is None:
        raise InputError(f"{path}: found a position table of {rows} rows, of no cube; expected --grid D H W")
    return EncoderFile(path, kind, state, args, sizes, known)


def encoder_in(state: State, args: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """Return the kind of encoder that the weights are of, and its sizes. InputError if they are of none."""
    recorded = args["architecture"] if isinstance(args.get("architecture"), dict) else args
    for kind, encoder in ENCODERS.items():
        try:
            return kind, encoder.read(state, recorded)
        except (KeyError, ValueError, IndexError):
            continue
    found = pretrained.shorten(sorted(state))
    raise InputError(f"{path}: found {found}, expected the weights of {' or '.join(e.name for e in ENCODERS.values())}")


def required_names(model: nn.Module) -> list[str]:
    """Return the tensors that a file must have: all, but the count of batches that a norm has seen."""
    return [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
