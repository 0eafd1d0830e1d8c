"""The list of trials: which fault, in which run, how often."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.scenarios import (
    RUNS,
    Bench,
    damaged,
    dead_rank,
    full_disk,
    hanging,
    killed,
    other_ranks,
    signalled,
    size_limit,
    stopped_while_saving,
)


@dataclass(frozen=True)
class Trial:
    """A fault in a run. `act(bench, folder, number)` does it and returns what was observed; `number` seeds its choices.
    The trial is compared with the undisturbed run `reference`."""

    fault: str
    run: str
    act: Callable[[Bench, Path, int], str]
    reference: str


def trial(fault: str, act: Callable, name: str, *more: str, run: str = "") -> Trial:
    """Return the trial of `act` on the run `name`, which the table calls `run`."""
    return Trial(fault, run or name, lambda bench, out, number: act(bench, out, number, name, *more), name)


TWO_WORKERS = ("--workers", "2")
SHARDED, ALONE = "fine-tuning, 2 ranks, sharded, no drop path", "fine-tuning, no drop path"
PAIR = "fine-tuning, 2 ranks, no drop path"
KILL, STOP = "SIGKILL at a random moment", "SIGTERM or SIGUSR1 after random updates, twice"
STOP_SAVING, KILL_SAVING = (f"{name} in the middle of writing a checkpoint" for name in ("SIGTERM", "SIGKILL"))
CUT, FLIP = "last checkpoint cut at a random byte", "a bit of the last checkpoint altered"
LIMIT, RANKS = "a limit on file sizes met while a checkpoint is written", "resumed on another number of ranks"
TRIALS = [
    *[trial(KILL, killed, "GL-MAE")] * 8,
    *[trial(KILL, killed, "GL-MAE", *TWO_WORKERS, run="GL-MAE, 2 workers")] * 4,
    *[trial(KILL, killed, "GL-MAE, 2 ranks")] * 3,
    *[trial(KILL, killed, "GL-MAE, 2 ranks, sharded")] * 2,
    *[trial(KILL, killed, "MiM")] * 5,
    *[trial(KILL, killed, "fine-tuning")] * 5,
    *[trial(STOP, signalled, name) for name in RUNS if "no drop path" not in name],
    *[
        trial(STOP, signalled, name, *TWO_WORKERS, run=f"{name}, 2 workers")
        for name in ("GL-MAE", "MiM", "fine-tuning", "GL-MAE, 2 ranks, accumulated")
    ],
    *[trial(STOP_SAVING, stopped_while_saving, "GL-MAE", signal.SIGTERM)] * 2,
    trial(STOP_SAVING, stopped_while_saving, "fine-tuning", signal.SIGTERM),
    *[trial(KILL_SAVING, stopped_while_saving, "GL-MAE", signal.SIGKILL)] * 2,
    *[trial(CUT, damaged, "GL-MAE", "truncated")] * 2,
    trial(CUT, damaged, "MiM", "truncated"),
    *[trial(FLIP, damaged, "GL-MAE", "altered")] * 2,
    trial(FLIP, damaged, "fine-tuning", "altered"),
    *[trial("disk full while a checkpoint is written", full_disk, "GL-MAE")] * 2,
    trial(LIMIT, size_limit, "GL-MAE"),
    trial(LIMIT, size_limit, "MiM"),
    trial(RANKS, other_ranks, "GL-MAE", "GL-MAE, 2 ranks", run="GL-MAE, 1 to 2"),
    trial(RANKS, other_ranks, "GL-MAE, 2 ranks", "GL-MAE", run="GL-MAE, 2 to 1"),
    trial(RANKS, other_ranks, PAIR, ALONE, run="fine-tuning, 2 to 1"),
    trial(
        "resumed with sharded weights",
        other_ranks,
        "GL-MAE, 2 ranks",
        "GL-MAE, 2 ranks, sharded",
        run="GL-MAE, 2 ranks to 2 ranks, sharded",
    ),
    trial("resumed without sharding", other_ranks, SHARDED, ALONE, run="fine-tuning, 2 ranks, sharded to 1"),
    *[trial("SIGKILL to one of two ranks in an update", dead_rank, "GL-MAE, 2 ranks", "update", "kill")] * 2,
    trial("SIGKILL to one of two ranks in an update", dead_rank, "MiM, 2 ranks", "update", "kill"),
    trial("SIGKILL to one of two ranks in an update", dead_rank, "fine-tuning, 2 ranks", "update", "kill"),
    trial("SIGKILL to one of two ranks in a validation", dead_rank, "fine-tuning, 2 ranks", "validation", "kill"),
    trial("SIGKILL to the rank that fills the cache", dead_rank, "GL-MAE, 2 ranks", "cache", "kill"),
    trial("SIGKILL to one of two ranks, the other hangs", dead_rank, "GL-MAE, 2 ranks", "update", "kill", True),
    trial("an exception on one of two ranks", dead_rank, "GL-MAE, 2 ranks", "update", "raise"),
    trial("an exception on one of two ranks, the other hangs", dead_rank, "GL-MAE, 2 ranks", "update", "raise", True),
    trial("an exception in filling the cache, the other hangs", dead_rank, "GL-MAE, 2 ranks", "cache", "raise", True),
    trial("an update that hangs", hanging, "GL-MAE"),
]
