"""Updates that are not finite: detected and skipped on the device, reported with their files at the next log time.

A bad update never reaches the weights, whatever the policy: the optimiser skips it on the device (`found_inf`), and the
statistics of batch norm are restored. The host learns of it when it reads the running means, once per log interval, so
an update needs no synchronisation.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, default_collate

from common import checkpoint, distributed
from common.config import setting
from common.data.sampler import StreamSampler, index_at
from common.errors import InputError
from common.runlog import RunLog, print_main

# good updates before spikes are detected, and horizon of the running means
SPIKE_WARMUP = 100
# batches written per start of the program; a broken scan comes again in every epoch
MAX_DUMPS = 3


@dataclass(kw_only=True)
class NonFiniteSettings:
    """Settings for updates whose loss or gradient is not finite."""

    on_nan: Literal["skip", "rollback", "stop"] = setting(
        "skip",
        "what follows an update that is not finite, which is never made; skip: continue; rollback: return to the "
        "last good checkpoint after nan_row of them; stop: end the run",
    )
    nan_row: int = setting(10, "rollback: consecutive bad updates after which the run returns to a checkpoint", least=1)
    spike_factor: float | None = setting(None, "a loss or norm above this times its mean is bad too", above=1)


class RollbackRequested(Exception):
    """There were `nan_row` consecutive bad updates under `--on_nan rollback`."""


class NonFiniteGuard:
    """Checks every update on the device: are loss and gradient norm finite, and below `spike_factor` times their mean?

    A spike enters the running mean clipped to that threshold, so a loss that stays higher becomes the new normal after
    a few updates. With a gradient scaler (fp16) gradients overflow regularly: such an update is skipped, but is not
    reported as long as its loss is finite.
    """

    def __init__(self, device: torch.device, spike_factor: float | None = None, scaled: bool = False):
        self.device, self.spike_factor, self.scaled = device, spike_factor, scaled
        self.load({"means": [0.0, 0.0], "count": 0.0, "in_a_row": 0.0, "flags": []})

    def check(self, norm: Tensor, loss: Tensor) -> Tensor:
        """Return 1.0 for an update that must be skipped, else 0.0, on the device and equal on all ranks.

        `norm` is the norm of the reduced gradient, `loss` the loss of this rank.
        """
        values = torch.stack([norm.float(), distributed.all_reduce_mean(loss.detach().float())])
        finite = values.isfinite()
        bad = ~finite.all()
        reported = ~finite[1] if self.scaled else bad
        if self.spike_factor is not None:
            spike = self._is_spike(values, finite.all())
            bad, reported = bad | spike, reported | spike
        self.in_a_row = (self.in_a_row + 1.0) * reported
        self.flags.append(reported.float())
        return bad.float()

    def _is_spike(self, values: Tensor, finite: Tensor) -> Tensor:
        limit = torch.where(self.count >= SPIKE_WARMUP, self.means * self.spike_factor, torch.inf)
        moved = self.means.lerp(values.minimum(limit), 1.0 / (self.count.clamp(max=SPIKE_WARMUP - 1) + 1.0))
        self.means = torch.where(finite, moved, self.means)
        self.count = self.count + finite
        return finite & (values > limit).any()

    def take_report(self) -> tuple[list[bool], int]:
        """Return which updates since the last call were bad, and how many of the last ones were in a row.

        Waits for the device.
        """
        *flags, in_a_row = torch.stack([*self.flags, self.in_a_row]).tolist()
        self.flags = []
        return [bool(flag) for flag in flags], int(in_a_row)

    def state(self) -> dict[str, Any]:
        """Return plain values, exact since float32 fits into Python's float. Waits for the device."""
        return {
            "means": self.means.tolist(),
            "count": float(self.count),
            "in_a_row": float(self.in_a_row),
            "flags": torch.stack(self.flags).tolist() if self.flags else [],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        tensors = {name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in state.items()}
        self.means, self.count, self.in_a_row = (tensors[name] for name in ("means", "count", "in_a_row"))
        self.flags = list(tensors["flags"])


class BadUpdateReporter:
    """Logs bad updates with the files of their batches, writes the first batches, and applies the policy `on_nan`."""

    def __init__(self, out_dir: Path, settings: NonFiniteSettings, dataset: Dataset):
        self.folder, self.settings, self.dataset = out_dir / "anomalies", settings, dataset
        self.dumps = 0

    def report(self, guard: NonFiniteGuard, step: int, sampler: StreamSampler, log: RunLog, rollbacks: int) -> None:
        """Report the bad updates up to `step` since the last call.

        Raises:
            InputError: there was one, and the policy is `stop`.
            RollbackRequested: there were `nan_row` in a row, and the policy is `rollback`.
        """
        flags, in_a_row = guard.take_report()
        bad = [step - len(flags) + 1 + offset for offset, flag in enumerate(flags) if flag]
        for number in bad:
            names = batch_names(number, self.dataset, sampler)
            print_main(f"update {number} skipped: not finite, or a spike; its batch: {', '.join(names)}")
            log.add_skipped_update({"step": number, "rollbacks": rollbacks, "files": names})
            self._dump(number, sampler)
        if bad and self.settings.on_nan == "stop":
            raise InputError(f"--on_nan stop: update {bad[0]} not finite, or a spike; its files: {log.skipped_path}")
        if self.settings.on_nan == "rollback" and in_a_row >= self.settings.nan_row:
            raise RollbackRequested(f"{in_a_row} consecutive bad updates until update {step}")

    def _dump(self, step: int, sampler: StreamSampler) -> None:
        if self.dumps >= MAX_DUMPS:
            return
        self.dumps += 1
        try:
            dump_batches(self.folder / f"update-{step}-rank{sampler.rank}.pth", step, self.dataset, sampler)
        except InputError as error:
            # a full disk must not end the run
            print_main(f"warning: {error}")


def batch_names(step: int, dataset: Dataset, sampler: StreamSampler) -> list[str]:
    """Return the names of the volumes in the global batch of an update (`dataset.name(index)`)."""
    first = step * sampler.global_batch
    positions = range(first, first + sampler.global_batch)
    return [dataset.name(index_at(p, sampler.num_samples, sampler.seed)) for p in positions]


def dump_batches(path: Path, step: int, dataset: Dataset, sampler: StreamSampler) -> None:
    """Write this rank's batches of an update, read again: {`step`, `items`, `batches`: one per micro-batch}."""
    own = copy.copy(sampler)
    own.start, own.stop = step, step + 1
    micro = list(own)
    batches = [default_collate([dataset[item] for item in items]) for items in micro]
    checkpoint.save(path, {"step": step, "items": micro, "batches": batches})


class BatchNormStatistics:
    """Running statistics of a method's batch norms: equal on all ranks, and not changed by skipped updates.

    Costs nothing for methods without batch norm.
    """

    def __init__(self, method: nn.Module):
        norms = [m for m in method.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self.buffers = [buffer for m in norms for buffer in (m.running_mean, m.running_var)]
        # SyncBatchNorm has the same statistics on every rank
        self.differ = any(not isinstance(m, nn.SyncBatchNorm) for m in norms)
        self.before: list[Tensor] = []

    def remember(self) -> None:
        """Keep a copy, before the forward passes of an update."""
        self.before = [buffer.clone() for buffer in self.buffers]

    def restore_if_skipped(self, skipped: Tensor) -> None:
        """Set the buffers to their means over the ranks, or to the copy where `skipped` is not 0."""
        if not self.buffers:
            return
        sizes = [buffer.numel() for buffer in self.buffers]
        after = torch.cat([buffer.flatten() for buffer in self.buffers])
        if self.differ:
            after = distributed.all_reduce_mean(after)
        for buffer, before, now in zip(self.buffers, self.before, after.split(sizes)):
            buffer.copy_(torch.where(skipped > 0, before, now.view_as(before)))
