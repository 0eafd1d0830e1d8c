"""The trials of the fault-injection harness: what is done to a run, and what must come of it."""

import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from common import checkpoint
from common.peers import EXIT_PEER_DIED
from common.signals import EXIT_REQUEUE
from Finetune.presets import load_preset
from tests.common.training.toy import lines
from tests.Finetune.made import make_dataset
from tests.helpers import ct, write_nifti
from tests.reliability.compare import difference
from tests.reliability.processes import Job

COMMON = "--batch_size 4 --warmup_epochs 1 --save_every 2 --log_every 3 --lr 1e-3 --save_minutes 0 --epochs 3".split()
VIT = "--embed_dim 24 --num_heads 2 --depth 2".split()
DECODER = "--decoder_embed_dim 24 --decoder_depth 1 --decoder_num_heads 2".split()
GLMAE = (
    "--method glmae --model tiny --patch_size 8 --global_size 32 --local_size 16 --global_views 2 --local_views 2 "
    "--hidden_dim 32 --bottleneck_dim 8 --out_dim 16 --freeze_last_layer 1"
).split()
MIM = (
    "--method mim --model tiny --num_heads 2 --embed_dims 6 6 12 24 --depths 1 1 1 1 --local_size 32 --num_mid 2 "
    "--num_down 1"
).split()
FINETUNE = (
    "--preset MSD09_Spleen --model unetr --patch_size 16 --roi 32 --feature_size 4 --crops 1 --drop_path 0.2 "
    "--validate_every 1"
).split()

RUNS = {  # name -> (program, flags, ranks)
    "GL-MAE": ("pretrain", [*GLMAE, *VIT, *DECODER, "--samples_per_epoch", "16"], 1),
    "GL-MAE, accumulated": (
        "pretrain",
        [*GLMAE, *VIT, *DECODER, "--samples_per_epoch", "16", "--micro_batch_size", "1"],
        1,
    ),
    "GL-MAE, 2 ranks": ("pretrain", [*GLMAE, *VIT, *DECODER, "--samples_per_epoch", "16"], 2),
    "GL-MAE, 2 ranks, accumulated": (
        "pretrain",
        [*GLMAE, *VIT, *DECODER, "--samples_per_epoch", "16", "--micro_batch_size", "1"],
        2,
    ),
    "MiM": ("pretrain", [*MIM, *DECODER, "--samples_per_epoch", "16"], 1),
    "MiM, 2 ranks": ("pretrain", [*MIM, *DECODER, "--samples_per_epoch", "16"], 2),
    "fine-tuning": (
        "finetune",
        [*FINETUNE, *VIT, "--depth", "4", "--micro_batch_size", "2", "--samples_per_epoch", "16"],
        1,
    ),
    "fine-tuning, 2 ranks": (
        "finetune",
        [*FINETUNE, *VIT, "--depth", "4", "--micro_batch_size", "2", "--samples_per_epoch", "16"],
        2,
    ),
}
RUNS |= {
    f"{name}, sharded": (program, [*flags, "--fsdp"], ranks)
    for name, (program, flags, ranks) in RUNS.items()
    if ranks == 2
}
PLAIN = ["--drop_path", "0"]  # drop path is drawn per rank
RUNS |= {
    f"{name}, no drop path": (program, [*flags, *PLAIN], ranks)
    for name, (program, flags, ranks) in RUNS.items()
    if program == "finetune"
}
STEPS = 12


