"""Read pretrained checkpoints and copy their tensors into a model. Needs torch; exported folders also need safetensors.

The loader of models_3dvit.py and models_convvit3d.py. To use one of them elsewhere, copy this file and encoder3d.py
with it, and vit_blocks.py with the former, depthwise3d.py with the latter.
"""

import argparse
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
WEIGHTS_KEYS = ("student", "state_dict", "model")
# an exported folder: see Finetune/export.py
FORMAT, FORMAT_VERSION = "mask-volumes encoder", 1
CARD, WEIGHTS = "config.json", "model.safetensors"
_PREFIXES = re.compile(r"^((module|_orig_mod|backbone|vit|encoder)\.)+")


@dataclass
class LoadReport:
    """What happened to the tensors of a checkpoint. Names are without prefixes such as `module.`."""

    path: str
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    encoder_total: int
    resampled: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = self.encoder_total
        lines = [f"{self.path}: {total} of {total} encoder tensors, {len(self.matched)} in all"]
        for label, names in (("resampled", self.resampled), ("missing", self.missing), ("dropped", self.unexpected)):
            lines += [f"  {label} {len(names)}: {shorten(names)}"] if names else []
        return "\n".join(lines)


def shorten(names: Sequence[str], most: int = 4) -> str:
    """Return the first few names and the number of the others."""
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


# ---------------------------------------------------------------- loading


def load_matching(
    model: nn.Module, state: State, required: Iterable[str], required_only: bool, where: object
) -> LoadReport:
    """Copy `state` into `model`: all tensors named in `required`, others where name and shape match.

    Args:
        required_only: copy no others.
        where: names the file in errors.

    Raises:
        ValueError: a required tensor is missing or has another shape, or a tensor to copy is not finite. The model is
            then unchanged.
    """
    own, required = model.state_dict(), list(required)
    wanted = required if required_only else list(own)
    fits = {name: state[name] for name in wanted if name in state and state[name].shape == own[name].shape}
    if misfits := [_misfit(name, state, own) for name in required if name not in fits]:
        found = f"only {len(required) - len(misfits)} of {len(required)} encoder tensors fit this model"
        raise ValueError(f"{where}: {found}: {shorten(misfits)}")
    if broken := [name for name, value in fits.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{where}: found NaN or infinity in {len(broken)} tensor(s): {shorten(broken)}")
    model.load_state_dict(fits, strict=False)
    missing, unexpected = ([name for name in names if name not in fits] for names in (wanted, state))
    return LoadReport(str(where), list(fits), missing, unexpected, len(required))


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape and values."""
    return a.shape == b.shape and torch.equal(a, b)


def _misfit(name: str, state: State, own: State) -> str:
    if name not in state:
        return f"{name} is missing"
    return f"{name} found {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"


def inflate_channels(weight: Tensor, in_chans: int, rescale: bool = True) -> Tensor:
    """Return a 1-channel convolution weight (C, 1, ...) repeated over `in_chans` channels; others are unchanged.

    With `rescale` it is divided by `in_chans`, so that an image repeated over the channels gives the same output.
    """
    if weight.ndim < 2 or weight.shape[1] != 1 or in_chans == 1:
        return weight
    return weight.repeat(1, in_chans, *[1] * (weight.ndim - 2)) / (in_chans if rescale else 1)


# ---------------------------------------------------------------- reading


def read_checkpoint(path: str | os.PathLike, checkpoint_key: str | None = None) -> tuple[State, dict]:
    """Return the weights of a checkpoint under clean names, and what else it holds (epoch, args, ...).

    The weights are those under `checkpoint_key`, or under the first of `student`, `state_dict` and `model`, or the top
    level of the file. Only tensors, plain types and `argparse.Namespace` are unpickled. An exported folder is read
    too; its card is then `args`.

    Raises:
        ValueError: the file does not exist, is torn, fails its checksums, holds other objects, has no weights under
            the keys, or a weight is not a dense tensor.
    """
    if os.path.isdir(path):
        if checkpoint_key:
            raise ValueError(f"{path}: found the key '{checkpoint_key}', expected none: a folder holds one encoder")
        return read_exported(path)
    content = _read_file(path)
    extras = {key: value for key, value in content.items() if not isinstance(value, (dict, Tensor)) or key == "args"}
    if isinstance(extras.get("args"), argparse.Namespace):
        extras["args"] = vars(extras["args"])
    found = _weights(content, checkpoint_key, path)
    weights = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if sparse := [name for name, value in weights.items() if not is_dense(value)]:
        kinds = "sparse, quantized, expanded or empty"
        raise ValueError(f"{path}: found {len(sparse)} {kinds} tensor(s), expected dense ones: {shorten(sparse)}")
    return clean_keys(weights, path), extras


def recorded_heads(args: object) -> int | None:
    """Return the attention heads of the encoder that the settings in a checkpoint record; None where they do not."""
    settings = args if isinstance(args, dict) else {}
    settings = settings["architecture"] if isinstance(settings.get("architecture"), dict) else settings
    heads = settings.get("num_heads")
    return heads if isinstance(heads, int) and heads > 0 else None


def is_dense(value: object) -> bool:
    """Return whether a value of a checkpoint is a tensor that has its own memory for each of its numbers.

    A sparse or expanded tensor (stride 0) can ask for far more memory than its file has.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _read_file(path: str | os.PathLike) -> dict:
    try:
        # torch writes a checksum for each record and does not compare it
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"damaged: the checksum of record {damaged} does not match")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except EOFError:
        raise ValueError(f"{path}: found the end of the file, expected a checkpoint") from None
    # torch raises a different type for each way in which a file can be broken
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        detail = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({detail})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, expected a dict of weights")
    return content


