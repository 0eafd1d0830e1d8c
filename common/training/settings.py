"""Settings that every training program has, and how they cut the data into updates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import setting
from common.errors import InputError


@dataclass(kw_only=True)
class LoopSettings:
    """Settings that every training program has."""

    out_dir: Path = setting(
        help="folder of the run: checkpoints, settings.yaml, log.jsonl, TensorBoard events, pictures"
    )
    epochs: int = setting(100, "passes over the data", least=1)
    batch_size: int = setting(32, "volumes per update, over all processes together", least=1)
    micro_batch_size: int | None = setting(
        None, "volumes per process and forward pass; none: batch_size / processes, no accumulation", least=1
    )
    samples_per_epoch: int | None = setting(None, "volumes that make an epoch; none: as many as there are", least=1)
    weight_decay: float = setting(0.05, "AdamW's, not on biases, norms and tokens", least=0)
    warmup_epochs: float = setting(40.0, "linear warm-up", least=0)
    clip_grad: float | None = setting(3.0, "largest norm of the gradient; none: not clipped", above=0)
    amp: Literal["auto", "bf16", "fp16", "off"] = setting(
        "auto", "autocast; auto: bf16 on CUDA, off on a CPU (where it is slower)"
    )
    seed: int = setting(0, "seeds weights, order, crops and masks")
    workers: int = setting(4, "processes that load data, per training process; 0: none", least=0)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA where there is one")
    save_every: int = setting(50, "epochs between the checkpoints that are kept", least=1)
    save_minutes: float | None = setting(
        15.0, "minutes between two writings of checkpoint-last.pth within an epoch; none: at its end only", least=0
    )
    log_every: int = setting(10, "updates between two log entries", least=1)
    resume: str = setting(
        "auto", "auto: go on from checkpoint-last.pth if it is there; none: start anew; or a checkpoint"
    )
    grad_checkpointing: bool = setting(False, "recompute the encoder in the backward pass: less memory, more time")
    fsdp: bool = setting(
        False, "FSDP2: processes share out weights, gradients and AdamW's state (large and huge encoders)"
    )
    compile: bool = setting(False, "torch.compile of every transformer block; the first updates take minutes")
    on_nan: Literal["skip", "rollback", "stop"] = setting(
        "skip",
        "updates that are not finite (or spikes) are never made; then: go on; go back after nan_row of them; stop",
    )
    nan_row: int = setting(
        10,
        "rollback: bad updates in a row that make the run go back, with other data, to its last good checkpoint",
        least=1,
    )
    spike_factor: float | None = setting(
        None, "an update is bad too if loss or gradient norm exceed this multiple of their mean; none: no", above=1
    )
    hang_minutes: float | None = setting(
        30.0,
        "an update, a window of a validation, a volume of the cache or a checkpoint that takes longer ends the "
        "process, with the stack of every thread; none: wait",
        above=0,
    )


@dataclass(frozen=True)
class BatchPlan:
    """How the data is cut into updates."""

    micro_batch: int
    accum: int
    batch: int
    steps_per_epoch: int
    total_steps: int


def plan_updates(settings: LoopSettings, num_samples: int, world_size: int) -> BatchPlan:
    """The cut of `batch_size` over processes and accumulation. The batch is global: it does not change with the
    number of processes."""
    batch, micro = settings.batch_size, settings.micro_batch_size
    if num_samples < 1:
        raise InputError("the data list is empty")
    if settings.epochs < 1 or batch < 1:
        raise InputError(f"--epochs {settings.epochs}, --batch_size {batch}: both must be at least 1")
    micro = micro or max(1, batch // world_size)
    if batch % (micro * world_size):
        raise InputError(
            f"--batch_size {batch} cannot be cut into micro-batches of {micro} on {world_size} process(es); "
            f"it must be a multiple of {micro * world_size}"
        )
    steps = max(1, round((settings.samples_per_epoch or num_samples) / batch))
    return BatchPlan(micro, batch // (micro * world_size), batch, steps, steps * settings.epochs)
