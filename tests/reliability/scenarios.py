"""Fault-injection trials: what is done to a run, and what the run must do then."""

import os
import random
import resource
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from common import checkpoint, signals
from common.heartbeat import EXIT_RANK_DIED
from common.signals import EXIT_REQUEUE
from Finetune.presets import load_preset
from tests.Finetune.made import make_dataset
from tests.helpers import read_log, write_scans
from tests.reliability.difference import difference
from tests.reliability.processes import Inject, Job

COMMON = (
    "--batch_size 4 --warmup_epochs 1 --save_every 2 --log_every 3 --lr 1e-3 --save_minutes 0 --epochs 3 "
    "--samples_per_epoch 16 --workers 0 --device cpu"
).split()
VIT = "--embed_dim 24 --num_heads 2 --depth 2"
DECODER = "--decoder_embed_dim 24 --decoder_depth 1 --decoder_num_heads 2"
GLMAE = (
    f"--method glmae --model tiny --patch_size 8 --global_size 32 --local_size 16 --global_views 2 --local_views 2 "
    f"--hidden_dim 32 --bottleneck_dim 8 --out_dim 16 --freeze_last_layer 1 {VIT} {DECODER}"
)
MIM = (
    f"--method mim --model tiny --num_heads 2 --embed_dims 6 6 12 24 --depths 1 1 1 1 --local_size 32 --num_mid 2 "
    f"--num_down 1 {DECODER}"
)
FINETUNE = (
    f"--preset MSD09_Spleen --model unetr --patch_size 16 --roi 32 --feature_size 4 --crops 1 --drop_path 0.2 "
    f"--validate_every 1 {VIT} --depth 4 --micro_batch_size 2"
)
ACCUMULATED = f"{GLMAE} --micro_batch_size 1"

# name -> (program, flags, ranks)
RUNS = {
    "GL-MAE": ("pretrain", GLMAE, 1),
    "GL-MAE, accumulated": ("pretrain", ACCUMULATED, 1),
    "GL-MAE, 2 ranks": ("pretrain", GLMAE, 2),
    "GL-MAE, 2 ranks, accumulated": ("pretrain", ACCUMULATED, 2),
    "MiM": ("pretrain", MIM, 1),
    "MiM, 2 ranks": ("pretrain", MIM, 2),
    "fine-tuning": ("finetune", FINETUNE, 1),
    "fine-tuning, 2 ranks": ("finetune", FINETUNE, 2),
}
RUNS |= {f"{name}, sharded": (run[0], f"{run[1]} --fsdp", 2) for name, run in RUNS.items() if run[2] == 2}
# Drop path is drawn per rank, so runs that change the number of ranks do without.
RUNS |= {
    f"{name}, no drop path": (run[0], f"{run[1]} --drop_path 0", run[2])
    for name, run in RUNS.items()
    if run[0] == "finetune"
}
STEPS = 12


