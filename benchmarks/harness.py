"""Measure functions beside each other: time in turn, peak memory, arithmetic, and the machine's own matrix rate.

A benchmark is a function `measure(quick: bool, device: torch.device) -> list[dict]` whose rows are made by `compare` or
`Row(...).as_dict()`. Every value is one of which less is better (seconds, bytes, bytes per set), so that `ratio`,
theirs divided by ours, says how many times ours is better. Peak memory is given as ours divided by theirs.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]


@dataclass(kw_only=True)
class Row:
    """One line of the result. What does not apply is None."""

    # what is measured, with its sizes, and what `theirs` is
    name: str
    against: str
    # seconds, bytes, ...: less is better
    ours: float
    theirs: float | None = None
    unit: str = "s"
    # theirs / ours; the aim of the ratio
    ratio: float | None = None
    aim: float | None = None
    # peak of one call, beyond what existed before it
    peak_bytes: int | None = None
    their_peak_bytes: int | None = None
    # ours / theirs; the aim of the ratio
    peak_memory_ratio: float | None = None
    memory_aim: float | None = None
    # arithmetic per second divided by the matrix rate measured between the calls
    share_of_rate: float | None = None
    their_share_of_rate: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.ratio is None and self.theirs is not None:
            self.ratio = self.theirs / self.ours
        if self.peak_memory_ratio is None and self.peak_bytes and self.their_peak_bytes:
            self.peak_memory_ratio = self.peak_bytes / self.their_peak_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    name: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    against: str,
    device: torch.device,
    rounds: int = 3,
    dtype: torch.dtype | None = None,
    aim: float | None = None,
    memory_aim: float | None = None,
    note: str = "",
) -> dict[str, Any]:
    """Measure two functions that do the same work on `device`, and a matrix product between them.

    Check before that both compute the same. A call must leave nothing behind that a later one would reuse: drop the
    gradients at its end (`parameter.grad = None`), or the first call alone would pay for them.

    Args:
        name: the work and its sizes, e.g. "MAE ViT-B 96^3, 54 of 216 patches, forward and backward".
        against: what `theirs` is, e.g. "MONAI MaskedAutoEncoderViT".
        dtype: of autocast in the two, None for float32; their share is that of the matrix rate in it.
        aim: wanted ratio of the times, theirs / ours, and `memory_aim` of the peak memory, ours / theirs.
    """
    product, product_flops = matrix_product(device, dtype or torch.float32)
    seconds = alternate({"ours": ours, "theirs": theirs, "product": product}, rounds)
    rate = product_flops / seconds["product"]
    return Row(
        name=name,
        against=against,
        ours=seconds["ours"],
        theirs=seconds["theirs"],
        aim=aim,
        peak_bytes=peak_memory(ours, device),
        their_peak_bytes=peak_memory(theirs, device),
        memory_aim=memory_aim,
        share_of_rate=count_flops(ours) / seconds["ours"] / rate,
        their_share_of_rate=count_flops(theirs) / seconds["theirs"] / rate,
        note=note,
    ).as_dict()


def alternate(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of a call of each function, after a first call that does not count.

    They take turns, each round starting with the next one, so that other load on the machine affects all of them.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(functions[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds of one call, including the work that it leaves to the GPU."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with `count` threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Return the bytes of tensors that one call allocates at its peak, beyond those that existed before it.

    On CUDA this is what the caching allocator counts. On the CPU it is the running sum of PyTorch's allocations and
    releases; the scratch memory of oneDNN and what numpy allocates are not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    used = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        used += change.nbytes()
        peak = max(peak, used)
    return peak


def peak_resident(command: Sequence[str]) -> float:
    """Run a program from the root of the repository, and return the peak of its resident memory in bytes.

    Raises:
        RuntimeError: it failed; the end of what it wrote is in the message.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{output.read()[-2000:]}")
    # Linux reports kilobytes, macOS bytes
    return usage.ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def count_flops(function: Callable[[], Any]) -> int:
    """Return the operations of the matrix products, convolutions and attention that one call executes.

    A multiplication and an addition are two. Attention runs in its plain form, which has a formula on every device.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """Return a function that multiplies two square matrices on `device`, and its operations."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> float:
    """Return the operations per second of a large matrix product."""
    product, flops = matrix_product(device, dtype)
    return flops / alternate({"product": product}, rounds)["product"]
