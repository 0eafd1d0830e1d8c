"""The numbers of today: losses, gradient norms and learning rates of 20 updates of every method, on one process and on
two, compared with those recorded in `*.json` beside this file.

    python -m tests.golden.test_golden                            how far each run is from the record
    python -m tests.golden.test_golden mae --flags="--seed 2"     how far a change of the settings leads
    python -m tests.golden.test_golden --update [RUN ...]         write the records anew

Both take `--nproc 1` or `--nproc 2` to leave out the other one.

When to update. Only in a commit that means to change the mathematics (a loss, a schedule, an initialisation, a random
draw, the order of the data), and whose message says so and why. A commit that moves, renames or speeds up code leaves
the records as they are. A new version of torch, MONAI or timm is a reason too, if the differences are explained. Read
the difference of the JSON files before committing: a line is one value over the 20 updates.

Tolerance. Relative, of each number: for losses that in `RUNS`, ten times that for gradient norms and monitors, 1e-9 for
the learning rate. It is about three times the spread of rounding errors or more, measured as the largest relative
difference over all updates (torch 2.14.1, an x86 CPU with AVX-512; a repeated run is equal in every bit):

                                               mae, glmae, mim,       finetune_unetr   finetune_mim
                                               finetune_classifier
    tolerance of losses                        5e-5                   2e-4             1e-3
    spread of rounding errors
      losses, other vector instructions        1e-5                   6e-6             3e-4
      losses, two threads                      3e-6                   5e-5             3e-5
      losses, two processes instead of one     3e-6                   5e-6             (see below)
      gradient norm and monitors, all of them  7e-5                   1e-4             4e-3
    effect of a change, on the loss that it moves most
      learning rate +1 %                       4e-4 to 5e-2           3e-3             3e-3
      no weight decay                          4e-5 (mae) to 7e-3     6e-4             1e-3
      mask ratio 0.65 instead of 0.6           9e-3 to 3e-2           -                -
      another seed                             6e-2 or more           5e-1             2e-1

Plain MAE without weight decay is noticed by its gradient norm, which changes by 8e-4; finetune_mim without it is only
just at its tolerance. Why finetune_mim spreads most is not known; a larger crop, wider stages or a lower learning rate
did not help. "Other vector instructions": ATEN_CPU_CAPABILITY=default and avx2, with ONEDNN_MAX_CPU_ISA=SSE41 and AVX2
and MKL_CBWR=COMPATIBLE and AVX2, against the defaults, on one process and (where the spread is largest: the fine-tuned
networks and mim_published) on two.

Where two processes differ from one by more than rounding: `finetune_mim` (batch norm over the samples of one process)
and `mim_published` (the parents that it picks depend on the rows in the batch of one process). All runs have a record
of their own for two processes.
"""

import argparse
import contextlib
import json
import math
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from common.runlog import TIMES
from Finetune.presets import load_preset
from tests.Finetune.made import make_dataset, make_scans
from tests.helpers import read_log, run_module, write_scans

# Where another test has imported the program, runpy says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

FOLDER = Path(__file__).parent
UPDATES = 20
TOLERANCE = 5e-5
NOT_RECORDED = ("epoch", "step", *TIMES, "skipped")
PRETRAIN, FINETUNE = "Pretrain.main_pretrain", "Finetune.main_finetune"

