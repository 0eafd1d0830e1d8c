"""The list of trials: which fault, in which run, how often."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.scenarios import (
    RUNS,
    Bench,
    dead_rank,
    failing_rank,
    full_disk,
    hanging,
    harmed,
    killed,
    other_ranks,
    signalled,
    size_limit,
    stopped_while_saving,
)


@dataclass(frozen=True)
class Trial:
    fault: str
    run: str
    act: Callable[[Bench, Path, int], str]
    references: tuple[str, ...]


def trial(fault: str, act: Callable, name: str, *more: str, label: str = "") -> Trial:
    return Trial(fault, name + label, lambda bench, out, number: act(bench, out, number, name, *more), (name,))


TWO = ("--workers", "2")
SHARDED = "fine-tuning, 2 ranks, sharded, no drop path"
KILL, STOP = "SIGKILL at a random moment", "SIGTERM or SIGUSR1 after random updates, twice"
TRIALS = [
    *[trial(KILL, killed, "GL-MAE")] * 8,
    *[trial(KILL, killed, "GL-MAE", *TWO, label=", 2 workers")] * 4,
    *[trial(KILL, killed, "GL-MAE, 2 ranks")] * 3,
    *[trial(KILL, killed, "GL-MAE, 2 ranks, sharded")] * 2,
    *[trial(KILL, killed, "MiM")] * 5,
    *[trial(KILL, killed, "fine-tuning")] * 5,
    *[trial(STOP, signalled, name) for name in RUNS if "no drop path" not in name],
    *[
        trial(STOP, signalled, name, *TWO, label=", 2 workers")
        for name in ("GL-MAE", "MiM", "fine-tuning", "GL-MAE, 2 ranks, accumulated")
    ],
    *[trial("SIGTERM in the middle of writing a checkpoint", stopped_while_saving, "GL-MAE", signal.SIGTERM)] * 2,
    trial("SIGTERM in the middle of writing a checkpoint", stopped_while_saving, "fine-tuning", signal.SIGTERM),
    *[trial("SIGKILL in the middle of writing a checkpoint", stopped_while_saving, "GL-MAE", signal.SIGKILL)] * 2,
    *[trial("last checkpoint cut at a random byte", harmed, "GL-MAE", "truncated")] * 2,
    trial("last checkpoint cut at a random byte", harmed, "MiM", "truncated"),
    *[trial("a bit of the last checkpoint altered", harmed, "GL-MAE", "altered")] * 2,
    trial("a bit of the last checkpoint altered", harmed, "fine-tuning", "altered"),
    *[trial("disk full while a checkpoint is written", full_disk, "GL-MAE")] * 2,
    trial("a limit on file sizes met while a checkpoint is written", size_limit, "GL-MAE"),
    trial("a limit on file sizes met while a checkpoint is written", size_limit, "MiM"),
    Trial(
        "resumed on another number of ranks",
        "GL-MAE, 1 to 2",
        lambda b, o, n: other_ranks(b, o, n, "GL-MAE", "GL-MAE, 2 ranks"),
        ("GL-MAE",),
    ),
    Trial(
        "resumed on another number of ranks",
        "GL-MAE, 2 to 1",
        lambda b, o, n: other_ranks(b, o, n, "GL-MAE, 2 ranks", "GL-MAE"),
        ("GL-MAE, 2 ranks",),
    ),
    Trial(
        "resumed on another number of ranks",
        "fine-tuning, 2 to 1",
        lambda b, o, n: other_ranks(b, o, n, "fine-tuning, 2 ranks, no drop path", "fine-tuning, no drop path"),
        ("fine-tuning, 2 ranks, no drop path", "fine-tuning, no drop path"),
    ),
    Trial(
        "resumed with shared out weights",
        "GL-MAE, 2 ranks to 2 ranks, sharded",
        lambda b, o, n: other_ranks(b, o, n, "GL-MAE, 2 ranks", "GL-MAE, 2 ranks, sharded"),
        ("GL-MAE, 2 ranks",),
    ),
    Trial(
        "resumed without shared out weights",
        "fine-tuning, 2 ranks, sharded to 1",
        lambda b, o, n: other_ranks(b, o, n, SHARDED, "fine-tuning, no drop path"),
        (SHARDED,),
    ),
    *[trial("SIGKILL to one of two ranks", dead_rank, "GL-MAE, 2 ranks")] * 2,
    trial("an exception on one of two ranks, the other hangs", failing_rank, "GL-MAE, 2 ranks", False),
    trial("SIGKILL to one of two ranks, the other hangs", failing_rank, "GL-MAE, 2 ranks", True),
    trial("an update that never ends", hanging, "GL-MAE"),
]
