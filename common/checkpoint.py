"""Read and write checkpoints, the files that connect Pretrain and Finetune.

A checkpoint is a dict of tensors and plain types (dict, list, str, int, float, bool, None), written by `torch.save`.
`torch.load(weights_only=True)` reads it without running any code in it.

=============  =======================================================================================================
plain MAE      `model`: encoder and decoder, with the names of `Finetune/models_3dvit.py`
GL-MAE         `student`: `module.backbone.*` (encoder and decoder), `module.head.*` (projection head); `teacher`:
               `backbone.*`, `head.*`; `dino_loss`: {`center`}. The prefix `module.` is there without DDP too, because
               the authors' loaders expect it
MiM            `model`: encoder and decoder, with the encoder's names of `Finetune/models_convvit3d.py`
fine-tuning    `state_dict`: the segmentation or classification model, with the encoder under `backbone.`
all            `optimizer`; `epoch`: the last epoch that was started, 0-based; `args`: the settings as plain types, and
               with them `step` (updates done), `loop` (state of the training loop: scaler, check for bad updates, data
               seed) and `grid_size` (the patch grid of the position embedding, which a token count does not determine)
mid-epoch      `progress`: the running means of the epoch and of the log interval, only in a file from within an epoch
=============  =======================================================================================================

Files are named `checkpoint-{epoch}.pth` (no zero padding), `checkpoint-last.pth` and `checkpoint-previous.pth`, the one
before the last. Fine-tuning may also write `checkpoint-best.pth`, without `optimizer` and `loop`: no run resumes from
it. Each record of a file (a zip archive) has a CRC32, which is verified when the file is read. When a run writes its
checkpoints: common/training/checkpointing.py.
"""

import argparse
import zipfile
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError, one_line
from common.files import replacing

LAST = "checkpoint-last.pth"
PREVIOUS = "checkpoint-previous.pth"


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` to `path`, completely or not at all.

    Raises:
        InputError: the file cannot be written.
        TypeError: `content` holds a value that `torch.load(weights_only=True)` would refuse.
    """
    _check_plain(content, "checkpoint")
    with replacing(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
        except RuntimeError as error:
            # torch reports a full disk as a RuntimeError.
            raise InputError(f"{path}: cannot be written ({one_line(error)})") from None


def verify(path: str | Path) -> None:
    """Compare every record of the file with its CRC32. Files in the format before torch 1.6 have none and pass.

    Raises:
        InputError: a record differs, or the archive cannot be read.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        # zipfile raises a different type for each kind of damage.
        raise InputError(f"{path}: damaged ({one_line(error)})") from None
    if damaged:
        raise InputError(f"{path}: damaged (checksum of record {damaged} does not match)")


def load(path: str | Path, check: bool = True) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU. No code in the file is run.

    Args:
        path: a file written by `save`, or by the authors' code.
        check: verify the checksums; False for a file that has just been verified.

    Raises:
        InputError: the file is missing or damaged, or is not a checkpoint.
    """
    if check:
        verify(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except EOFError:
        raise InputError(f"{path}: found the end of the file, expected a checkpoint") from None
    except Exception as error:
        # torch raises a different type for each kind of damage.
        raise InputError(f"{path}: not a readable checkpoint ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}, expected a dict")
    return content


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in (torch.Tensor, torch.nn.Parameter, str, int, float, bool, type(None)):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain types only")
