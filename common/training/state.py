"""A run in memory: everything it consists of, where it stands, and how that goes into a checkpoint and comes back."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from torch import nn
from torch.utils.data import Dataset

from common import checkpoint, distributed
from common.config import to_dict
from common.data.loader import build_loader
from common.data.sampler import StreamSampler, mix
from common.distributed import Run
from common.errors import InputError, one_line
from common.files import lock_folder, naming_errors, save_bytes
from common.runlog import RunLog, print_main
from common.signals import MARKER, Requeue, clear_requeue, mark_requeue
from common.training.checkpointing import SETTINGS, Saver, candidates, read_first, to_resume
from common.training.fsdp import full_copy, full_tensor, meta_copy, shard, shard_loaded_state
from common.training.nonfinite import NonFiniteGuard, RunningStatistics
from common.training.parallel import autocast_dtype, compile_blocks, transformer_blocks, wrap
from common.training.preemption import StopRequests
from common.training.running_mean import RunningMean
from common.training.settings import BatchPlan, LoopSettings
from common.watchdog import Watchdog

Weights = Callable[[int], dict[str, float]]
MAX_ROLLBACKS = 5
LOCK_PATIENCE = 20.0  # seconds for the data workers of a process that was killed to notice, and let its folder go


class TrainingState:
    """`step` updates are done, `epoch` is the one to work on. The data order needs no state: it follows from the
    seed and the step.

    Args:
        dataset: `dataset[(position, index)]` gives one sample, all its randomness drawn from (`dataset.seed`,
            position); `dataset.name(index)`, where there is one, says which file that was.
        learning_rate, weights: functions of the step.
        args: what the checkpoint keeps as `args`, plain types.
        data_fingerprint: plain values that identify the data; a checkpoint with other values is refused on resume.
        make_optimizer: of the method, once its parameters are what they stay (on their device, sharded).
    """

    def __init__(
        self,
        method: nn.Module,
        dataset: Dataset,
        settings: LoopSettings,
        run: Run,
        plan: BatchPlan,
        *,
        learning_rate: Callable[[int], float],
        weights: Weights,
        args: dict[str, Any],
        data_fingerprint: dict[str, Any],
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    ):
        self.method, self.sharded = method.to(run.device), settings.fsdp and run.world_size > 1
        if settings.fsdp and not self.sharded:
            print_main("--fsdp: one process, nothing to share out")
        if self.sharded:
            self.blueprint = meta_copy(self.method)
            shard(self.method, transformer_blocks(self.method), run)
        self.optimizer = make_optimizer(self.method)
        shard_loaded_state(self.optimizer)
        self.dataset, self.settings, self.run, self.plan = dataset, settings, run, plan
        self.learning_rate, self.weights, self.args, self.data_fingerprint = (
            learning_rate,
            weights,
            args,
            data_fingerprint,
        )
        self.out_dir = Path(settings.out_dir)
        self.autocast = autocast_dtype(settings.amp, run.device)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=self.autocast is torch.float16)
        self.guard = NonFiniteGuard(settings, run.device, scaled=self.scaler.is_enabled())
        self.saver, self.watchdog = Saver(self.out_dir, settings.save_minutes), Watchdog(settings.hang_minutes)
        self.statistics = RunningStatistics(self.method)
        self.step, self.epoch, self.rollbacks = 0, 0, 0
        self.epoch_means, self.recent = RunningMean(), RunningMean()
        self.loader = self.batches = self.bar = None
        self.lock = contextlib.ExitStack()

    # ------------------------------------------------------------ begin and end

    def begin(self) -> None:
        """Take up the run where it stands, if the settings say so, and get everything going."""
        paths = []
        self.watchdog.feed()
        if self.run.rank == 0:
            if self.lock.enter_context(lock_folder(self.out_dir, LOCK_PATIENCE)) is None:
                raise InputError(f"{self.out_dir}: another process trains into this folder")
            checkpoint.remove_temporary(self.out_dir)
            paths = to_resume(self.settings)
        found = read_first(paths, self.run)
        if found:
            self.load(*found)
            print_main(f"resuming from {found[0]}: {self.step} updates done")
        if self.settings.compile:
            print_main(f"compiling {compile_blocks(self.method)} transformer blocks")
        self.model = wrap(self.method, self.run, self.plan.accum)
        self.log = RunLog(self.out_dir, self.step, self.epoch, self.rollbacks)
        self.requests = StopRequests(self.run)
        newest = [self.out_dir / name for name in (checkpoint.LAST, checkpoint.PREVIOUS)]
        elsewhere = found and found[0] not in newest
        if elsewhere or (self.settings.on_nan == "rollback" and not found):
            self.save(within=True)  # what to go on from when started again, or to go back to
            self.saver.wait()
        if self.run.rank == 0:
            clear_requeue(self.out_dir)
            save_bytes(self.out_dir / SETTINGS, yaml.safe_dump(to_dict(self.settings), sort_keys=False).encode())

    def close(self) -> None:
        """Whatever happened: nothing is left running or half written."""
        self.watchdog.rest()
        self.loader = self.batches = None  # ends their processes, which ignore the signals that would
        if self.bar is not None:
            self.bar.close()
        if hasattr(self, "requests"):
            self.requests.close()
            self.log.close()
        self.saver.wait()
        self.lock.close()

    def start_epoch(self) -> None:
        """Batches from `step` to the end of `epoch`."""
        if self.loader is None:
            seed, plan = self.data_seed, self.plan
            self.sampler = StreamSampler(
                len(self.dataset), plan.micro_batch, plan.accum, self.run.rank, self.run.world_size, seed
            )
            if self.rollbacks:
                self.dataset.seed = seed
            self.loader = build_loader(self.dataset, self.sampler, self.settings.workers, self.run.device)
        self.sampler.start, self.sampler.stop = self.step, (self.epoch + 1) * self.plan.steps_per_epoch
        self.batches = iter(self.loader)

    def full_method(self) -> nn.Module:
        """The method, as a module that each rank may run for itself. All ranks must call it."""
        return full_copy(self.method, self.blueprint) if self.sharded else self.method

    @property
    def data_seed(self) -> int:
        """Another one after each rollback: another order, other crops, other masks."""
        return mix(self.settings.seed, self.rollbacks) if self.rollbacks else self.settings.seed

    # ------------------------------------------------------------ within an epoch

    def log_interval(self, step: int, lr: float) -> dict[str, float]:
        """Log the means since the last call; tell what was skipped, and act on it. The one place where the host
        waits for the device."""
        means, self.recent = self.recent.read(), RunningMean()
        means["weight_norm"] = self.weight_norm()
        scheduled = self.method.schedule_values(step) if hasattr(self.method, "schedule_values") else {}
        self.log.scalars({f"train/{name}": v for name, v in means.items()} | {"lr": lr} | scheduled, step)
        self.guard.report(step, self.dataset, self.sampler, self.log, self.rollbacks)
        return means

    def weight_norm(self) -> float:
        """Of all trained weights; InputError if it is not finite, which no update that was judged good should do."""
        parameters = [p.detach() for group in self.optimizer.param_groups for p in group["params"]]
        norm = full_tensor(nn.utils.get_total_norm(parameters))
        if not norm.isfinite():
            raise InputError(
                f"the weights are not finite after {self.step} updates; nothing was saved, --resume goes on from before"
            )
        return float(norm)

    def save_or_stop(self) -> None:
        """After an update: save if it is time to, and if some rank was asked to stop, save and raise Requeue."""
        stop, save = self.requests.agree(save=self.run.rank == 0 and self.saver.due())
        if stop:
            self.stop()
        at_end = self.step == (self.epoch + 1) * self.plan.steps_per_epoch
        if save and not at_end and not self.guard.in_a_row:  # after a validation, or its points would come twice
            self.save(within=True)

    def stop(self) -> NoReturn:
        """Save, and raise Requeue; all ranks call it after the same update."""
        self.save(within=True)
        self.saver.wait()
        if self.run.rank == 0:
            with naming_errors(self.out_dir / MARKER):
                mark_requeue(self.out_dir, self.step)
        print_main(f"asked to stop: saved after {self.step} updates; start the same command again to go on")
        distributed.barrier()  # a launcher may end the others as soon as one has ended
        raise Requeue(agreed=True)

    # ------------------------------------------------------------ checkpoints

    def save(self, within: bool) -> None:
        """Have `checkpoint-last.pth` written, and the numbered one after its epoch. `within` an epoch: with the running
        means.

        All ranks must call it.
        """
        self.weight_norm()
        args = self.args | {"step": self.step, "loop": self._invariants() | self._loop_state()}
        content = {"epoch": self.epoch, "args": args}
        if within:
            content["progress"] = {"epoch": self.epoch_means.state(), "recent": self.recent.state()}
        if self.run.rank == 0:
            self.log.flush()  # before the checkpoint: what it says is done is in the logs
        if self.run.rank == 0 or self.sharded:
            content |= self.method.checkpoint_state() | {"optimizer": self.optimizer.state_dict()}
            numbered = not within and (
                (self.epoch + 1) % self.settings.save_every == 0 or self.epoch + 1 == self.settings.epochs
            )
            name = f"checkpoint-{self.epoch}.pth" if numbered else None
            self.saver.save(content, keep=name, write=self.run.rank == 0)

    def load(self, path: Path, content: dict[str, Any]) -> None:
        """Become what `content` holds. InputError where it is not of this run."""
        try:
            self.method.load_checkpoint_state(content)
            groups = self.optimizer.param_groups
            options = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
            self.optimizer.load_state_dict(content["optimizer"])
            for group, own in zip(self.optimizer.param_groups, options, strict=True):
                group |= own  # weight decay and betas as this start says
            self.step, loop, progress = content["args"]["step"], content["args"]["loop"], content.get("progress")
            for name, here in self._invariants().items():
                if loop[name] != here:
                    raise ValueError(f"its {name} is {loop[name]}, this run's is {here}")
            self.rollbacks = loop["rollbacks"]
            if loop["scaler"]:  # empty unless it was fp16
                self.scaler.load_state_dict(loop["scaler"])
            self.guard.load(loop["guard"])
            self.epoch = content["epoch"] + (0 if progress else 1)
            self.epoch_means, self.recent = (
                RunningMean.from_state(progress[kind], self.run.rank, self.run.world_size, self.run.device)
                if progress
                else RunningMean()
                for kind in ("epoch", "recent")
            )
        except (KeyError, RuntimeError, ValueError) as error:
            reason = one_line(error)
            raise InputError(f"{path}: not a checkpoint of this run ({reason}); --resume none starts anew") from None

    def _invariants(self) -> dict[str, int]:
        """What must not change between a run's parts, or the same steps would mean other data."""
        return {
            "seed": self.settings.seed,
            "batch": self.plan.batch,
            "steps_per_epoch": self.plan.steps_per_epoch,
            "num_samples": len(self.dataset),
            **self.data_fingerprint,
        }

    def _loop_state(self) -> dict[str, Any]:
        return {"rollbacks": self.rollbacks, "scaler": self.scaler.state_dict(), "guard": self.guard.state()}

    def rollback(self, reason: str) -> None:
        """To the last good checkpoint, with other data from there on."""
        rollbacks = self.rollbacks + 1
        if rollbacks > MAX_ROLLBACKS:
            raise InputError(
                f"{reason}, after {MAX_ROLLBACKS} rollbacks: stopped; the files are in {self.log.anomalies}"
            )
        self.saver.wait()
        self.log.close()
        distributed.barrier()  # rank 0 has written
        path, content = read_first(candidates(self.out_dir), self.run)
        self.load(path, content)
        self.rollbacks, self.loader, self.batches = rollbacks, None, None
        self.log = RunLog(self.out_dir, self.step, self.epoch, self.rollbacks)
        print_main(f"{reason}: went back to {path} ({self.step} updates done), other data from here on")
