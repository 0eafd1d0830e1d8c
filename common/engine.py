"""The training loop of both programs: every method, one process or many, CPU or CUDA, goes through `train_one_epoch`.

A method is an `nn.Module` with

    forward(batch, step) -> {name: scalar tensor}     the losses, and whatever else is to be logged; only names with a weight are summed

and, where it needs them,

    before_step(step), after_step(step)     around the optimiser step: gradients ready, weights updated (EMA teacher, centre)
    num_parts; forward(batch, step, part)   the backward pass in parts, to save memory; each part's graph is freed before the next runs;
                                            what the parts report under one name are shares of it and add up
    probe                                   a parameter at which each loss's gradient norm is logged, once an epoch
    schedule_values(step) -> {name: float}  to be logged beside the learning rate
    checkpoint_state(), load_checkpoint_state(content)
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from common import checkpoint, distributed
from common.config import InputError, setting
from common.distributed import Run
from common.logging import RunLog, progress, say
from common.sampling import StreamSampler, mix

Weights = Callable[[int], dict[str, float]]


@dataclass(kw_only=True)
class LoopSettings:
    """Settings that every training program has."""

    out_dir: Path = setting(help="folder of the run: checkpoints, log.jsonl, TensorBoard events, pictures")
    epochs: int = setting(100, "passes over the data")
    batch_size: int = setting(32, "volumes per update, over all processes together")
    micro_batch_size: int | None = setting(None, "volumes per process and forward pass; none: batch_size / processes, no accumulation")
    samples_per_epoch: int | None = setting(None, "volumes that make an epoch; none: as many as there are")
    weight_decay: float = setting(0.05, "AdamW's, not on biases, norms and tokens")
    warmup_epochs: float = setting(40.0, "linear warm-up")
    clip_grad: float | None = setting(3.0, "largest norm of the gradient; none: not clipped")
    amp: Literal["auto", "bf16", "fp16", "off"] = setting("auto", "autocast; auto: bf16 on CUDA, off on a CPU (where it is slower)")
    seed: int = setting(0, "seeds weights, order, crops and masks")
    workers: int = setting(4, "processes that load data, per training process; 0: none")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA where there is one")
    save_every: int = setting(50, "epochs between the checkpoints that are kept")
    log_every: int = setting(10, "updates between two log entries")
    resume: str = setting("auto", "auto: go on from checkpoint-last.pth if it is there; none: start anew; or a checkpoint")
    grad_checkpointing: bool = setting(False, "recompute the encoder in the backward pass: less memory, more time")


@dataclass(frozen=True)
class Plan:
    """How the data is cut into updates."""

    micro_batch: int
    accum: int
    batch: int
    steps_per_epoch: int
    total_steps: int


def plan_updates(settings: LoopSettings, num_samples: int, world_size: int) -> Plan:
    """The cut of `batch_size` over processes and accumulation. The batch is global: it does not change with the number of processes."""
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
    return Plan(micro, batch // (micro * world_size), batch, steps, steps * settings.epochs)


def build_optimizer(method: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.AdamW:
    """Fused AdamW with timm's groups: no decay on biases, 1-D parameters and tokens. Only the fused form can skip an update on the device."""
    tokens = {n for n, _ in method.named_parameters() if n.rsplit(".", 1)[-1] in ("cls_token", "mask_token")}
    groups = param_groups_weight_decay(method, weight_decay, no_weight_decay_list=tokens)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


# ---------------------------------------------------------------- one epoch


class Means:
    """Running means of named scalars, kept on the device: reading them is the only time the host waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Means over what was added and over all processes."""
        if not self.sums:
            return {}
        stacked = torch.stack([self.sums[name] / self.counts[name] for name in self.sums])
        return dict(zip(self.sums, distributed.all_reduce_mean(stacked).tolist()))


