"""What a result depends on: processor, threads, GPU, versions, commit, and the rate of a large matrix product."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import matrix_rate
from Finetune.predict import code_version

PACKAGES = ("torch", "monai", "timm", "numpy", "blosc2")


def describe(device: torch.device) -> dict[str, Any]:
    """Return the description that is stored with every row; the matrix rates are measured here, in operations/s."""
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": code_version(),
        "matrix_rate": {str(dtype).removeprefix("torch."): matrix_rate(device, dtype) for dtype in dtypes},
    }


def cpu_model() -> str:
    """Return the name of the processor, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    # not Linux
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def text(machine: dict[str, Any]) -> str:
    """Return the description as one line."""
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in machine["matrix_rate"].items())
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    return (
        f"{hardware}{gpu}; matrix rate {rates}; Python {machine['python']}, {versions}; commit {machine['commit'][:7]}"
    )
