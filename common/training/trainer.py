"""A training run from its start or its checkpoint to its last epoch: data, logs, checkpoints, signals, rollbacks."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from torch.utils.data import Dataset
from tqdm import tqdm

from common import checkpoint, distributed
from common.config import to_dict
from common.data.loader import Loading, build_loader, check_limits, device_batches, end_workers, micro_batches
from common.data.sampler import StreamSampler, mix
from common.distributed import Run
from common.environment import code_version
from common.errors import InputError
from common.files import lock_folder, naming_errors, remove_temporary, save_bytes
from common.resources import duration
from common.runlog import RunLog, print_main, progress
from common.signals import MARKER, Requeue, remove_requeue_marker, write_requeue_marker
from common.training import checkpointing
from common.training.fsdp import full_copy, meta_copy, shard, shard_loaded_state
from common.training.loop import LossWeights, Schedule, UpdateRule, accumulate_gradients, train_one_epoch
from common.training.method import Batch, Method
from common.training.microbatch import with_largest_micro_batch
from common.training.nonfinite import BadUpdateReporter, RollbackRequested
from common.training.parallel import autocast_dtype, compile_blocks, set_cuda_options, transformer_blocks, wrap
from common.training.preemption import Stopped, StopRequests
from common.training.record import write_record
from common.training.settings import BatchPlan, LoopSettings
from common.training.speed import Speed
from common.training.state import TrainingState
from common.training.summary import peak_text
from common.training.waiting import Waiting
from common.watchdog import Watchdog

AfterEpoch = Callable[[int, RunLog, Method], dict[str, float]]
MAX_ROLLBACKS = 5
# seconds in which data loading processes of a killed run notice that and release the lock of its folder
LOCK_TIMEOUT = 20.0


class Trainer:
    """Trains a method as `settings` say. `fit` does everything; `state` can be inspected after it.

    Args:
        method: on any device; it is moved to that of `run`, and sharded with `--fsdp`.
        dataset: `dataset[(position, index)]` returns a sample whose randomness is drawn from (`dataset.seed`,
            position); `dataset.name(index)` returns the name of its volume.
        loading: how batches are loaded, where the loading processes do not read whole samples of `dataset`. It gives
            the same batches and draws its randomness from `dataset.seed` too.
        settings: those of the program, also written to settings.yaml.
        learning_rate, loss_weights: functions of the step.
        make_optimizer: called with the method when its parameters are final (on their device, sharded).
        args: what the checkpoint stores as `args`, in plain types.
        about: what run.json holds about the run besides its settings, in plain types.
        data_fingerprint: plain values that identify the data. A checkpoint with other values is refused on resume.
        order_seed: seed of the data order, crops and masks; None: that of the settings.
        after_epoch: called on every rank after each epoch with its number, the log and the method (a copy with full
            weights under `--fsdp`), for validation and pictures. What it returns is added to the epoch's log line. A
            resumed run may call it again for the same epoch. It should pass long loops through `until_stopped`.
    """

    def __init__(
        self,
        method: Method,
        dataset: Dataset,
        settings: LoopSettings,
        run: Run,
        plan: BatchPlan,
        *,
        learning_rate: Schedule,
        loss_weights: LossWeights,
        make_optimizer: Callable[[Method], torch.optim.Optimizer],
        args: dict[str, Any],
        about: dict[str, Any] | None = None,
        data_fingerprint: dict[str, Any],
        loading: Loading | None = None,
        order_seed: int | None = None,
        after_epoch: AfterEpoch = lambda epoch, log, method: {},
    ):
        self.method, self.dataset, self.settings, self.run, self.plan = method, dataset, settings, run, plan
        self.loading = loading or Loading(dataset)
        self.learning_rate, self.loss_weights, self.after_epoch = learning_rate, loss_weights, after_epoch
        self.args, self.about, self.out_dir = args, about or {}, Path(settings.out_dir)
        self.order_seed = settings.seed if order_seed is None else order_seed
        # equal in all parts of a run, or the same steps would mean other data
        seeds = settings.seed if self.order_seed == settings.seed else [settings.seed, self.order_seed]
        self.invariants = {"seed": seeds, "batch": plan.batch, "steps_per_epoch": plan.steps_per_epoch}
        self.invariants |= {"num_samples": len(dataset)} | data_fingerprint
        self.code = code_version()
        self.state = self._make_state(make_optimizer)
        self.writer = checkpointing.CheckpointWriter(self.out_dir, settings.checkpoints.save_minutes)
        self.watchdog = Watchdog(settings.hang_minutes)
        self.reporter = BadUpdateReporter(self.out_dir, settings.nonfinite, dataset)
        self.log: RunLog | None = None
        self.requests: StopRequests | None = None
        self.bar: tqdm | None = None
        self.speed = Speed()
        # means of the last epoch, for `after_epoch`
        self.means: dict[str, float] = {}
        self._loader, self._stream = None, None
        self._lock = contextlib.ExitStack()

    def _make_state(self, make_optimizer: Callable[[Method], torch.optim.Optimizer]) -> TrainingState:
        precision, method = self.settings.precision, self.method.to(self.run.device)
        set_cuda_options(precision)
        if precision.channels_last:
            method.to(memory_format=torch.channels_last_3d)
        self.unsharded = None
        if precision.fsdp and self.run.world_size == 1:
            print_main("--fsdp: has no effect on one process")
        elif precision.fsdp:
            self.unsharded = meta_copy(method)
            shard(method, transformer_blocks(method), self.run)
        optimizer = make_optimizer(method)
        shard_loaded_state(optimizer)
        dtype = autocast_dtype(precision.amp, self.run.device)
        return TrainingState(method, optimizer, self.run, dtype, self.settings.nonfinite.spike_factor)

    # ------------------------------------------------------------ the run

    def fit(self) -> Path:
        """Train to the last epoch, resuming if the settings ask for it, and return the path of the last checkpoint.

        Raises:
            SystemExit: with code 75, when SIGTERM or SIGUSR1 asked the run to stop, after saving (common/signals.py).
            InputError: a checkpoint, the folder or the data cannot be used, or training diverged.
        """
        try:
            self._begin()
            while self.state.epoch < self.settings.epochs:
                try:
                    self._run_epoch()
                except RollbackRequested as reason:
                    self._roll_back(str(reason))
            self.writer.wait()
            # after it every rank may read the checkpoint
            distributed.barrier()
        finally:
            self._close()
        return self.writer.last

    def dry_run(self) -> None:
        """Make the first passes, print the losses, time and memory and about how long the run takes (`--dry_run`).

        Gradients are forgotten. The time of the run is that of the second pass, as the first one starts the workers and
        may compile blocks. Nothing is written, and a checkpoint in the folder is not read.

        Raises:
            InputError: the data cannot be used, or the loss is not finite.
        """
        try:
            self._choose_micro_batch()
            if self.settings.precision.compile:
                print_main(f"compiling {compile_blocks(self.method)} transformer blocks")
            self.state.model = wrap(self.method, self.run, self.plan.accum).train()
            batches, began = self._batches(), time.perf_counter()
            rule = UpdateRule(self.learning_rate, self.loss_weights, seed=self.data_seed)
            loss, values = accumulate_gradients(self.state, batches, 0, rule)
            losses = {name: float(values[name]) for name in self.loss_weights(0) if name in values}
            shown = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            if not loss.isfinite():
                raise InputError(f"--dry_run: found a loss that is not finite ({shown})")
            seconds = time.perf_counter() - began
            estimate = self._estimate(batches, rule)
            print_main(
                f"dry run: {shown}\n"
                f"  first pass of {self.plan.micro_batch} volume(s), with loading and warm-up: {seconds:.2f} s; "
                f"{self.plan.accum} passes make an update\n"
                f"{estimate}"
                f"  peak memory {peak_text(self.run.device)}; the moments of AdamW are not in it yet\n"
                f"  nothing was written to {self.out_dir}"
            )
        finally:
            self._close()

    def _estimate(self, batches: Iterator[Batch], rule: UpdateRule) -> str:
        """Make a pass and return a line with its time and that of the run; "" for a run of a single pass."""
        updates, passes = self.plan.total_steps, self.plan.accum
        if updates * passes < 2:
            return ""
        began = time.perf_counter()
        loss, _ = accumulate_gradients(self.state, batches, 0, rule)
        # the time is that of the pass, and not of its launch; only with --dry_run
        loss.item()
        seconds = time.perf_counter() - began
        run = f"about {duration(seconds * passes * updates)} for {updates:,} updates at this pace"
        return f"  second pass: {seconds:.2f} s; {run}, without validation and the steps of AdamW\n"

    def _begin(self) -> None:
        self.watchdog.reset()
        paths = []
        if self.run.rank == 0:
            if self._lock.enter_context(lock_folder(self.out_dir, LOCK_TIMEOUT)) is None:
                raise InputError(f"{self.out_dir}: another process is already training in this folder")
            remove_temporary(self.out_dir)
            paths = checkpointing.checkpoints_to_resume(self.out_dir, self.settings.checkpoints.resume)
        found = checkpointing.load_first_intact(paths, self.run)
        if found:
            self.state.load(*found, self.invariants)
            print_main(f"resuming from {found[0]}: {self.state.step} updates done")
        self._choose_micro_batch(found[1]["args"].get("micro_batch") if found else None)
        if self.settings.precision.compile:
            self.state.compiled = True
            print_main(f"compiling {compile_blocks(self.method)} transformer blocks")
        self.state.model = wrap(self.method, self.run, self.plan.accum)
        self.log = self._open_log()
        self.requests = StopRequests(self.run)
        self._save_start(found[0] if found else None)
        if self.run.rank == 0:
            remove_requeue_marker(self.out_dir)
            recorded = yaml.safe_dump(to_dict(self.settings), sort_keys=False)
            save_bytes(self.out_dir / checkpointing.SETTINGS, recorded.encode())
            write_record(self.settings, self.run, self.plan, self.method, self.about)

    def _choose_micro_batch(self, recorded: int | None = None) -> None:
        if self.settings.micro_batch_size == "auto":
            weights = self.loss_weights(self.state.step)
            self.plan = with_largest_micro_batch(self.plan, self.state, self.loading, weights, recorded)

    def _open_log(self) -> RunLog:
        return RunLog(self.out_dir, self.state.step, self.state.epoch, self.state.rollbacks)

    def _save_start(self, source: Path | None) -> None:
        """Save the starting point of a run that could not return to it otherwise: one started from a file, or one that
        may be rolled back."""
        newest = [self.out_dir / name for name in (checkpoint.LAST, checkpoint.PREVIOUS)]
        may_roll_back = self.settings.nonfinite.on_nan == "rollback"
        if source not in newest if source else may_roll_back:
            self.save(within_epoch=True)
            self.writer.wait()

    def _close(self) -> None:
        """Leave nothing running or half written, whatever happened."""
        self.watchdog.stop()
        end_workers(self._loader)
        self._loader, self._stream = None, None
        if self.bar is not None:
            self.bar.close()
        if self.requests is not None:
            self.requests.close()
            self.log.close()
        self.writer.wait()
        self._lock.close()

    # ------------------------------------------------------------ one epoch

    def _run_epoch(self) -> None:
        """Make the remaining updates of the epoch, validate, log and save it. When a stop is requested during the
        validation, the state is saved as it was before."""
        state, plan, began = self.state, self.plan, time.time()
        first, last = state.epoch * plan.steps_per_epoch, (state.epoch + 1) * plan.steps_per_epoch
        clip_grad, title = self.settings.optim.clip_grad, f"epoch {state.epoch + 1}/{self.settings.epochs}"
        rule = UpdateRule(self.learning_rate, self.loss_weights, plan.accum, clip_grad, self.data_seed)
        self.bar = progress(total=last - first, initial=state.step - first, desc=title, unit="update")
        self.watchdog.reset()
        self.speed.start(state.step)
        batches, updates = Waiting(self._batches()), last - state.step
        train_one_epoch(state, batches, last, rule, first_step=first, after_update=self._after_update)
        self.bar.close()
        means = self.means = state.epoch_means.read()
        speed = batches.speed(updates * plan.batch)
        self._check_progress(means)
        means = means | self._validate()
        # less than an epoch's time when it was resumed
        seconds = round(time.time() - began, 1)
        lr = self.learning_rate(last - 1)
        self.log.add_epoch({"epoch": state.epoch, "step": state.step, "lr": lr, "seconds": seconds} | speed | means)
        self.save(within_epoch=False)
        state.epoch += 1
        state.epoch_means.clear()

    @property
    def data_seed(self) -> int:
        """Seed of the data order, crops and masks; another one after each rollback."""
        rollbacks = self.state.rollbacks
        return mix(self.order_seed, rollbacks) if rollbacks else self.order_seed

    def _batches(self) -> Iterator[Batch]:
        """Return the micro-batches of this rank from `state.step` on.

        There is one iterator for all epochs, so that the next epoch is loaded while this one is validated and saved.
        """
        if self._stream is None:
            plan, run, seed, workers = self.plan, self.run, self.data_seed, self.settings.workers
            shape = plan.micro_batch, plan.accum, run.rank, run.world_size
            self.sampler = StreamSampler(len(self.dataset), *shape, seed)
            if self.state.rollbacks:
                self.dataset.seed = seed
            self.sampler.start, self.sampler.stop = self.state.step, plan.total_steps
            check_limits(self.loading, self.sampler, workers)
            self._loader = build_loader(self.loading, self.sampler, workers, run.device)
            batches = micro_batches(self._loader, self.loading, plan.micro_batch)
            self._stream = device_batches(batches, self.loading.prepare, run.device)
        return self._stream

    def _after_update(self, lr: float) -> None:
        """Log when it is time to, then save or stop when some rank asks for it."""
        self.watchdog.reset()
        self.bar.update()
        step = self.state.step
        at_end = step == (self.state.epoch + 1) * self.plan.steps_per_epoch
        if step % self.settings.log_every == 0 or at_end:
            self._log_interval(step - 1, lr)
        self.save_or_stop(at_end)

    def _log_interval(self, step: int, lr: float) -> None:
        """Log the means since the last call and report bad updates. The one place where the host waits for the
        device."""
        means = self.state.read_interval()
        means["weight_norm"] = self.state.weight_norm()
        scalars = {f"train/{name}": value for name, value in means.items()}
        self.log.add_scalars(scalars | {"lr": lr} | self.method.schedule_values(step), step)
        shown = {name: f"{means[name]:.3f}" for name in self.loss_weights(step) if name in means}
        self.bar.set_postfix(shown | self._measure_speed(), refresh=False)
        self.reporter.report(self.state.guard, step, self.sampler, self.log, self.state.rollbacks)

    def _measure_speed(self) -> dict[str, str]:
        """Return the speed since the last log entry for the progress bar; once, print how long the run will take."""
        seconds, left = self.speed.seconds_per_update(self.state.step), self.plan.total_steps - self.state.step
        if self.speed.has_first_estimate and seconds * left >= 60:
            rest = f"{left:,} updates in about {duration(seconds * left)}, without validation and pictures"
            print_main(f"{seconds:.3g} s per update: the other {rest}; peak memory {peak_text(self.run.device)}")
        return {"volumes/s": f"{self.plan.batch / seconds:.3g}"}

    def _check_progress(self, means: dict[str, float]) -> None:
        """Print how many updates were skipped. Stop when all were, before the checkpoint on disk is replaced; a run
        that may roll back has its own limit (`nan_row`)."""
        # fp16 finds its scale by overflowing
        calibrating = self.state.scaler.is_enabled() and self.state.scaler.get_scale() >= 1.0
        number = self.state.epoch + 1
        if means["skipped"] == 1.0 and not calibrating and self.settings.nonfinite.on_nan != "rollback":
            last = self.writer.last
            kept = f"{last} is from before" if last.exists() else "nothing was saved"
            raise InputError(f"epoch {number}: no update had a finite gradient, stopped; {kept}")
        if means["skipped"] > 0.0:
            print_main(f"epoch {number}: {means['skipped']:.1%} of the updates were skipped")

    def _validate(self) -> dict[str, float]:
        self.watchdog.reset()
        # gathered on every rank, whether or not it has something to do
        method = full_copy(self.method, self.unsharded) if self.unsharded is not None else self.method
        try:
            return self.after_epoch(self.state.epoch, self.log, method)
        except Stopped:
            self._stop()
        finally:
            self.watchdog.reset()

    # ------------------------------------------------------------ save, stop, roll back

    def save_or_stop(self, at_end: bool) -> None:
        """Save if it is time to. If some rank was asked to stop, save and raise Requeue.

        At the end of an epoch it is saved after the validation, or the points in the log would come twice.
        """
        stop, save = self.requests.agree(save=self.run.rank == 0 and self.writer.due())
        if stop:
            self._stop()
        if save and not at_end and not self.state.guard.in_a_row:
            self.save(within_epoch=True)

    def _stop(self) -> NoReturn:
        """Save and raise Requeue. All ranks call it after the same update."""
        self.save(within_epoch=True)
        self.writer.wait()
        if self.run.rank == 0:
            with naming_errors(self.out_dir / MARKER):
                write_requeue_marker(self.out_dir, self.state.step)
        print_main(f"stopped by a signal: saved after {self.state.step} updates; the same command continues the run")
        # a launcher may end the other ranks as soon as one has ended
        distributed.barrier()
        raise Requeue(agreed=True)

    def save(self, within_epoch: bool) -> None:
        """Start to write `checkpoint-last.pth`, and the numbered one after its epoch. All ranks must call it."""
        state = self.state
        state.weight_norm()
        content = state.checkpoint_entries(within_epoch)
        content["args"] = self.args | {"step": state.step, "loop": self.invariants | content.pop("loop")}
        content["args"] |= {"micro_batch": self.plan.micro_batch, "code_version": self.code}
        if self.run.rank == 0:
            # before the checkpoint, so that the logs hold everything that it counts as done
            self.log.flush()
        if self.run.rank == 0 or self.unsharded is not None:
            content |= self.method.checkpoint_state() | {"optimizer": state.optimizer.state_dict()}
            numbered = not within_epoch and self.settings.is_due(state.epoch, self.settings.checkpoints.save_every)
            name = f"checkpoint-{state.epoch}.pth" if numbered else None
            self.writer.save(content, keep=name, write=self.run.rank == 0)

    def _roll_back(self, reason: str) -> None:
        """Return to the last good checkpoint, and continue from there with other data."""
        rollbacks = self.state.rollbacks + 1
        if rollbacks > MAX_ROLLBACKS:
            files = self.log.skipped_path
            raise InputError(f"{reason}, after {MAX_ROLLBACKS} rollbacks: stopped; their files are in {files}")
        self.writer.wait()
        self.log.close()
        # rank 0 has written
        distributed.barrier()
        paths = checkpointing.existing_checkpoints(self.out_dir)
        path, content = checkpointing.load_first_intact(paths, self.run)
        self.state.load(path, content, self.invariants)
        end_workers(self._loader)
        self.state.rollbacks, self._loader, self._stream = rollbacks, None, None
        self.log = self._open_log()
        print_main(f"{reason}: returned to {path} ({self.state.step} updates done), other data from here on")