def train_one_epoch(
    model: nn.Module,
    batches: Iterator[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    steps: range,
    accum: int,
    run: Run,
    *,
    learning_rate: Callable[[int], float],
    weights: Weights,
    clip_grad: float | None,
    autocast: torch.dtype | None,
    seed: int,
    log_every: int,
    log: RunLog,
    desc: str,
) -> dict[str, float]:
    """The updates `steps`, each from `accum` micro-batches; returns the means of what the method reported.

    A step never waits for the device. An update whose gradient is not finite is skipped on the device, and counted as `skipped`.
    """
    method = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    num_parts = getattr(method, "num_parts", 1)
    epoch_means, recent = Means(), Means()
    model.train()
    bar = progress(total=len(steps), desc=desc, unit="update")
    for step in steps:
        lr = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        torch.manual_seed(mix(seed, step, run.rank))  # dropout and drop path: a function of the step, so a restart changes nothing
        loss_weights = weights(step)
        for micro in range(accum):
            batch = to_device(next(batches), run.device)
            reported: dict[str, Tensor] = {}
            for part in range(num_parts):
                last = micro == accum - 1 and part == num_parts - 1
                with contextlib.nullcontext() if last or model is method else model.no_sync():
                    with torch.autocast(run.device.type, dtype=autocast, enabled=autocast is not None):
                        values = model(batch, step, part) if num_parts > 1 else model(batch, step)
                    losses = {name: loss_weights[name] * values[name] for name in loss_weights if name in values}
                    if step == steps[0] and micro == 0 and hasattr(method, "probe"):
                        recent.add(gradient_norms(losses, method.probe))
                    scaler.scale(sum(losses.values()) / accum).backward()
                for name, value in values.items():
                    reported[name] = reported.get(name, 0.0) + value.detach()
            recent.add(reported)
            epoch_means.add(reported)

        if hasattr(method, "before_step"):
            method.before_step(step)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, clip_grad or float("inf"))
        skip = (~norm.isfinite()).float()
        if not scaler.is_enabled():  # fused AdamW leaves the weights alone where this is 1; the scaler of fp16 sets its own
            optimizer.found_inf = skip
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if hasattr(method, "after_step"):
            method.after_step(step)

        tail = {"grad_norm": norm, "skipped": skip}
        recent.add(tail)
        epoch_means.add(tail)
        bar.update()
        if (step + 1) % log_every == 0 or step == steps[-1]:
            means = recent.read()
            scheduled = method.schedule_values(step) if hasattr(method, "schedule_values") else {}
            log.scalars({f"train/{name}": v for name, v in means.items()} | {"lr": lr} | scheduled, step)
            bar.set_postfix({name: f"{means[name]:.3f}" for name in loss_weights if name in means}, refresh=False)
            recent = Means()
    bar.close()
    return epoch_means.read()


def gradient_norms(losses: dict[str, Tensor], probe: nn.Parameter) -> dict[str, Tensor]:
    """How hard each weighted loss pulls at one parameter: {`pull/<name>`: norm}."""
    norms = {}
    for name, loss in losses.items():
        (grad,) = torch.autograd.grad(loss, probe, retain_graph=True, allow_unused=True)
        if grad is not None:
            norms[f"pull/{name}"] = grad.norm()
    return norms


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


# ---------------------------------------------------------------- a run


