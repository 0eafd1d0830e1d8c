"""What a run tells: lines on the screen, progress bars, TensorBoard, and one JSON line per epoch. Rank 0 speaks, the others are silent."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm


def is_main() -> bool:
    """True on rank 0 of a torchrun launch, and without one."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """One line on rank 0's standard output, kept whole when a progress bar is on the screen."""
    if is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def progress(iterable: Iterable | None = None, desc: str = "", total: int | None = None, unit: str = "it") -> tqdm:
    """A progress bar on rank 0. Into a file or a pipe it is refreshed every ten seconds only, so that logs stay short."""
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        unit=unit,
        disable=not is_main(),
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
    )


class RunLog:
    """TensorBoard events and `log.jsonl` in `out_dir`, written by rank 0 only. A resumed run drops what was logged past `first_step`."""

    def __init__(self, out_dir: str | Path, first_step: int = 0):
        self.path = Path(out_dir) / "log.jsonl"
        self.writer = None
        if is_main():
            from torch.utils.tensorboard import SummaryWriter  # slow to import; only a run that logs pays

            self._keep(first_step)
            self.writer = SummaryWriter(str(out_dir), purge_step=first_step)

    def _keep(self, first_step: int) -> None:
        """Only the epochs that were finished by `first_step`: no line is doubled, none is from an earlier run."""
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= first_step))

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """`pixels`: (H, W, 3) uint8."""
        if self.writer:
            self.writer.add_image(tag, pixels, step, dataformats="HWC")

    def epoch(self, record: dict[str, Any]) -> None:
        """One JSON line; `record` holds `step`, the updates done."""
        if self.writer:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self.writer.close()