# An epoch of one update, so that log.jsonl has a line for each.
LOOP = f"--epochs {UPDATES} --warmup_epochs 2 --lr 3e-3 --weight_decay 0.05 --seed 1 --device cpu --amp off "
LOOP += "--workers 0 --save_every 1000 "
TWO = f"{LOOP} --batch_size 2 --samples_per_epoch 2 --micro_batch_size none "
# Batches of four, with accumulated gradients.
FOUR = f"{LOOP} --batch_size 4 --samples_per_epoch 4 "
VIT = "--patch_size 8 --embed_dim 24 --depth 2 --num_heads 2 "
DECODER = "--datalist DATA/ct --model tiny --decoder_embed_dim 24 --decoder_depth 1 --decoder_num_heads 2 "
# Only mae_standardize measures the data, so that the other records stay those from before that existed.
DECODER += "--no-standardize "
# There are no training numbers among the measures of health.
DECODER += "--health_every 0 "
MAE = f"{VIT} {DECODER} --local_size 16 --local_views 2 "
GLMAE = f"{TWO} {MAE} --method glmae --global_size 32 --global_views 2 --hidden_dim 32 --bottleneck_dim 8 --out_dim 16 "
GLMAE += "--momentum 0.9 1.0 --teacher_temp_epochs 10 "
MIM = f"{TWO} {DECODER} --method mim --local_size 32 --embed_dims 6 6 12 24 --depths 1 1 1 1 --num_heads 2 "
MIM += "--num_mid 2 --num_down 2 --down_parts 2 "
SPLEEN = f"{TWO} --preset MSD09_Spleen --data DATA/spleen --crops 1 --validate_every 0 --no-standardize "
UNETR = f"{SPLEEN} {VIT} --model unetr --depth 4 --roi 32 --feature_size 8 "
HYBRID = f"{SPLEEN} --model mim --embed_dims 4 8 16 24 --depths 1 1 1 2 --num_heads 3 --roi 64 32 32 "
CLASSIFIER = f"{FOUR} {VIT} --model classifier --preset CC_CCII --data DATA/cc --roi 32 32 16 --validate_every 0 "
CLASSIFIER += "--no-standardize "

# Name of a run: its program, its flags, the tolerance of its losses.
RUNS = {
    "mae": (PRETRAIN, f"{FOUR} {MAE} --method mae --micro_batch_size 1", TOLERANCE),
    "mae_standardize": (PRETRAIN, f"{FOUR} {MAE} --method mae --standardize", TOLERANCE),
    "glmae": (PRETRAIN, GLMAE, TOLERANCE),
    "glmae_byol": (PRETRAIN, f"{GLMAE} --consistency byol", TOLERANCE),
    "mim_none": (PRETRAIN, f"{MIM} --align none", TOLERANCE),
    "mim_cosine": (PRETRAIN, f"{MIM} --align cosine", TOLERANCE),
    "mim_infonce": (PRETRAIN, f"{MIM} --align infonce", TOLERANCE),
    "mim_published": (PRETRAIN, f"{MIM} --align published", TOLERANCE),
    "finetune_unetr": (FINETUNE, UNETR, 2e-4),
    "finetune_mim": (FINETUNE, HYBRID, 1e-3),
    "finetune_classifier": (FINETUNE, f"{CLASSIFIER} --micro_batch_size 2", TOLERANCE),
}
# These run with the fast tests, about a second each.
QUICK = ("mae", "glmae", "mim_cosine", "finetune_classifier")

Numbers = dict[str, list[float]]


def make_data(folder: Path) -> Path:
    """What the runs read: CT volumes in ct/, labelled ones in spleen/, scans of three classes in cc/."""
    write_scans(folder / "ct")
    # At the spacing of the preset. Where resampling halves a spacing, new voxels of a label lie exactly between two old
    # ones, and which of the two is the nearest then depends on the rounding errors of the CPU.
    make_dataset(load_preset("MSD09_Spleen"), folder / "spleen", np.diag([-1.5, -1.5, 1.5, 1.0]), shape=(48, 44, 40))
    make_scans(load_preset("CC_CCII"), folder / "cc")
    return folder


@contextlib.contextmanager
def as_program(program: str, flags: Sequence[str]) -> Iterator[None]:
    """Sets `sys.argv`; afterwards it and the signal handlers are what they were."""
    argv, sys.argv = sys.argv, [program, *flags]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(name: str, nproc: int, data: Path, extra: Sequence[str] = ()) -> Numbers:
    """The values of all updates, by name. A single process is this one: starting another takes longer than the run."""
    program, flags, _ = RUNS[name]
    with tempfile.TemporaryDirectory() as out:
        words = [*flags.replace("DATA", str(data)).split(), "--cache_dir", str(data / "cache"), "--out_dir", out]
        words += extra
        if nproc > 1:
            run_module(program, *words, nproc=nproc)
        else:
            with as_program(program, words), pytest.raises(SystemExit) as end:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            assert not end.value.code, f"{name} ended with code {end.value.code}"
        lines = read_log(out)
    assert len(lines) == UPDATES
    return {key: [float(f"{line[key]:.9g}") for line in lines] for key in lines[0] if key not in NOT_RECORDED}