@dataclass
class Bench:
    """Data, undisturbed runs and how long they took."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def job(
        self,
        name: str,
        out_dir: Path,
        *more: str,
        ranks: int | None = None,
        sabotage: Callable[[int], None] | None = None,
    ) -> Job:
        program, flags, own = RUNS[name]
        data = ["--datalist", self.folder / "scans"] if program == "pretrain" else ["--data", self.folder / "spleen"]
        argv = [
            *data,
            "--cache_dir",
            self.folder / "cache",
            *flags,
            *COMMON,
            "--workers",
            "0",
            "--device",
            "cpu",
            *more,
        ]
        return Job(program, list(map(str, argv)), out_dir, ranks or own, sabotage)

    def reference(self, name: str) -> Path:
        return self.folder / "undisturbed" / name.replace(" ", "_").replace(",", "")


def prepare(bench: Bench, names: set[str]) -> None:
    """Scans, cache, and one undisturbed run of each kind."""
    for number in range(3):
        write_nifti(bench.folder / f"scans/scan{number}.nii.gz", ct((40, 36, 30 + 4 * number), seed=number))
    make_dataset(load_preset("MSD09_Spleen"), bench.folder / "spleen")
    for name in sorted(names):
        began = time.monotonic()
        ended(bench.job(name, bench.reference(name)), 0)
        bench.seconds[name] = time.monotonic() - began
        print(f"undisturbed {name}: {bench.seconds[name]:.1f} s", flush=True)


def ended(job: Job, *codes: int) -> None:
    found = job.wait()
    if not set(found) <= set(codes):
        raise AssertionError(f"exit codes {found}, expected {codes}:\n{job.said()[-3000:]}")


def resume(bench: Bench, name: str, out: Path, *more: str) -> None:
    """To the end, and the same as if nothing had happened."""
    ended(bench.job(name, out, *more), 0)
    found = difference(out, bench.reference(name))
    assert not found, found
    left = [p.name for p in out.glob(".*") if p.name != ".lock"]
    assert not left, left


def updates_done(out: Path) -> int:
    try:
        return checkpoint.load(out / checkpoint.LAST)["args"]["step"]
    except ValueError:
        return 0


# ---------------------------------------------------------------- what is done


def killed(bench: Bench, out: Path, number: int, name: str, *more: str) -> str:
    """SIGKILL to everything at a random moment: some time after a random number of updates, or during the start."""
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
    """SIGTERM or SIGUSR1, to one rank, after a random update; again, after another one, in the run that goes on."""
    rng, saved = random.Random(number), []
    for latest in (4, STEPS - 3):
        at, target = rng.randint(updates_done(out), latest), rng.choice([signal.SIGTERM, signal.SIGUSR1])
        ended(bench.job(name, out, *more, sabotage=partial(signal_at_update, at, target)), EXIT_REQUEUE)
        saved.append(updates_done(out))  # with several ranks they agree one update later
        assert at + 1 <= saved[-1] <= at + 2 and (out / "requeue").exists(), (at, saved)
    resume(bench, name, out, *more)
    assert not (out / "requeue").exists()
    return f"exit code 75, {saved[0]} and {saved[1]} saved"


def signal_at_update(at: int, number: int, rank: int) -> None:
    """The last rank signals itself, while it makes update `at` (counted by the programs' own step)."""
    from common.training.trainer import Trainer

    inner, world = Trainer.save_or_stop, int(os.environ.get("WORLD_SIZE", "1"))

    def save_or_stop(self, at_end):
        if self.state.step == at + 1 and rank == world - 1:
            os.killpg(os.getpid(), number)
        inner(self, at_end)

    Trainer.save_or_stop = save_or_stop


def within_save(number: int, at_save: int, rank: int) -> None:
    """A signal in the middle of writing checkpoint number `at_save`: half of it is on disk, nothing is renamed yet."""
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
    job = bench.job(name, out, sabotage=partial(within_save, sign, 3 + number % 4))
    ended(job, EXIT_REQUEUE if sign == signal.SIGTERM else -signal.SIGKILL)
    if sign == signal.SIGKILL:
        assert list(out.glob(".checkpoint-*.tmp")), "nothing was being written"
    checkpoint.load(out / checkpoint.LAST)
    resume(bench, name, out)
    return "exit code 75" if sign == signal.SIGTERM else ""


def harmed(bench: Bench, out: Path, number: int, name: str, harm: str) -> str:
    """Stopped, and then checkpoint-last.pth is cut or altered at a random place."""
    rng = random.Random(number)
    ended(bench.job(name, out, sabotage=partial(signal_at_update, 5 + rng.randrange(4), signal.SIGTERM)), EXIT_REQUEUE)
    last = out / checkpoint.LAST
    data = bytearray(last.read_bytes())
    if harm == "truncated":
        data = data[: rng.randrange(len(data))]
    else:  # within a record's data: a byte of a weight
        weights = max((t for t in tensors(checkpoint.load(last))), key=lambda t: t.numel()).numpy().tobytes()
        data[data.index(weights) + rng.randrange(len(weights))] ^= 1 << rng.randrange(8)
    last.unlink()  # it may have a second name
    last.write_bytes(data)
    job = bench.job(name, out)
    ended(job, 0)
    assert "checkpoint-last.pth: " in job.said() and "taking" in job.said(), job.said()[-2000:]
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
    """A tmpfs is full when a checkpoint is written. Without the right to mount a limit on file sizes stands in."""
    out.mkdir()
    size = (bench.reference(name) / checkpoint.LAST).stat().st_size
    small = size * 5 // 2 + 100_000 * (1 + number % 2)  # last, previous, half of the next, logs; a whole run needs 4
    if not mount(out, small):
        return "no right to mount a tmpfs; " + size_limit(bench, out, number, name)
    try:
        job = bench.job(name, out)
        ended(job, 2)
        assert "cannot be written" in job.said() or "No space" in job.said(), job.said()[-2000:]
        assert updates_done(out) > 0
        subprocess.run(["mount", "-o", f"remount,size={100 * size}", str(out)], check=True)
        resume(bench, name, out)
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)
    return "exit code 2 with the reason"


