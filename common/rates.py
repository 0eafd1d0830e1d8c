"""Rates of a device, measured in a moment: matrix products and copies. `seconds` is how long to measure."""

import time
from collections.abc import Callable

import torch


def per_second(action: Callable[[], object], work: float, seconds: float, device: str = "cpu") -> float:
    """Return the work done in a second, measured for some seconds. `action` does `work` on the device; the first one is
    not timed."""

    def wait() -> None:
        # without it the time would be that of the launch; it is in no training step
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    action()
    wait()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        action()
        wait()
        count += 1
    return count * work / (time.perf_counter() - began)


def matmul_rate(device: str, size: int, dtype: torch.dtype, seconds: float) -> float:
    """Return the floating point operations per second of a product of two matrices of size x size."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    return per_second(lambda: matrix @ matrix, 2.0 * size**3, seconds, device)


def copy_rate(seconds: float, device: str = "cpu") -> float:
    """Return the bytes per second of a copy in memory, or from pinned memory to a CUDA device, as for batches."""
    on_cuda = device.startswith("cuda")
    source = torch.ones(1 << 24, pin_memory=on_cuda)
    target = torch.empty_like(source, device=device)
    return per_second(lambda: target.copy_(source, non_blocking=on_cuda), source.numel() * 4, seconds, device)