@dataclass
class Bench:
    """A folder with data, a cache and one undisturbed run per name, and how long each of those took."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def job(self, name: str, out_dir: Path, *more: str, inject: Inject | None = None) -> Job:
        """Start a run of RUNS with additional flags."""
        program, flags, ranks = RUNS[name]
        data = ["--datalist", self.folder / "scans"] if program == "pretrain" else ["--data", self.folder / "spleen"]
        argv = [*data, "--cache_dir", self.folder / "cache", *flags.split(), *COMMON, *more]
        return Job(program, list(map(str, argv)), out_dir, ranks, inject)

    def reference(self, name: str) -> Path:
        """Return the folder of the undisturbed run."""
        return self.folder / "undisturbed" / name.replace(" ", "_").replace(",", "")


def prepare(bench: Bench, names: set[str]) -> None:
    """Write scans, and make one undisturbed run per name, which also fills the cache."""
    write_scans(bench.folder / "scans")
    make_dataset(load_preset("MSD09_Spleen"), bench.folder / "spleen")
    for name in sorted(names):
        began = time.monotonic()
        check_exit(bench.job(name, bench.reference(name)), 0)
        bench.seconds[name] = time.monotonic() - began
        print(f"undisturbed {name}: {bench.seconds[name]:.1f} s", flush=True)


def check_exit(job: Job, *codes: int) -> None:
    """Wait for a job, and raise AssertionError if a rank ends with another exit code."""
    found = job.wait()
    if not set(found) <= set(codes):
        raise AssertionError(f"exit codes {found}, expected {codes}:\n{job.output()[-3000:]}")


def resume(bench: Bench, name: str, out: Path, *more: str) -> None:
    """Start the run again, and check that it ends as the undisturbed run."""
    check_exit(bench.job(name, out, *more), 0)
    found = difference(out, bench.reference(name))
    assert not found, found
    left = [p.name for p in out.glob(".*") if p.name != ".lock"]
    assert not left, left


def updates_done(out: Path) -> int:
    """Return the number of updates in the last checkpoint, 0 if there is none."""
    try:
        return checkpoint.load(out / checkpoint.LAST)["args"]["step"]
    except ValueError:
        return 0


# ---------------------------------------------------------------- faults


def killed(bench: Bench, out: Path, number: int, name: str, *more: str) -> str:
    """SIGKILL to all ranks at a random moment: after a random number of updates, or during the start."""
    rng, job = random.Random(number), bench.job(name, out, *more)
    updates = rng.randrange(STEPS)
    while updates_done(out) < updates and not job.poll():
        time.sleep(0.02)
    time.sleep(rng.uniform(0.0, 0.1 if updates else 1.0) * bench.seconds[name])
    job.signal(signal.SIGKILL)
    job.wait()
    saved = updates_done(out)
    resume(bench, name, out, *more)
    return f"{saved} saved"


def signalled(bench: Bench, out: Path, number: int, name: str, *more: str) -> str:
    """SIGTERM or SIGUSR1 to one rank after a random update, and again in the resumed run."""
    rng, saved = random.Random(number), []
    for latest in (4, STEPS - 3):
        at, target = rng.randint(updates_done(out), latest), rng.choice([signal.SIGTERM, signal.SIGUSR1])
        check_exit(bench.job(name, out, *more, inject=partial(signal_at_update, at, target)), EXIT_REQUEUE)
        saved.append(updates_done(out))
        # Several ranks agree one update later.
        assert at + 1 <= saved[-1] <= at + 2 and (out / "requeue").exists(), (at, saved)
    resume(bench, name, out, *more)
    assert not (out / "requeue").exists()
    return f"exit code 75, {saved[0]} and {saved[1]} saved"


def signal_at_update(at: int, number: int, rank: int) -> None:
    """Make the last rank signal itself during update `at`, 0-based."""
    from common.training.trainer import Trainer

    inner, world = Trainer.save_or_stop, int(os.environ.get("WORLD_SIZE", "1"))

    def save_or_stop(self, at_end):
        if self.state.step == at + 1 and rank == world - 1:
            stop_own_group(number)
        inner(self, at_end)

    Trainer.save_or_stop = save_or_stop


def stop_own_group(number: int) -> None:
    """Signal this training process and its workers, and wait until it is recorded: the kernel may give the signal to
    another thread, and Python then calls the handler later."""
    os.killpg(os.getpid(), number)
    while not signals.stop_requested():
        time.sleep(0.001)


def within_save(number: int, at_save: int, rank: int) -> None:
    """Send a signal while checkpoint number `at_save` is written: half of it is on disk, and nothing is renamed yet."""
    real, calls = torch.save, []

    def save(content, file):
        real(content, file)
        calls.append(1)
        if len(calls) == at_save:
            file.flush()
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), number)
            time.sleep(0.3)
            file.seek(0)
            real(content, file)
            file.truncate()

    torch.save = save


def stopped_while_saving(bench: Bench, out: Path, number: int, name: str, sign: int) -> str:
    """SIGTERM or SIGKILL while a checkpoint is written."""
    job = bench.job(name, out, inject=partial(within_save, sign, 3 + number % 4))
    check_exit(job, EXIT_REQUEUE if sign == signal.SIGTERM else -signal.SIGKILL)
    if sign == signal.SIGKILL:
        assert list(out.glob(".checkpoint-*.tmp")), "no checkpoint was being written"
    checkpoint.load(out / checkpoint.LAST)
    resume(bench, name, out)
    return "exit code 75" if sign == signal.SIGTERM else ""


def damaged(bench: Bench, out: Path, number: int, name: str, damage: str) -> str:
    """Stop the run, then truncate checkpoint-last.pth at a random byte or flip a random bit of a weight."""
    rng = random.Random(number)
    stop = partial(signal_at_update, 5 + rng.randrange(4), signal.SIGTERM)
    check_exit(bench.job(name, out, inject=stop), EXIT_REQUEUE)
    last = out / checkpoint.LAST
    data = bytearray(last.read_bytes())
    if damage == "truncated":
        data = data[: rng.randrange(len(data))]
    else:
        weights = max(tensors(checkpoint.load(last)), key=torch.Tensor.numel).numpy().tobytes()
        data[data.index(weights) + rng.randrange(len(weights))] ^= 1 << rng.randrange(8)
    # The file may have a second name, which must keep its content.
    last.unlink()
    last.write_bytes(data)
    job = bench.job(name, out)
    check_exit(job, 0)
    assert "warning: " in job.output() and "checkpoint-last.pth: " in job.output(), job.output()[-2000:]
    found = difference(out, bench.reference(name))
    assert not found, found
    return "refused, previous taken"


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def full_disk(bench: Bench, out: Path, number: int, name: str) -> str:
    """A tmpfs is full when a checkpoint is written. Without permission to mount, use `size_limit` instead."""
    out.mkdir()
    size = (bench.reference(name) / checkpoint.LAST).stat().st_size
    # Room for last, previous, half of the next, and the logs; a complete run needs 4 checkpoints.
    small = size * 5 // 2 + 100_000 * (1 + number % 2)
    if not mount(out, small):
        return "no permission to mount a tmpfs; " + size_limit(bench, out, number, name)
    try:
        job = bench.job(name, out)
        check_exit(job, 2)
        assert "cannot be written" in job.output() or "No space" in job.output(), job.output()[-2000:]
        assert updates_done(out) > 0
        subprocess.run(["mount", "-o", f"remount,size={100 * size}", str(out)], check=True)
        resume(bench, name, out)
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)
    return "exit code 2 with the reason"


def size_limit(bench: Bench, out: Path, number: int, name: str) -> str:
    """RLIMIT_FSIZE makes writing fail halfway through a checkpoint."""
    size = (bench.reference(name) / checkpoint.LAST).stat().st_size
    job = bench.job(name, out, inject=lambda rank: limit_after_saves(3 + number % 5, size // 2))
    check_exit(job, 2)
    assert "cannot be written" in job.output() and updates_done(out) > 0
    resume(bench, name, out)
    return "exit code 2 with the reason"


def limit_after_saves(count: int, size: int) -> None:
    real, calls = torch.save, []

    def save(content, file):
        calls.append(1)
        if len(calls) > count:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        real(content, file)

    torch.save = save


def mount(folder: Path, size: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def other_ranks(bench: Bench, out: Path, number: int, first: str, then: str) -> str:
    """Stop on one number of ranks and resume on another. Each update has the same samples, but gradients are summed in
    another order."""
    check_exit(bench.job(first, out, inject=partial(signal_at_update, 2 + number % 6, signal.SIGTERM)), EXIT_REQUEUE)
    check_exit(bench.job(then, out), 0)
    worst = 0.0
    for a, b in zip(read_log(out), read_log(bench.reference(first)), strict=True):
        terms = [k for k in b if k.startswith(("rec_", "global_", "dice", "ce", "grad_norm"))]
        worst = max([worst, *(abs(a[k] - b[k]) / max(1.0, abs(b[k])) for k in terms)])
    assert worst < 1e-4, worst
    return "losses within 1e-4 (sums round differently)"


def dead_rank(bench: Bench, out: Path, number: int, name: str, where: str, how: str, hangs: bool = False) -> str:
    """One of two ranks is killed or raises an exception while the other waits for it in a collective call.

    On gloo that call fails. With `hangs` it does not return, as on NCCL. The other rank must end either way, and the
    saved checkpoint must be complete.

    Args:
        where: "update", "validation" or "cache", what the rank is doing.
        how: "kill" or "raise".
    """
    dies = number % 2 if where == "update" else 0
    # The cache of the other trials is complete already.
    more = ("--cache_dir", str(out / "cache")) if where == "cache" else ()
    job = bench.job(name, out, "--save_minutes", "none", *more, inject=partial(die_in, where, how, dies, hangs))
    codes, printed = job.wait(), job.output(1 - dies)
    message = "died: RuntimeError: a fault" if how == "raise" else "died without a message"
    repeated = f"error: rank {dies} {message}" in printed
    assert codes[dies] == (1 if how == "raise" else -signal.SIGKILL), (codes, job.output(dies)[-2000:])
    assert repeated or (not hangs and "by peer" in printed), (codes, printed[-2000:])
    assert codes[1 - dies] == (EXIT_RANK_DIED if repeated else 1), (codes, printed[-2000:])
    assert updates_done(out) == (STEPS // 3 if where == "update" else 0) and not (out / "requeue").exists()
    after = job.ended_at[1 - dies] - job.ended_at[dies]
    resume(bench, name, out)
    return f"the other {'gave the reason' if repeated else 'ended by itself'}, {max(0.0, after):.0f} s later"


def die_in(where: str, how: str, dies: int, hangs: bool, rank: int) -> None:
    """End rank `dies` in the second update after a checkpoint, in the first case of a validation or in the first volume
    that is cached. With `hangs`, make the other rank hang in its next collective call."""
    from common import distributed
    from common.cache import build
    from common.training.trainer import Trainer
    from Finetune import engine_finetune

    def fault(*args) -> None:
        if rank != dies:
            threading.Event().wait()
        if how == "raise":
            raise RuntimeError("a fault")
        os.kill(os.getpid(), signal.SIGKILL)

    inner = Trainer.save_or_stop

    def save_or_stop(self, at_end):
        if self.state.step == STEPS // 3 + 2 and (rank == dies or hangs):
            # Rank 0 is writing the checkpoint of the first epoch.
            while not (self.out_dir / checkpoint.LAST).exists():
                time.sleep(0.01)
            fault()
        inner(self, at_end)

    if where == "update":
        Trainer.save_or_stop = save_or_stop
    elif rank == dies and where == "validation":
        engine_finetune.case_dice = fault
    elif rank == dies:
        build._build_case = fault
    elif hangs:
        distributed.barrier = fault


def hanging(bench: Bench, out: Path, number: int, name: str) -> str:
    """An update hangs: the watchdog prints the stack of every thread and ends the process."""

    def hang(rank: int) -> None:
        from common.training.trainer import Trainer

        inner = Trainer.save_or_stop

        def stuck_in_a_collective_call(self, at_end):
            if self.state.step == 7:
                threading.Event().wait()
            inner(self, at_end)

        Trainer.save_or_stop = stuck_in_a_collective_call

    job = bench.job(name, out, "--hang_minutes", "0.05", inject=hang)
    check_exit(job, 1)
    assert "Timeout" in job.output() and "stuck_in_a_collective_call" in job.output(), job.output()[-2000:]
    resume(bench, name, out)
    return "stack reported, exit code 1"
