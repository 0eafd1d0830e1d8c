"""What a run reports: lines on the screen, progress bars, TensorBoard, and one JSON line per epoch, all of rank 0."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import InputError
from common.files import naming_errors, save_bytes, sync

# values of a line of log.jsonl that measure the machine: a repeated run has others
TIMES = ("seconds", "volumes_per_second", "data_wait")


def is_main() -> bool:
    """Return True on rank 0 of a torchrun launch, and without torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def print_main(text: str) -> None:
    """Print a line on rank 0, above a progress bar that is on the screen."""
    if is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """Return a progress bar that rank 0 shows; arguments as in tqdm. In a file it is updated every ten seconds only."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(*args, disable=not is_main(), mininterval=interval, dynamic_ncols=True, **kwargs)


class RunLog:
    """Write TensorBoard events, `log.jsonl`, `warnings.jsonl` and `anomalies.jsonl` (skipped updates) into `out_dir`.

    Only rank 0 writes.

    The x axis in TensorBoard is the 0-based number of the last update. A resumed run first removes what an earlier
    process logged after the checkpoint. If `flush` is called before each checkpoint, no line and no point is then
    missing or doubled. Skipped updates of the time before a rollback are kept.

    Args:
        out_dir: folder of the run.
        first_step: number of updates in the checkpoint that is resumed.
        first_epoch: epoch that is resumed, 0-based.
        rollbacks: number of rollbacks so far.
    """

    def __init__(self, out_dir: str | Path, first_step: int = 0, first_epoch: int = 0, rollbacks: int = 0):
        self.folder, self.writer = Path(out_dir), None
        self.epochs_path, self.skipped_path = self.folder / "log.jsonl", self.folder / "anomalies.jsonl"
        self.warnings_path = self.folder / "warnings.jsonl"
        if is_main():
            # Slow to import, so only a run that logs imports it.
            from torch.utils.tensorboard import SummaryWriter

            for path in (self.epochs_path, self.warnings_path):
                _filter_lines(path, lambda line: line["epoch"] < first_epoch)
            _filter_lines(self.skipped_path, lambda line: line["step"] < first_step or line["rollbacks"] < rollbacks)
            with naming_errors(self.folder):
                self.writer = SummaryWriter(str(out_dir), purge_step=first_step)

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Write named values to TensorBoard."""
        if self.writer:
            with naming_errors(self.folder):
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)

    def add_image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Write an image, (H, W, 3) uint8, to TensorBoard."""
        if self.writer:
            with naming_errors(self.folder):
                self.writer.add_image(tag, pixels, step, dataformats="HWC")

    def add_epoch(self, record: dict[str, Any]) -> None:
        """Append a line to `log.jsonl`. `record` has `epoch` and `step`, the number of updates done."""
        self._append(self.epochs_path, record)

    def add_skipped_update(self, record: dict[str, Any]) -> None:
        """Append a line to `anomalies.jsonl`. `record` has `step`, the update that was skipped, and `rollbacks`."""
        self._append(self.skipped_path, record)

    def add_warning(self, epoch: int, kind: str, text: str) -> None:
        """Append a line to `warnings.jsonl`: a value that was out of its range after an epoch, and the remedy."""
        self._append(self.warnings_path, {"epoch": epoch, "kind": kind, "text": text})

    def flush(self) -> None:
        """Write everything logged so far to disk, so that it survives a power cut."""
        if self.writer:
            with naming_errors(self.folder):
                self.writer.flush()
                events = max(self.folder.glob("events.*"), key=os.path.getmtime)
                for path in (self.epochs_path, self.skipped_path, self.warnings_path, events):
                    if path.exists():
                        sync(path)

    def close(self) -> None:
        """Close the TensorBoard writer."""
        if self.writer:
            with naming_errors(self.folder):
                self.writer.close()

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        if self.writer:
            with naming_errors(path), open(path, "a") as file:
                file.write(json.dumps(record) + "\n")


def _filter_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file of JSON lines, if it exists, with the lines that `keep` accepts."""
    lines, kept = path.read_text().splitlines() if path.exists() else [], []
    for number, line in enumerate(lines, start=1):
        try:
            if keep(json.loads(line)):
                kept.append(line + "\n")
        except json.JSONDecodeError:
            # a killed process may have left the last line incomplete
            if number < len(lines):
                raise InputError(f"{path}: line {number} is not JSON") from None
    if lines:
        save_bytes(path, "".join(kept).encode())