def _weights(content: dict, checkpoint_key: str | None, path: object) -> dict:
    keys = (checkpoint_key,) if checkpoint_key else WEIGHTS_KEYS
    for key in keys:
        if isinstance(content.get(key), dict):
            return content[key]
    if checkpoint_key is None and any(isinstance(value, Tensor) for value in content.values()):
        return content
    hint = "; for its teacher pass checkpoint_key='teacher'" if "teacher" in content and not checkpoint_key else ""
    expected = f"expected weights under {' or '.join(map(repr, keys))}{hint}"
    raise ValueError(f"{path}: found the keys {sorted(map(str, content))}, {expected}")


def clean_keys(state: State, where: object = "state dict") -> State:
    """Return the tensors without the leading prefixes that DDP, torch.compile and wrapping modules add to names."""
    cleaned: State = {}
    for key, value in state.items():
        name = _PREFIXES.sub("", key)
        if name in cleaned:
            raise ValueError(f"{where}: two tensors are called '{name}' without their prefixes (one is '{key}')")
        cleaned[name] = value
    return cleaned


# ---------------------------------------------------------------- exported folders


def locate(source: str | os.PathLike, revision: str | None = None) -> Path:
    """Return the exported folder `source`, or one downloaded from the Hugging Face hub if there is no such folder.

    Args:
        source: a folder, which needs no network, or the id of a model on the hub, `owner/name`.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: there is no such folder or model, or it cannot be downloaded.
    """
    if os.path.isdir(source) or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return Path(source)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{source}: no such folder; a model of the hub needs `pip install huggingface_hub`") from None
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=[CARD, WEIGHTS]))
    # the hub's errors and those of its network library have no common type
    except Exception as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source}: no such folder, and no such model on the hub ({detail})") from None


def read_card(folder: str | os.PathLike, architecture: str | None = None) -> dict:
    """Return the config.json of an exported folder.

    Args:
        architecture: class that the folder must hold, e.g. `VisionTransformer3D`.

    Raises:
        ValueError: it is missing, no JSON, of another format, or of another class.
    """
    path = Path(folder, CARD)
    try:
        card = json.loads(path.read_bytes())
    except OSError:
        raise ValueError(f"{folder}: found no readable {CARD}, expected a folder of Finetune.export") from None
    except ValueError:
        raise ValueError(f"{path}: found no JSON, expected the card of an exported folder") from None
    found = card.get("format") if isinstance(card, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: found the format {found!r}, expected {FORMAT!r}")
    if card.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: found version {card.get('format_version')!r} of its format, expected 1")
    if architecture and card.get("architecture") != architecture:
        raise ValueError(f"{path}: found the architecture {card.get('architecture')!r}, expected {architecture!r}")
    return card


def read_exported(folder: str | os.PathLike) -> tuple[State, dict]:
    """Return the weights of an exported folder, and its card under `args` as `read_checkpoint` returns settings.

    Raises:
        ValueError: a file is missing, damaged, or not the one that was exported, or safetensors is not installed.
    """
    card, path = read_card(folder), Path(folder, WEIGHTS)
    try:
        from safetensors.torch import load
    except ImportError:
        raise ValueError(f"{path}: reading this file needs `pip install safetensors`") from None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    # safetensors has no checksums
    if hashlib.sha256(content).hexdigest() != card.get("weights_sha256"):
        raise ValueError(f"{path}: damaged: its SHA-256 is not the one in {CARD}")
    try:
        return load(content), {"args": card}
    # safetensors' own error type is known only where it is installed
    except Exception as error:
        raise ValueError(f"{path}: not a safetensors file ({str(error)[:200]})") from None
