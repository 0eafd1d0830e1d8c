"""What a run tells: lines on the screen, progress bars, TensorBoard, and one JSON line per epoch. Rank 0 speaks, the
others are silent."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import InputError
from common.files import naming_errors, save_bytes, sync


def is_main() -> bool:
    """True on rank 0 of a torchrun launch, and without one."""
    return int(os.environ.get("RANK", "0")) == 0


def print_main(text: str) -> None:
    """One line on rank 0's standard output, kept whole when a progress bar is on the screen."""
    if is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def progress(
    iterable: Iterable | None = None, desc: str = "", total: int | None = None, unit: str = "it", initial: int = 0
) -> tqdm:
    """A progress bar on rank 0, `initial` of its steps already done. Into a file or a pipe it is refreshed every ten
    seconds only, so that logs stay short."""
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        unit=unit,
        initial=initial,
        disable=not is_main(),
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
    )


class RunLog:
    """TensorBoard events, `log.jsonl` and `anomalies.jsonl` in `out_dir`, written by rank 0 only.

    TensorBoard's steps count from 0 and name the update that was the last one made. A run that goes on after
    `first_step` updates, in epoch `first_epoch`, drops what an earlier process logged past them; no line and no point
    is doubled or missing, if `flush` is called before each checkpoint. What happened before a rollback is kept in
    `anomalies.jsonl`: lines with fewer `rollbacks`.
    """

    def __init__(self, out_dir: str | Path, first_step: int = 0, first_epoch: int = 0, rollbacks: int = 0):
        self.folder, self.writer = Path(out_dir), None
        self.path, self.anomalies = self.folder / "log.jsonl", self.folder / "anomalies.jsonl"
        if is_main():
            from torch.utils.tensorboard import SummaryWriter  # slow to import; only a run that logs pays

            _keep(self.path, lambda line: line["epoch"] < first_epoch)
            _keep(self.anomalies, lambda line: line["step"] < first_step or line["rollbacks"] < rollbacks)
            with naming_errors(self.folder):
                self.writer = SummaryWriter(str(out_dir), purge_step=first_step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self.writer:
            with naming_errors(self.folder):
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """`pixels`: (H, W, 3) uint8."""
        if self.writer:
            with naming_errors(self.folder):
                self.writer.add_image(tag, pixels, step, dataformats="HWC")

    def epoch(self, record: dict[str, Any]) -> None:
        """One line of `log.jsonl`; `record` holds `epoch`, and `step`, the updates done."""
        self._line(self.path, record)

    def anomaly(self, record: dict[str, Any]) -> None:
        """One line of `anomalies.jsonl`; `record` holds `step`, the update that was not made, and `rollbacks`."""
        self._line(self.anomalies, record)

    def records(self) -> list[dict[str, Any]]:
        """The lines of `log.jsonl` until now; on every rank."""
        return _lines(self.path)

    def flush(self) -> None:
        """Everything logged until now is on disk, and stays there when the power goes."""
        if self.writer:
            with naming_errors(self.folder):
                self.writer.flush()
                for path in (self.path, self.anomalies, max(self.folder.glob("events.*"), key=os.path.getmtime)):
                    if path.exists():
                        sync(path)

    def close(self) -> None:
        if self.writer:
            with naming_errors(self.folder):
                self.writer.close()

    def _line(self, path: Path, record: dict[str, Any]) -> None:
        if self.writer:
            with naming_errors(path), open(path, "a") as file:
                file.write(json.dumps(record) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    """Its lines; one that a killed process has left unfinished, the last, is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path}: line {number} is not JSON") from None
    return records


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the other lines of the file, in one go."""
    if path.exists():
        save_bytes(path, "".join(json.dumps(line) + "\n" for line in _lines(path) if wanted(line)).encode())
