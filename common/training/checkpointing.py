"""When a run writes its checkpoints, how, and from which one it resumes.

`checkpoint-last.pth` is written after every epoch, every `save_minutes` within one, and before a requested stop. The
one before it is kept as `checkpoint-previous.pth`, and `checkpoint-{epoch}.pth` every `save_every` epochs and after the
last. A file that is truncated or damaged is reported, and the one before it is used.

Training stops only for the copy to host memory; a thread writes the file. torch.distributed.checkpoint's async_save
does the same with a folder of shards and pickled metadata, but every reader (the authors' loaders among them) expects
one file of full tensors that `torch.load(weights_only=True)` reads.
"""

import itertools
import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import checkpoint, distributed
from common.config import load_yaml, setting
from common.distributed import Run
from common.errors import InputError
from common.files import naming_errors, replacing
from common.runlog import print_main
from common.signals import saved_when_stopped
from common.training.fsdp import full_tensor

SETTINGS = "settings.yaml"
# what `--resume none` moves away; files that other programs wrote stay
RESULTS = (
    "checkpoint-*.pth",
    "log.jsonl",
    "anomalies.jsonl",
    "warnings.jsonl",
    "run.json",
    "anomalies",
    "events.*",
    "reconstruction-*.png",
    "health.png",
    "classification.*",
)


@dataclass(kw_only=True)
class CheckpointSettings:
    """Settings of writing checkpoints and resuming from them."""

    save_every: int = setting(50, "epochs between the checkpoints that are kept", least=1)
    save_minutes: float | None = setting(15.0, "minutes between saves in an epoch; none: only at its end", least=0)
    resume: str = setting("auto", "auto: the newest checkpoint of out_dir, if any; none: start again; or a file")


class CheckpointWriter:
    """Writes `checkpoint-last.pth` in a thread of rank 0. At most one file is being written at any time."""

    def __init__(self, out_dir: Path, minutes: float | None):
        self.last, self.minutes = out_dir / checkpoint.LAST, minutes
        self._writing: Future | None = None
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        """Return whether it is time to save within an epoch. Raises the error of a write that has failed since."""
        if self._writing and self._writing.done():
            self.wait()
        return self.minutes is not None and time.monotonic() - self._saved_at > self.minutes * 60

    def save(self, content: dict[str, Any], keep: str | None = None, write: bool = True) -> None:
        """Copy `content` to host memory, and start to write it as the last checkpoint.

        Args:
            keep: a second file name for the same checkpoint.
            write: False on the processes that only contribute their shards of the tensors.

        Raises:
            InputError: the write before this one has failed. The file before that one is intact.
        """
        self.wait()
        content = host_copy(content, keep=write)
        if not write:
            return
        self._saved_at = time.monotonic()
        # a thread of its own, which ends with the write
        executor = ThreadPoolExecutor(max_workers=1)
        self._writing = executor.submit(self._write, content, keep)
        executor.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until nothing is being written, and raise the error of a write that has failed."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _write(self, content: dict[str, Any], keep: str | None) -> None:
        if self.last.exists():
            add_name(self.last, self.last.with_name(checkpoint.PREVIOUS))
        checkpoint.save(self.last, content)
        if keep:
            add_name(self.last, self.last.with_name(keep))


def add_name(path: Path, name: Path) -> None:
    """Give a file a second name, at no cost of disk space. The name stays when `path` is replaced."""
    with replacing(name) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            # a file system without hard links
            checkpoint.save(temporary, checkpoint.load(path, check=False))


def host_copy(value: Any, keep: bool = True) -> Any:
    """Return the same nesting with a copy of every tensor, full and in host memory.

    With sharded tensors all processes must call it: they are gathered one at a time, so that no device ever holds all
    of them. Processes without `keep` get None for each.
    """
    if isinstance(value, torch.Tensor):
        tensor = full_tensor(value.detach())
        # contiguous also with --channels_last: readers need not know of it, and safetensors takes nothing else
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format) if keep else None
    if isinstance(value, dict):
        return {key: host_copy(item, keep) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(host_copy(item, keep) for item in value)
    return value


def existing_checkpoints(out_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    numbered = {p: m for p in out_dir.glob("checkpoint-*.pth") if (m := re.fullmatch(r"checkpoint-(\d+)\.pth", p.name))}
    kept = sorted(numbered, key=lambda path: int(numbered[path][1]), reverse=True)
    found = [out_dir / checkpoint.LAST, out_dir / checkpoint.PREVIOUS, *kept]
    return [path for path in found if path.exists()]


def checkpoints_to_resume(out_dir: Path, resume: str) -> list[Path]:
    """Return the checkpoints to resume from; the first intact one counts. `none` moves an earlier run away.

    The same command again continues the run in every case where that is meant: always after a requested stop, and after
    a start from a file once the run has saved.
    """
    own = existing_checkpoints(out_dir)
    if resume == "auto" or saved_when_stopped(out_dir):
        return own
    if resume == "none":
        move_earlier_run(out_dir)
        return []
    settings = out_dir / SETTINGS
    again = own and settings.exists() and load_yaml(settings).get("resume") == resume
    return own if again else [Path(resume)]


def move_earlier_run(out_dir: Path) -> None:
    """Move the results of a run into `earlier-1`, `earlier-2`, ... so that another one can start in its folder."""
    results = [path for pattern in RESULTS for path in sorted(out_dir.glob(pattern))]
    if not any(path.suffix == ".pth" for path in results):
        return
    number = next(n for n in itertools.count(1) if not (out_dir / f"earlier-{n}").exists())
    folder = out_dir / f"earlier-{number}"
    with naming_errors(folder):
        folder.mkdir()
        for path in results:
            path.rename(folder / path.name)
    print_main(f"moved the earlier run in {out_dir} to {folder}")


def load_first_intact(paths: list[Path], run: Run) -> tuple[Path, dict[str, Any]] | None:
    """Return the first intact checkpoint of rank 0's `paths` and its content; None without paths.

    A damaged `checkpoint-last.pth` is renamed to `checkpoint-last.damaged`. Otherwise the next write would keep it as
    the previous checkpoint, in place of the one that was used.

    Raises:
        InputError: none of them is intact.
    """
    # rank 0's result: the path, or why there is none
    found, content = [None, ""], None
    if run.rank == 0 and paths:
        path, content, reasons = find_intact(paths)
        found = [str(path) if path else None, reasons]
    if distributed.active():
        dist.broadcast_object_list(found, src=0)
    path, reasons = found
    if reasons:
        raise InputError(f"no readable checkpoint ({reasons}); --resume none starts again")
    # rank 0 has read it already
    return None if path is None else (Path(path), content or checkpoint.load(path, check=False))


def find_intact(paths: list[Path]) -> tuple[Path | None, dict[str, Any] | None, str]:
    """Return the first path that holds an intact checkpoint and its content, or what is wrong with each."""
    damaged = {}
    for path in paths:
        try:
            content = checkpoint.load(path)
        except InputError as error:
            damaged[path] = str(error)
        else:
            for before, reason in damaged.items():
                print_main(f"warning: {reason}; using {path} instead")
                if before.name == checkpoint.LAST:
                    os.replace(before, before.with_suffix(".damaged"))
            return path, content, ""
    return None, None, "; ".join(damaged.values())
