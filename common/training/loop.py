"""One epoch of updates, for every method, on one process or many, CPU or CUDA."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.data.sampler import mix
from common.training.fsdp import full_tensor
from common.training.method import Batch
from common.training.optim import set_learning_rate
from common.training.parallel import autocast, eager_blocks, reduce_gradients
from common.training.state import TrainingState

Schedule = Callable[[int], float]
LossWeights = Callable[[int], dict[str, float]]


@dataclass(frozen=True)
class UpdateRule:
    """How an update is made: schedules as functions of the step, and what does not change."""

    learning_rate: Schedule
    # names and weights of the losses that are summed; what else a method reports is logged only
    loss_weights: LossWeights
    # micro-batches per update
    accum: int = 1
    # largest norm of the gradient, None for no clipping
    clip_grad: float | None = None
    # seed of dropout, which is a function of (seed, step, rank), so that a restart changes nothing
    seed: int = 0


def train_one_epoch(
    state: TrainingState,
    batches: Iterable[Batch],
    last_step: int,
    rule: UpdateRule,
    *,
    first_step: int = 0,
    after_update: Callable[[float], None] = lambda lr: None,
) -> None:
    """Make the updates `state.step` to `last_step` - 1 of one epoch. Means are collected in `state`.

    An update never waits for the device, except in torch's SyncBatchNorm when a method has one. A bad update (not
    finite, or a spike) is skipped on the device, and counted as `skipped`.

    Args:
        batches: micro-batches on the device, `rule.accum` per update.
        first_step: first step of the epoch, in which the gradient norm of each loss is measured.
        after_update: called with the learning rate after every update, to log and save.
    """
    state.model.train()
    stream = iter(batches)
    for step in range(state.step, last_step):
        lr = rule.learning_rate(step)
        set_learning_rate(state.optimizer, lr)
        torch.manual_seed(mix(rule.seed, step, state.run.rank))
        state.batchnorm.remember()

        loss, values = accumulate_gradients(state, stream, step, rule, measure=step == first_step)

        state.method.before_step(step)
        state.scaler.unscale_(state.optimizer)
        norm = full_tensor(nn.utils.clip_grad_norm_(state.parameters, rule.clip_grad or float("inf")))
        skipped = state.guard.check(norm, loss)
        state.batchnorm.restore_if_skipped(skipped)
        # fused AdamW leaves weights and moments unchanged where this is 1
        state.optimizer.found_inf = skipped
        state.optimizer.step()
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        values |= state.method.after_step(step) or {}

        state.add_means(values | {"grad_norm": norm}, skipped)
        state.step = step + 1
        after_update(lr)


def accumulate_gradients(
    state: TrainingState, stream: Iterator[Batch], step: int, rule: UpdateRule, measure: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the forward and backward passes of an update, and return its loss and the means of the reported values.

    Gradients are reduced over the processes in the last pass only.

    Args:
        measure: also measure the gradient norm of each loss, in the first micro-batch.
    """
    method, loss_weights = state.method, rule.loss_weights(step)
    total, values = torch.zeros((), device=state.run.device), {}
    # gradients of the losses at one parameter
    shares: dict[str, Tensor] = {}
    for micro in range(rule.accum):
        batch = next(stream)
        for part in range(method.num_parts):
            last = micro == rule.accum - 1 and part == method.num_parts - 1
            measured = measure and micro == 0 and method.grad_norm_parameter is not None
            with reduce_gradients(state.model, last), eager_blocks(measured and state.compiled):
                with autocast(state.run.device, state.autocast):
                    reported = state.model(batch, step, part)
                losses = {name: weight * reported[name] for name, weight in loss_weights.items() if name in reported}
                if measured:
                    add_gradients(shares, losses, method.grad_norm_parameter)
                loss = sum(losses.values()) / rule.accum
                state.scaler.scale(loss).backward()
            total = total + loss.detach()
            for name, value in reported.items():
                values[name] = values.get(name, 0.0) + value.detach() / rule.accum
    if shares:
        state.interval_means.add({f"grad_norm/{name}": grad.norm() for name, grad in shares.items()})
    return total, values


def add_gradients(shares: dict[str, Tensor], losses: dict[str, Tensor], parameter: nn.Parameter) -> None:
    """Add the gradient of each weighted loss at one parameter to `shares`, under the name of the loss."""
    for name, loss in losses.items():
        (grad,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
        if grad is not None:
            shares[name] = shares.get(name, 0.0) + grad
