"""Checkpoints: the one place where Pretrain and Finetune meet.

The contract. A checkpoint is a `torch.save`d dict of tensors and plain types (dict, list, str, int, float, bool, None),
so that `torch.load(weights_only=True)` reads it and no code in it can run.

=============  =======================================================================================================
plain MAE      `model`: the names of `Finetune/models_3dvit.py`, encoder and decoder
GL-MAE         `student`: `module.backbone.*` (encoder and decoder), `module.head.*` (projection head); `teacher`:
               `backbone.*`, `head.*`; `dino_loss`: {`center`}. The `module.` stands there without DDP too: the authors'
               loaders expect it
MiM            `model`: the names of `Finetune/models_convvit3d.py` and the decoder's
fine-tuning    `state_dict`: the segmentation model, encoder under `backbone.`
all            `optimizer`; `epoch`, 0-based, the last one begun; `args`: the settings as plain types, and in it `step`
               (updates done), `loop` (scaler, watch over bad updates, data seed) and `grid_size` (the position table's
               grid, never to be guessed from a count)
mid-epoch      `progress`: the running means of the epoch and of the log interval; only in a file written within one
=============  =======================================================================================================

Files are `checkpoint-{epoch}.pth` (no zero padding), `checkpoint-last.pth` and the one before it,
`checkpoint-previous.pth`; each is written under a temporary name and renamed. Each record of the file (a zip archive)
has a CRC32, which is verified when it is read. How and when they are written: common/training/checkpointing.py.
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
    """Write `content` so that `path` holds either the old file or the whole new one, never a part.

    Raises InputError when the place cannot be written; TypeError for a value that `weights_only` loading would refuse.
    """
    _check_plain(content, "checkpoint")
    with replacing(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
        except RuntimeError as error:
            # torch reports a full disk as a RuntimeError
            raise InputError(f"{path}: cannot be written ({one_line(error)})") from None


def remove_temporary(folder: Path) -> None:
    """What a process that was killed while it wrote has left behind. Only for the one process that writes to the
    folder."""
    for path in folder.glob(".checkpoint-*.tmp"):
        path.unlink(missing_ok=True)


def verify(path: str | Path) -> None:
    """Read the whole file and compare every record with its CRC32; InputError if one differs. Files older than torch
    1.6 have none."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile, too, has a type for each way a file can be broken
        raise InputError(f"{path}: damaged ({one_line(error)})") from None
    if damaged:
        raise InputError(f"{path}: damaged (checksum of record {damaged} does not match)")


def load(path: str | Path, check: bool = True) -> dict[str, Any]:
    """The content of a checkpoint on the CPU, read without running anything in it. InputError says what is wrong with
    the file.

    `check=False` leaves out the checksums, for a file that another rank has just verified.
    """
    try:
        if check:
            verify(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except InputError:
        raise
    except Exception as error:  # torch raises a different type for each way a file can be broken
        raise InputError(f"{path}: not a readable checkpoint ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}, needs a dict")
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