def size_limit(bench: Bench, out: Path, number: int, name: str) -> str:
    """RLIMIT_FSIZE: writing fails half-way through the file."""
    size = (bench.reference(name) / checkpoint.LAST).stat().st_size
    job = bench.job(name, out, sabotage=lambda rank: limit_after_saves(3 + number % 5, size // 2))
    ended(job, 2)
    assert "cannot be written" in job.said() and updates_done(out) > 0
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
    """Stopped on one number of ranks, resumed on another: the same samples in each update; sums of gradients round
    differently."""
    ended(bench.job(first, out, sabotage=partial(signal_at_update, 2 + number % 6, signal.SIGTERM)), EXIT_REQUEUE)
    ended(bench.job(then, out), 0)
    worst = 0.0
    for a, b in zip(lines(out), lines(bench.reference(first)), strict=True):
        terms = [k for k in b if k.startswith(("rec_", "global_", "dice", "ce", "grad_norm"))]
        worst = max([worst, *(abs(a[k] - b[k]) / max(1.0, abs(b[k])) for k in terms)])
    assert worst < 1e-4, worst
    return "losses within 1e-4 (sums round differently)"


def dead_rank(bench: Bench, out: Path, number: int, name: str) -> str:
    """One of two ranks is killed: the other ends in seconds. Nothing is lost but the updates since the last
    checkpoint."""
    job = bench.job(name, out)
    while updates_done(out) < 3:
        time.sleep(0.05)
        assert not job.poll(), job.said()[-2000:]
    job.signal(signal.SIGKILL, rank=number % 2)
    began = time.monotonic()
    codes = job.wait(40)
    took = time.monotonic() - began
    assert codes[1 - number % 2] not in (0, EXIT_REQUEUE) and took < 20, (codes, took)
    resume(bench, name, out)
    return f"the other ended after {took:.0f} s"


def failing_rank(bench: Bench, out: Path, number: int, name: str, silently: bool) -> str:
    """One rank raises an exception, or is killed, while the other hangs, as in an NCCL call with a dead peer."""

    def fail(rank: int) -> None:
        from common.training.trainer import Trainer

        def fails(self, at_end):
            if self.state.step == 4 and silently:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.state.step == 4:
                raise MemoryError("no memory left for this rank")

        def hangs(self, at_end):
            if self.state.step == 4:
                threading.Event().wait()

        Trainer.save_or_stop = fails if rank == 1 else hangs

    job = bench.job(name, out, "--save_minutes", "none", sabotage=fail)
    while len(job.codes) == 0:
        job.poll()
        time.sleep(0.01)
    began = time.monotonic()
    codes = job.wait(40)
    took = time.monotonic() - began
    reason = "rank 1 died without a word" if silently else "rank 1 died: MemoryError: no memory left for this rank"
    assert codes[0] == EXIT_PEER_DIED and reason in job.said(0), (codes, took, job.said(0)[-2000:])
    resume(bench, name, out)
    return f"the other gave the reason and ended after {took:.0f} s"


def hanging(bench: Bench, out: Path, number: int, name: str) -> str:
    """An update that never ends: the watchdog writes where every thread stands, and ends the process."""

    def hang(rank: int) -> None:
        from common.training.trainer import Trainer

        inner = Trainer.save_or_stop

        def stuck_in_a_collective_call(self, at_end):
            if self.state.step == 7:
                threading.Event().wait()
            inner(self, at_end)

        Trainer.save_or_stop = stuck_in_a_collective_call

    job = bench.job(name, out, "--hang_minutes", "0.05", sabotage=hang)
    ended(job, 1)
    assert "Timeout" in job.said() and "stuck_in_a_collective_call" in job.said(), job.said()[-2000:]
    resume(bench, name, out)
    return "stack reported, exit code 1"
