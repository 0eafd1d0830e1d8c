"""Updates that must not be made: found on the device, told at log time with the files they came from, and what then.

A bad update never reaches the weights, whatever the policy: the optimiser skips it on the device (`found_inf`). The
host learns of it when it reads the running means, once per log interval, so a step costs no synchronisation.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, default_collate

from common import checkpoint, distributed
from common.data.sampler import StreamSampler, index_at
from common.distributed import all_reduce_mean
from common.errors import InputError
from common.files import naming_errors
from common.runlog import RunLog, print_main
from common.training.settings import LoopSettings

SETTLE = 100  # good updates before spikes are looked for; also the horizon of the running means
MAX_DUMPS = 3  # batches written per start of the program: a broken scan comes again in every epoch


class RollbackRequested(Exception):
    """`nan_row` bad updates in a row under `--on_nan rollback`."""


class NonFiniteGuard:
    """Judges every update on the device: is loss or gradient norm not finite, or `spike_factor` times its running mean?

    A spike enters the running mean cut to that threshold, so a loss that stays higher is the new normal after a few
    updates. With a scaler (fp16) a gradient that overflows is its daily business: the update is skipped, but is not an
    anomaly while the loss is finite.
    """

    def __init__(self, settings: LoopSettings, device: torch.device, scaled: bool = False):
        self.settings, self.device, self.scaled = settings, device, scaled
        self.load({"means": [0.0, 0.0], "count": 0.0, "in_a_row": 0.0, "flags": []})
        self.dumps = 0

    def check(self, norm: Tensor, loss: Tensor) -> Tensor:
        """1.0 for an update that must be skipped, else 0.0, on the device and the same on all ranks.

        `norm` is that of the reduced gradient, `loss` this rank's.
        """
        values = torch.stack([norm.float(), distributed.all_reduce_mean(loss.detach().float())])
        finite = values.isfinite()
        bad = ~finite.all()
        told = ~finite[1] if self.scaled else bad
        if self.settings.spike_factor is not None:
            limit = torch.where(self.count >= SETTLE, self.means * self.settings.spike_factor, torch.inf)
            spike = finite.all() & (values > limit).any()
            moved = self.means.lerp(values.minimum(limit), 1.0 / (self.count.clamp(max=SETTLE - 1) + 1.0))
            self.means = torch.where(finite.all(), moved, self.means)
            self.count = self.count + finite.all()
            bad, told = bad | spike, told | spike
        self.in_a_row = (self.in_a_row + 1.0) * told
        self.flags.append(told.float())
        return bad.float()

    def state(self) -> dict[str, Any]:
        """Plain values, exactly (float32 fits in Python's float). Waits for the device."""
        flags = torch.stack(self.flags).tolist() if self.flags else []
        return {
            "means": self.means.tolist(),
            "count": float(self.count),
            "in_a_row": float(self.in_a_row),
            "flags": flags,
        }

    def load(self, state: dict[str, Any]) -> None:
        as_tensor = {
            name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in state.items()
        }
        self.means, self.count, self.in_a_row = (as_tensor[name] for name in ("means", "count", "in_a_row"))
        self.flags = list(as_tensor["flags"])

    def report(self, step: int, dataset: Dataset, sampler: StreamSampler, log: RunLog, rollbacks: int) -> None:
        """Tell which updates since the last call, up to `step`, were bad, and follow the policy: return, raise
        RollbackRequested or InputError.

        Waits for the device: called when the running means are read.
        """
        *flags, in_a_row = torch.stack([*self.flags, self.in_a_row]).tolist()
        bad = [step - len(flags) + 1 + offset for offset, flag in enumerate(flags) if flag]
        self.flags = []
        for number in bad:
            names = batch_names(number, dataset, sampler)
            print_main(
                f"update {number} was not made: loss or gradient not finite, or a spike; its batch: {', '.join(names)}"
            )
            log.anomaly({"step": number, "rollbacks": rollbacks, "files": names})
            if self.dumps < MAX_DUMPS:
                self.dumps += 1
                path = self.settings.out_dir / "anomalies" / f"update-{number}-rank{sampler.rank}.pth"
                try:
                    dump_batches(path, number, dataset, sampler)
                except InputError as error:  # a full disk; the run can do without
                    print_main(f"warning: {error}")
        if bad and self.settings.on_nan == "stop":
            raise InputError(f"update {bad[0]} was bad and --on_nan is stop; its files: {log.anomalies}")
        if self.settings.on_nan == "rollback" and in_a_row >= self.settings.nan_row:
            raise RollbackRequested(f"{int(in_a_row)} bad updates in a row until update {step}")


def batch_names(step: int, dataset: Dataset, sampler: StreamSampler) -> list[str]:
    """The names of the volumes in the global batch of an update, by `dataset.name(index)`."""
    first = step * sampler.global_batch
    indices = [index_at(p, sampler.num_samples, sampler.seed) for p in range(first, first + sampler.global_batch)]
    return [getattr(dataset, "name", str)(index) for index in indices]


def dump_batches(path: Path, step: int, dataset: Dataset, sampler: StreamSampler) -> None:
    """This rank's share of an update's batch, made again from the stream: {`step`, `items`, `batches`: one per
    micro-batch}."""
    own = StreamSampler(
        sampler.num_samples, sampler.micro_batch, sampler.accum, sampler.rank, sampler.world_size, sampler.seed
    )
    own.start, own.stop = step, step + 1
    micro = list(own)
    with naming_errors(path.parent):
        path.parent.mkdir(exist_ok=True)
    batches = [default_collate([dataset[item] for item in items]) for items in micro]
    checkpoint.save(path, {"step": step, "items": micro, "batches": batches})


# ---------------------------------------------------------------- batchnorm
# The running statistics of batch norm, which a forward pass changes: the same on all ranks, and out of the reach of


class RunningStatistics:
    """Means and variances of a method's batch norms. Empty, and without cost, for methods that have none."""

    def __init__(self, method: nn.Module):
        norms = [m for m in method.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self.buffers = [buffer for m in norms for buffer in (m.running_mean, m.running_var)]
        self.differ = any(not isinstance(m, nn.SyncBatchNorm) for m in norms)  # between the ranks
        self.before: list[Tensor] = []

    def remember(self) -> None:
        """Before the forward passes of an update."""
        self.before = [buffer.clone() for buffer in self.buffers]

    def restore_if_skipped(self, skip: Tensor) -> None:
        """After them: the means over the ranks, or what was before where `skip` is not 0."""
        if not self.buffers:
            return
        sizes = [buffer.numel() for buffer in self.buffers]
        after = torch.cat([buffer.flatten() for buffer in self.buffers])
        if self.differ:
            after = all_reduce_mean(after)
        for buffer, before, now in zip(self.buffers, self.before, after.split(sizes)):
            buffer.copy_(torch.where(skip > 0, before, now.view_as(before)))
