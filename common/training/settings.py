"""Settings of every training program, and how they divide the data into updates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import group, setting
from common.errors import InputError
from common.training.checkpointing import CheckpointSettings
from common.training.nonfinite import NonFiniteSettings
from common.training.optim import OptimSettings
from common.training.parallel import PrecisionSettings


@dataclass(kw_only=True)
class LoopSettings:
    """Settings of every training program. The defaults are those of pretraining."""

    out_dir: Path = setting(help="folder of the run: checkpoints, settings.yaml, logs, TensorBoard events, pictures")
    epochs: int = setting(100, "passes over the data", least=1, most=10**9)
    batch_size: int = setting(32, "volumes per update, over all processes together", least=1, most=65536)
    micro_batch_size: int | None | Literal["auto"] = setting(
        None,
        "volumes per process and pass; none: no accumulation; auto: the most that fit the device",
        least=1,
        most=65536,
    )
    samples_per_epoch: int | None = setting(None, "volumes that make an epoch; none: all of them", least=1, most=10**9)
    seed: int = setting(0, "seed of weights, data order, crops and masks", least=-(2**63), most=2**63 - 1)
    workers: int = setting(4, "loading processes per training process; 0: load in that", least=0, most=1024)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA where available")
    log_every: int = setting(10, "updates between two log entries", least=1)
    hang_minutes: float | None = setting(
        30.0,
        "end the process if an update, window, cached volume or checkpoint takes longer; none: never",
        above=0,
        most=10**6,
    )
    dry_run: bool = setting(
        False,
        "everything but the updates: two passes, their time and memory, and that of the run; out_dir stays as it is",
    )
    optim: OptimSettings = group(OptimSettings, "Optimiser")
    precision: PrecisionSettings = group(PrecisionSettings, "Precision and memory")
    checkpoints: CheckpointSettings = group(CheckpointSettings, "Checkpoints")
    nonfinite: NonFiniteSettings = group(NonFiniteSettings, "Updates that are not finite")

    def is_due(self, epoch: int, every: int) -> bool:
        """Return whether what is done every `every` epochs and after the last one follows an epoch; 0: never."""
        return every > 0 and ((epoch + 1) % every == 0 or epoch + 1 == self.epochs)


@dataclass(frozen=True)
class BatchPlan:
    """How the data is divided into updates."""

    # volumes per process and forward pass
    micro_batch: int
    # micro-batches per process and update
    accum: int
    # volumes per update, over all processes
    batch: int
    steps_per_epoch: int
    total_steps: int


def plan_updates(settings: LoopSettings, num_samples: int, world_size: int) -> BatchPlan:
    """Divide `batch_size` over processes and micro-batches. The batch is global, whatever the number of processes.

    With `auto` the micro-batches of the plan have one volume until the trainer enlarges them (microbatch.py).

    Raises:
        InputError: there is no data, the batch is not a multiple of the micro-batches of all processes, or settings
            exclude each other.
    """
    batch, micro = settings.batch_size, settings.micro_batch_size
    if num_samples < 1:
        raise InputError("the data list is empty, expected at least one volume")
    if micro == "auto" and settings.precision.fsdp and world_size > 1:
        # a process without memory would leave the others waiting for its weights
        raise InputError("--micro_batch_size auto: cannot be tried with --fsdp, expected a number")
    if settings.precision.channels_last and settings.precision.fsdp and world_size > 1:
        # FSDP2 shards contiguous weights only
        raise InputError("--channels_last: found --fsdp too, expected one of them")
    micro = 1 if micro == "auto" else micro or max(1, batch // world_size)
    if batch % (micro * world_size):
        product = f"{world_size} process(es) x micro-batches of {micro}"
        raise InputError(f"--batch_size {batch}: must be a multiple of {micro * world_size} ({product})")
    steps = max(1, round((settings.samples_per_epoch or num_samples) / batch))
    return BatchPlan(micro, batch // (micro * world_size), batch, steps, steps * settings.epochs)