def fit(
    method: nn.Module,
    dataset: Dataset,
    settings: LoopSettings,
    run: Run,
    plan: Plan,
    *,
    learning_rate: Callable[[int], float],
    weights: Weights,
    args: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    after_epoch: Callable[[int, RunLog], dict[str, float]] | None = None,
) -> Path:
    """Train `method` on `dataset` to the end of `settings.epochs`, resuming if asked; returns the path of the last checkpoint.

    Args:
        dataset: `dataset[(position, index)]` gives one sample, all its randomness drawn from (seed, position).
        learning_rate, weights: functions of the step.
        args: what the checkpoint keeps as `args`, plain types.
        after_epoch: called on every rank after each epoch (validation, pictures); what it returns goes into the epoch's log line.
    """
    method.to(run.device)  # before the optimiser's state is loaded, which follows its parameters' device
    start = resume(method, optimizer, settings, run)
    log = RunLog(settings.out_dir, first_step=start)
    model = wrap(method, run)
    autocast = autocast_dtype(settings.amp, run.device)
    scaler = torch.amp.GradScaler(run.device.type, enabled=autocast is torch.float16)
    sampler = StreamSampler(len(dataset), plan.micro_batch, plan.accum, run.rank, run.world_size, settings.seed)
    loader = build_loader(dataset, sampler, settings.workers, run.device)
    last = Path(settings.out_dir) / checkpoint.LAST

    for epoch in range(start // plan.steps_per_epoch, settings.epochs):
        began = time.time()
        stop = (epoch + 1) * plan.steps_per_epoch
        sampler.start, sampler.stop = max(start, epoch * plan.steps_per_epoch), stop
        means = train_one_epoch(
            model,
            iter(loader),
            optimizer,
            scaler,
            range(sampler.start, stop),
            plan.accum,
            run,
            learning_rate=learning_rate,
            weights=weights,
            clip_grad=settings.clip_grad,
            autocast=autocast,
            seed=settings.seed,
            log_every=settings.log_every,
            log=log,
            desc=f"epoch {epoch + 1}/{settings.epochs}",
        )
        check_progress(means, epoch, last)
        if after_epoch:
            means |= after_epoch(epoch, log)
        log.epoch({"epoch": epoch, "step": stop, "lr": learning_rate(stop - 1), "seconds": round(time.time() - began, 1)} | means)
        if run.rank == 0:
            content = method.checkpoint_state() | {"optimizer": optimizer.state_dict(), "epoch": epoch, "args": args | {"step": stop}}
            checkpoint.save(last, content)
            if (epoch + 1) % settings.save_every == 0 or epoch + 1 == settings.epochs:
                checkpoint.save(last.with_name(f"checkpoint-{epoch}.pth"), content)
        distributed.barrier()
    log.close()
    return last


def check_progress(means: dict[str, float], epoch: int, last: Path) -> None:
    """Say how many updates were skipped; stop when none was made, before the checkpoint on disk is replaced."""
    if means["skipped"] == 1.0:
        raise InputError(
            f"epoch {epoch + 1}: no update had a finite gradient, stopped; "
            f"{f'{last} is from before' if last.exists() else 'nothing was saved'}"
        )
    if means["skipped"] > 0.0:
        say(f"epoch {epoch + 1}: {means['skipped']:.1%} of the updates were skipped, their gradient was not finite")


def resume(method: nn.Module, optimizer: torch.optim.Optimizer, settings: LoopSettings, run: Run) -> int:
    """Load where the run stands, if `settings.resume` says so; returns the number of updates already done."""
    path = Path(settings.out_dir) / checkpoint.LAST if settings.resume == "auto" else Path(settings.resume)
    if settings.resume == "none" or (settings.resume == "auto" and not path.exists()):
        return 0
    content = checkpoint.load(path)
    try:
        method.load_checkpoint_state(content)
        optimizer.load_state_dict(content["optimizer"])
        step = content["args"]["step"]
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: not a checkpoint of this run ({reason}); --resume none starts anew") from None
    say(f"resuming from {path}: {step} updates done")
    return step


def wrap(method: nn.Module, run: Run) -> nn.Module:
    """The method, in DDP where there are several processes."""
    if run.world_size == 1:
        return method
    device_ids = [run.local_rank] if run.device.type == "cuda" else None
    return DistributedDataParallel(method, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """bf16 or fp16, or None for full precision."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def build_loader(dataset: Dataset, sampler: StreamSampler, workers: int, device: torch.device) -> DataLoader:
    """Batches of this rank in the order of the stream."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_one_thread if workers else None,
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
