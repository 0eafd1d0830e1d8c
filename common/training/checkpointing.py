"""When and how a run writes its checkpoints, and which one it takes up again.

The rule: `checkpoint-last.pth` after every epoch, every `save_minutes` within one, and when asked to stop; the one
before it stays as `checkpoint-previous.pth`; `checkpoint-{epoch}.pth` every `save_every` epochs and after the last, for
good. A file that is torn or altered is refused with a message, and the one before it is taken.

Training stops for the copy to host memory only; a thread writes the copy. Not torch.distributed.checkpoint's
async_save, which does the same to a folder of shards with pickled metadata: the contract with every reader (the
authors' loaders among them) is one file of whole tensors that `torch.load(weights_only=True)` reads, also where the
processes share them out.
"""

import itertools
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import checkpoint, distributed
from common.config import load_yaml
from common.distributed import Run
from common.errors import InputError
from common.files import naming_errors, replacing
from common.runlog import print_main
from common.signals import saved_when_stopped
from common.training.fsdp import full_tensor
from common.training.settings import LoopSettings

SETTINGS = "settings.yaml"
# of a run, beside its settings; what other programs made of it stays
RESULTS = ("checkpoint-*.pth", "log.jsonl", "anomalies.jsonl", "anomalies", "events.*", "reconstruction-*.png")


class Saver:
    """Writes `checkpoint-last.pth` of a run in a thread of rank 0. At most one file is being written at any time."""

    def __init__(self, out_dir: Path, minutes: float | None):
        self.last, self.minutes = out_dir / checkpoint.LAST, minutes
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        """Is it time to save, within an epoch? An error of the last writing is raised here too, not an epoch later."""
        if self._thread and not self._thread.is_alive():
            self.wait()
        return self.minutes is not None and time.monotonic() - self._saved_at > self.minutes * 60

    def save(self, content: dict[str, Any], keep: str | None = None, write: bool = True) -> None:
        """Copy `content` to host memory and have it written as the last checkpoint, and as `keep` (a file name) too.

        Without `write` a process only gives its shares of the tensors to the one that writes. Raises InputError for a
        writing before this one that has failed; the file of before that one is still whole.
        """
        self.wait()
        content = host_copy(content, keep=write)
        if not write:
            return
        self._saved_at = time.monotonic()
        self._thread = threading.Thread(target=self._write, args=(content, keep), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written any more. Raises what went wrong."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _write(self, content: dict[str, Any], keep: str | None) -> None:
        try:
            if self.last.exists():
                second_name(self.last, self.last.with_name(checkpoint.PREVIOUS))
            checkpoint.save(self.last, content)
            if keep:
                second_name(self.last, self.last.with_name(keep))
        except BaseException as error:  # of a thread: raised in the training thread, by `wait`
            self._error = error


def second_name(path: Path, name: Path) -> None:
    """Let `name` mean the file at `path` too, whole or not at all; it stays when `path` is replaced. Costs no disk
    space."""
    with replacing(name) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            # a file system without hard links
            checkpoint.save(temporary, checkpoint.load(path, check=False))


def host_copy(value: Any, keep: bool = True) -> Any:
    """The same nesting with every tensor whole and in host memory, and nothing of it shared with the original.

    Where tensors are shared out over the processes all must call it, in turn for each tensor, so that no device ever
    holds all of them; those that do not `keep` get None for each.
    """
    if isinstance(value, torch.Tensor):
        tensor = full_tensor(value.detach())
        return tensor.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {key: host_copy(item, keep) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(host_copy(item, keep) for item in value)
    return value


def candidates(out_dir: Path) -> list[Path]:
    """The checkpoints a run can go on from, the newest first."""
    numbered = [
        (int(m[1]), p)
        for p in out_dir.glob("checkpoint-*.pth")
        if (m := re.fullmatch(r"checkpoint-(\d+)\.pth", p.name))
    ]
    found = [
        out_dir / checkpoint.LAST,
        out_dir / checkpoint.PREVIOUS,
        *(path for _, path in sorted(numbered, reverse=True)),
    ]
    return [path for path in found if path.exists()]


def to_resume(settings: LoopSettings) -> list[Path]:
    """The checkpoints to go on from, the first whole one of them; for `--resume none` what is there is set aside.

    The same command again goes on, whatever it says: a run that was asked to stop always, and one that was started from
    a file once it has saved.
    """
    own, resume = candidates(settings.out_dir), settings.resume
    if resume == "auto" or saved_when_stopped(settings.out_dir):
        return own
    if resume == "none":
        set_aside(settings.out_dir)
        return []
    again = own and started_with(settings.out_dir).get("resume") == resume
    return own if again else [Path(resume)]


def started_with(out_dir: Path) -> dict[str, Any]:
    """The settings of the run in a folder; empty where there is none."""
    path = out_dir / SETTINGS
    return load_yaml(path) if path.exists() else {}


def set_aside(out_dir: Path) -> None:
    """Move what a run has left in its folder into `earlier-1`, `earlier-2`, ...: another one starts there."""
    kept = [path for pattern in RESULTS for path in sorted(out_dir.glob(pattern))]
    if not any(path.suffix == ".pth" for path in kept):
        return
    number = next(n for n in itertools.count(1) if not (out_dir / f"earlier-{n}").exists())
    folder = out_dir / f"earlier-{number}"
    with naming_errors(folder):
        folder.mkdir()
        for path in kept:
            path.rename(folder / path.name)
    print_main(f"what was in {out_dir} is now in {folder}")


def read_first(paths: list[Path], run: Run) -> tuple[Path, dict[str, Any]] | None:
    """The first of rank 0's `paths` that is whole, and its content; None where there are none. InputError if none is.

    A `checkpoint-last.pth` that is refused is renamed to `checkpoint-last.damaged`, or the next writing would keep it
    as the previous one, in the place of the one that was taken.
    """
    verdict = [None, ""]  # rank 0's: the path, or why there is none
    if run.rank == 0 and paths:
        path, refused = first_whole(paths)
        verdict = [str(path) if path else None, refused]
    if distributed.active():
        dist.broadcast_object_list(verdict, src=0)
    path, refused = verdict
    if refused:
        raise InputError(f"no readable checkpoint ({refused}); --resume none starts anew")
    return None if path is None else (Path(path), checkpoint.load(path, check=False))


def first_whole(paths: list[Path]) -> tuple[Path | None, str]:
    """The first path that holds a whole checkpoint; or None, and what is wrong with each."""
    refused = {}
    for path in paths:
        try:
            checkpoint.verify(path)
            checkpoint.load(path, check=False)
        except InputError as error:
            refused[path] = str(error)
        else:
            for before, reason in refused.items():
                print_main(f"warning: {reason}; taking {path} instead")
                if before.name == checkpoint.LAST:
                    os.replace(before, before.with_suffix(".damaged"))
            return path, ""
    return None, "; ".join(refused.values())
