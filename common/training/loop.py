"""The training loop of both programs: every method, one process or many, CPU or CUDA, goes through `train_one_epoch`.

A method is an `nn.Module` with

    forward(batch, step) -> {name: scalar tensor}   the losses, and whatever else is to be logged; only names with a
                                                    weight are summed

and, where it needs them,

    before_step(step), after_step(step)             around the optimiser step: gradients ready; weights updated (EMA
                                                    teacher, centre)
    num_parts; forward(batch, step, part)           the backward pass in parts, to save memory; each part's graph is
                                                    freed before the next runs, and what the parts report under one
                                                    name are shares of it and add up
    probe                                           a parameter at which each loss's gradient norm is logged, once an
                                                    epoch
    schedule_values(step) -> {name: float}          to be logged beside the learning rate
    checkpoint_state(), load_checkpoint_state(content)
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from common import distributed
from common.data.loader import to_device
from common.data.sampler import mix
from common.errors import InputError
from common.runlog import RunLog, print_main, progress
from common.training.fsdp import full_tensor
from common.training.nonfinite import RollbackRequested
from common.training.parallel import reducing, uncompiled
from common.training.preemption import Stopped
from common.training.state import TrainingState

AfterEpoch = Callable[[int, RunLog, nn.Module], dict[str, float]]


def train_one_epoch(training: TrainingState) -> dict[str, float]:
    """The updates of `training.epoch` that are not done yet; returns the epoch's means of what the method reported.

    A step never waits for the device (but in torch's SyncBatchNorm, where a method has one). A bad update (not finite,
    a spike) is skipped on the device, and counted as `skipped`.
    """
    t, method, run, plan = training, training.method, training.run, training.plan
    parameters = [p for group in t.optimizer.param_groups for p in group["params"]]
    num_parts = getattr(method, "num_parts", 1)
    begin, end = t.epoch * plan.steps_per_epoch, (t.epoch + 1) * plan.steps_per_epoch
    t.bar = progress(
        total=end - begin, initial=t.step - begin, desc=f"epoch {t.epoch + 1}/{t.settings.epochs}", unit="update"
    )
    t.model.train()
    for step in range(t.step, end):
        t.watchdog.feed()
        lr = t.learning_rate(step)
        for group in t.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        torch.manual_seed(
            mix(t.data_seed, step, run.rank)
        )  # dropout: a function of the step, so a restart changes nothing
        t.statistics.remember()
        loss_weights, total = t.weights(step), 0.0
        reported: dict[str, Tensor] = {}  # means over the update's micro-batches
        for micro in range(plan.accum):
            batch = to_device(next(t.batches), run.device)
            for part in range(num_parts):
                last = micro == plan.accum - 1 and part == num_parts - 1
                probing = step == begin and micro == 0 and part == 0 and hasattr(method, "probe")
                with reducing(t.model, last), uncompiled(probing and t.settings.compile):
                    with torch.autocast(run.device.type, dtype=t.autocast, enabled=t.autocast is not None):
                        values = t.model(batch, step, part) if num_parts > 1 else t.model(batch, step)
                    losses = {name: loss_weights[name] * values[name] for name in loss_weights if name in values}
                    if probing:
                        t.recent.add(gradient_norms(losses, method.probe))
                    loss = sum(losses.values()) / plan.accum
                    t.scaler.scale(loss).backward()
                total = total + loss.detach()
                for name, value in values.items():
                    reported[name] = reported.get(name, 0.0) + value.detach() / plan.accum

        if hasattr(method, "before_step"):
            method.before_step(step)
        t.scaler.unscale_(t.optimizer)
        norm = full_tensor(nn.utils.clip_grad_norm_(parameters, t.settings.clip_grad or float("inf")))
        skip = t.guard.check(norm, total)
        t.statistics.restore_if_skipped(skip)
        t.optimizer.found_inf = skip  # fused AdamW leaves weights and moments alone where this is 1
        t.optimizer.step()
        t.scaler.update()
        t.optimizer.zero_grad(set_to_none=True)
        if hasattr(method, "after_step"):
            method.after_step(step)

        for means in (t.recent, t.epoch_means):
            means.add(reported | {"grad_norm": norm}, made=1.0 - skip)
            means.add({"skipped": skip})
        t.step = step + 1
        t.bar.update()
        if t.step % t.settings.log_every == 0 or t.step == end:
            told = t.log_interval(step, lr)
            t.bar.set_postfix({name: f"{told[name]:.3f}" for name in loss_weights if name in told}, refresh=False)
        t.save_or_stop()
    t.bar.close()
    return t.epoch_means.read()


def gradient_norms(losses: dict[str, Tensor], probe: nn.Parameter) -> dict[str, Tensor]:
    """How hard each weighted loss pulls at one parameter: {`grad_norm/<name>`: norm}."""
    norms = {}
    for name, loss in losses.items():
        (grad,) = torch.autograd.grad(loss, probe, retain_graph=True, allow_unused=True)
        if grad is not None:
            norms[f"grad_norm/{name}"] = grad.norm()
    return norms


def fit(training: TrainingState, after_epoch: AfterEpoch | None = None) -> Path:
    """Train to the end of `settings.epochs`, resuming if asked; returns the path of the last checkpoint.

    Raises SystemExit(75) when it was asked to stop by SIGTERM or SIGUSR1 and has saved (common/signals.py).

    Args:
        after_epoch: called on every rank after each epoch with its number, the log and the method, or a copy of it
            where the weights are shared out (validation, pictures); what it returns goes into the epoch's log line. It
            may be called again for the same epoch by a resumed run. Long ones go through `until_stopped`
            (common/training/preemption.py).
    """
    try:
        training.begin()
        while training.epoch < training.settings.epochs:
            try:
                finish_epoch(training, after_epoch)
            except RollbackRequested as reason:
                training.rollback(str(reason))
        training.saver.wait()
        distributed.barrier()  # whoever returns may read the checkpoint
    finally:
        training.close()
    return training.saver.last


def finish_epoch(t: TrainingState, after_epoch: AfterEpoch | None) -> None:
    """What is left of `t.epoch`: updates, validation, log line, checkpoint. Asked to stop in the middle of a
    validation, it is saved as it was before."""
    began, last_step = time.time(), (t.epoch + 1) * t.plan.steps_per_epoch
    t.start_epoch()
    means = train_one_epoch(t)
    check_progress(t, means)
    t.watchdog.feed()
    method = t.full_method()  # on every rank, whether or not it has something to do
    if after_epoch:
        try:
            means |= after_epoch(t.epoch, t.log, method)
        except Stopped:
            t.stop()
    del method
    seconds = round(time.time() - began, 1)  # of this process: less for an epoch that was taken up in its middle
    t.watchdog.feed()
    t.log.epoch({"epoch": t.epoch, "step": t.step, "lr": t.learning_rate(last_step - 1), "seconds": seconds} | means)
    t.save(within=False)
    t.epoch += 1
    t.epoch_means.clear()


def check_progress(t: TrainingState, means: dict[str, float]) -> None:
    """Say how many updates were skipped; stop when none was made, before the checkpoint on disk is replaced. A run that
    may go back to other data has its own count of them (`nan_row`)."""
    calibrating = t.scaler.is_enabled() and t.scaler.get_scale() >= 1.0  # fp16 finds its scale by overflowing
    if means["skipped"] == 1.0 and not calibrating and t.settings.on_nan != "rollback":
        last = t.saver.last
        raise InputError(
            f"epoch {t.epoch + 1}: no update had a finite gradient, stopped; "
            f"{f'{last} is from before' if last.exists() else 'nothing was saved'}"
        )
    if means["skipped"] > 0.0:
        print_main(f"epoch {t.epoch + 1}: {means['skipped']:.1%} of the updates were skipped")
