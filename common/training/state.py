"""Everything that an update changes, and how it is stored in a checkpoint and restored."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.distributed import Run
from common.errors import InputError, one_line
from common.training.fsdp import full_tensor
from common.training.method import Method
from common.training.nonfinite import BatchNormStatistics, NonFiniteGuard
from common.training.running_mean import RunningMean


class TrainingState:
    """A method, its optimiser and the counters of a run.

    `step` updates are done, and `epoch` is the one in progress. The data order needs no state: it is a function of the
    seed and the step.

    Args:
        method: on its device.
        optimizer: of the method's parameters. It must skip an update where `found_inf` is 1 (fused AdamW does).
        run: device, rank and number of processes.
        autocast: dtype of autocast, None for full precision. float16 enables the gradient scaler.
        spike_factor: of `NonFiniteGuard`.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        run: Run,
        autocast: torch.dtype | None = None,
        spike_factor: float | None = None,
    ):
        self.method, self.optimizer, self.run, self.autocast = method, optimizer, run, autocast
        # what is called in the forward pass: the method, or DDP around it
        self.model: nn.Module = method
        self.compiled = False
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=autocast is torch.float16)
        self.guard = NonFiniteGuard(run.device, spike_factor, scaled=self.scaler.is_enabled())
        self.batchnorm = BatchNormStatistics(method)
        self.step = self.epoch = self.rollbacks = 0
        self.epoch_means, self.interval_means = RunningMean(), RunningMean()

    def add_means(self, values: dict[str, Tensor], skipped: Tensor) -> None:
        """Add the values of one update to both running means; those of a skipped update do not count."""
        for means in (self.epoch_means, self.interval_means):
            means.add(values, weight=1.0 - skipped)
            means.add({"skipped": skipped})

    def read_interval(self) -> dict[str, float]:
        """Return the means since the last call, and clear them. Waits for the device."""
        means, self.interval_means = self.interval_means.read(), RunningMean()
        return means

    def weight_norm(self) -> float:
        """Return the norm of all trained weights. All ranks must call it.

        Raises:
            InputError: it is not finite, which no update that passed the check should cause.
        """
        norm = full_tensor(nn.utils.get_total_norm([p.detach() for p in self.parameters]))
        if not norm.isfinite():
            saved = "nothing was saved, the same command resumes from the checkpoint before"
            raise InputError(f"the weights are not finite after {self.step} updates; {saved}")
        return float(norm)

    # ------------------------------------------------------------ checkpoint

    def checkpoint_entries(self, within_epoch: bool) -> dict[str, Any]:
        """Return the counters and statistics in plain types: `epoch`, `loop`, and within an epoch `progress`.

        All ranks must call it.
        """
        loop = {"rollbacks": self.rollbacks, "scaler": self.scaler.state_dict(), "guard": self.guard.state()}
        entries = {"epoch": self.epoch, "loop": loop}
        if within_epoch:
            entries["progress"] = {"epoch": self.epoch_means.state(), "recent": self.interval_means.state()}
        return entries

    def load(self, path: Path, content: dict[str, Any], invariants: dict[str, Any]) -> None:
        """Restore the state from the content of a checkpoint.

        Args:
            path: the checkpoint, for messages.
            invariants: values in `args.loop`, or in `args`, that must be those of this run, or the same steps would
                mean other data.

        Raises:
            InputError: the checkpoint is of another run.
        """
        try:
            loop = content["args"]["loop"]
            for name, expected in invariants.items():
                found = loop[name] if name in loop else content["args"][name]
                if found != expected:
                    raise ValueError(f"{name}: found {found}, expected {expected}")
            self.method.load_checkpoint_state(content)
            self._load_optimizer(content["optimizer"])
            self._load_counters(content)
        # a value of another type, as in a checkpoint of another program
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: not a checkpoint of this run ({one_line(error)}); --resume none starts again"
            ) from None

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load the moments, in memory as the weights are, but keep the weight decay and betas of this start."""
        groups = self.optimizer.param_groups
        options = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]
        self.optimizer.load_state_dict(state)
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                # fused AdamW pairs numbers by their place in memory
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    moments[name] = torch.empty_like(parameter).copy_(value)
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group |= own

    def _load_counters(self, content: dict[str, Any]) -> None:
        loop, progress = content["args"]["loop"], content.get("progress")
        self.step, self.rollbacks = _count(content["args"], "step"), _count(loop, "rollbacks")
        # empty unless the run was in fp16
        if loop["scaler"]:
            self.scaler.load_state_dict(loop["scaler"])
        self.guard.load(loop["guard"])
        self.epoch = _count(content, "epoch") + (0 if progress else 1)
        self.epoch_means, self.interval_means = RunningMean(), RunningMean()
        if progress:
            self.epoch_means = RunningMean.from_state(progress["epoch"], self.run)
            self.interval_means = RunningMean.from_state(progress["recent"], self.run)


def _count(content: dict[str, Any], name: str) -> int:
    if type(content[name]) is not int or content[name] < 0:
        raise ValueError(f"{name}: found {one_line(repr(content[name]), 50)}, expected a whole number of at least 0")
    return content[name]