def deviation(found: list[float], recorded: list[float]) -> float:
    """The largest relative difference; infinite where a number is not finite."""
    if not all(map(math.isfinite, found)):
        return math.inf
    return max(abs(a - b) / abs(b) if b else abs(a) for a, b in zip(found, recorded, strict=True))


def allowed(name: str, value: str) -> float:
    """The tolerance of one value of a run."""
    if value == "lr":
        return 1e-9
    return RUNS[name][2] * (10 if value == "grad_norm" or value.startswith("monitor/") else 1)


def read_records(name: str) -> dict[str, Numbers]:
    """The records of a run by its number of processes."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_records(name: str, records: dict[str, Numbers]) -> None:
    """One line for each value, so that a difference of two versions can be read."""
    blocks = []
    for nproc, numbers in sorted(records.items()):
        lines = ",\n".join(f"    {json.dumps(value)}: {json.dumps(curve)}" for value, curve in numbers.items())
        blocks.append(f'  "{nproc}": {{\n{lines}\n  }}')
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def check(name: str, nproc: int, data: Path, extra: Sequence[str] = ()) -> None:
    found, recorded = run(name, nproc, data, extra), read_records(name)[str(nproc)]
    assert found.keys() == recorded.keys()
    apart = {value: deviation(found[value], recorded[value]) for value in recorded}
    too_far = {value: f"{far:.2g}, allowed {allowed(name, value):.2g}" for value, far in apart.items()}
    assert not {value: text for value, text in too_far.items() if apart[value] > allowed(name, value)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_one_process(data, name):
    check(name, 1, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (program, _, _) in RUNS.items() if program == PRETRAIN])
def test_views_made_on_the_device(data, name):
    """Where views are made changes no number by more than rounding errors."""
    check(name, 1, data, ["--views_on", "device"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes(data, name):
    check(name, 2, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae", "finetune_mim"])
def test_one_percent_of_the_learning_rate_is_noticed(data, name):
    """Not by the recorded learning rate alone: by losses as well, well above the tolerance."""
    found, recorded = run(name, 1, data, ["--lr", str(3e-3 * 1.01)]), read_records(name)["1"]
    losses = [value for value in recorded if value not in ("lr", "grad_norm")]
    assert max(deviation(found[value], recorded[value]) / allowed(name, value) for value in losses) > 2


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the runs with their records, or record them anew.")
    parser.add_argument("names", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; none: all")
    parser.add_argument("--update", action="store_true", help="write the records instead of comparing with them")
    parser.add_argument("--nproc", type=int, choices=(1, 2), help="1 or 2 processes; none: both")
    parser.add_argument("--threads", type=int, default=1, help="threads of a single process")
    parser.add_argument("--flags", default="", help="further flags of the program, to see what they change")
    args = parser.parse_args()
    if unknown := set(args.names) - set(RUNS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.update and args.flags:
        parser.error("--update records the runs as they are defined here, without --flags")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for name in args.names or RUNS:
            for nproc in (args.nproc,) if args.nproc else (1, 2):
                began, records = time.time(), read_records(name)
                with contextlib.redirect_stdout(sys.stderr):
                    found = run(name, nproc, data, args.flags.split())
                print(f"{name}, {nproc} process(es), {time.time() - began:.1f} s", flush=True)
                if args.update:
                    write_records(name, records | {str(nproc): found})
                else:
                    for value, curve in records[str(nproc)].items():
                        print(f"  {value:24} {deviation(found[value], curve):.1e}", flush=True)


if __name__ == "__main__":
    main()
