"""How time and memory grow: with the volumes of a data set and of a batch, with tokens, and with processes.

`ours` is the cost per volume, token or process at the larger size and `theirs` that at the smaller one, so that a ratio
of 1 is linear growth, and more than 1 a fixed cost that the larger size shares: the optimiser, the start of a program.
Memory is per volume or token as well, except where a row says otherwise.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cache import write_volumes
from benchmarks.harness import ROOT, Row, alternate, peak_memory, peak_resident
from benchmarks.training import QUICK, Training, settings_of
from common.cache.build import build_cache
from common.data.datalist import Case, stem
from common.data.loader import to_device
from common.data.preprocessing import Preprocessing
from common.distributed import Run

AIM = 0.9
# memory: not more per volume or token, and for the whole program not more with more volumes
FLAT = 1.0


def measure(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    more = QUICK if quick else ()
    small, large = (48, 96) if quick else (96, 160)
    sizes = f"MAE on {small}^3 and {large}^3"
    rows = [
        size_row(f"volumes of a batch, MAE on {small}^3", "s per volume", [(4, small), (16, small)], more, device),
        size_row(f"tokens, {sizes}", "s per token", [(2, small), (2, large)], more, device),
        data_row(quick),
    ]
    if device.type == "cpu" or torch.cuda.device_count() > 1:
        rows.append(rank_row(quick, device))
    return rows


def size_row(
    title: str, unit: str, sizes: list[tuple[int, int]], more: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Return the row of updates with (volumes, edge of a volume in voxels): first the smaller size, then the larger."""
    functions = [update_of(volumes, edge, more, device) for volumes, edge in sizes]
    names = ("theirs", "ours")
    seconds = alternate(dict(zip(names, functions)), 5 if device.type == "cuda" else 2)
    per_volume = unit.endswith("volume")
    units = [volumes if per_volume else volumes * (edge // 16) ** 3 for volumes, edge in sizes]
    small, large = (f"{n} {'volume' if per_volume else 'token'}{'s' * (n > 1)}" for n in units)
    peaks = [peak_memory(function, device) // n for function, n in zip(functions, units)]
    return Row(
        name=f"growth with {title}: {large}",
        against=small,
        ours=seconds["ours"] / units[1],
        theirs=seconds["theirs"] / units[0],
        unit=unit,
        aim=AIM,
        peak_bytes=peaks[1],
        their_peak_bytes=peaks[0],
        memory_aim=FLAT,
    ).as_dict()


def update_of(volumes: int, edge: int, more: Sequence[str], device: torch.device) -> Callable[[], None]:
    """Return a function that makes an update of MAE on `volumes` random volumes."""
    flags = [*more, "--local_views", "1", "--local_size", str(edge)]
    training = Training(settings_of("mae", volumes, flags), Run(device), volumes)
    batch = {"local": torch.rand(volumes, 1, 1, edge, edge, edge), "key": torch.arange(volumes)}
    batch = to_device(batch, device)
    return lambda: training.update([batch])


def data_row(quick: bool) -> dict[str, Any]:
    """Return the row of caching a data set: the time without the start of the program, and its peak of memory."""
    counts, shape = ((2, 8), (128, 128, 64)) if quick else ((4, 16), (256, 256, 128))
    with tempfile.TemporaryDirectory(prefix="benchmark-growth-") as name:
        builds, peaks = {}, []
        for count in counts:
            folder = Path(name) / str(count)
            folder.mkdir()
            cases = [Case(stem(path), path) for path in write_volumes(folder, count, shape)]
            builds[str(count)] = partial(cache_anew, cases, folder / "timed")
            command = [sys.executable, "generate_cache_files.py", "--datalist", str(folder)]
            peaks.append(int(peak_resident([*command, "--cache_dir", str(folder / "cache"), "--workers", "0"])))
        seconds = list(alternate(builds, 1 if quick else 3).values())
    return Row(
        name=f"growth with volumes of a data set: caching {counts[1]} of {'x'.join(map(str, shape))}",
        against=f"caching {counts[0]}",
        ours=seconds[1] / counts[1],
        theirs=seconds[0] / counts[0],
        unit="s per volume",
        aim=AIM,
        peak_bytes=peaks[1],
        their_peak_bytes=peaks[0],
        memory_aim=FLAT,
        note="memory of the whole program, not per volume",
    ).as_dict()


def cache_anew(cases: Sequence[Case], folder: Path) -> None:
    """Cache all cases in a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    build_cache(cases, Preprocessing(), folder)


def rank_row(quick: bool, device: torch.device) -> dict[str, Any]:
    """Return the row of two processes, each with as much work as one alone. On a CPU each has one thread."""
    model, updates, turns = ("tiny", 3, 1) if quick else ("base", 3, 2)
    spent: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(turns):
        for count, times in spent.items():
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            command = [sys.executable, *launcher, "-m", "benchmarks.ranks", device.type, model, str(updates)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
            times.append(float(done.stdout.split()[-1]))
    one, two = (statistics.median(times) for times in spent.values())
    name = f"growth with processes, MAE {model}: 2, each with the work of one"
    return Row(name=name, against="1 process", ours=two, theirs=one, unit="s per update", aim=AIM).as_dict()
