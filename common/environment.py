"""The machine, the libraries and the code of a run, as plain values without names of hosts or users."""

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from common.resources import GIB, cores, memory

LIBRARIES = ("torch", "monai", "timm", "numpy", "nibabel")


def environment() -> dict[str, Any]:
    """Return versions, processor, memory in GiB, GPUs and the commit of the code; what is unknown is absent."""
    found = {
        "code": code_version(),
        "Python": platform.python_version(),
        **{name: text for name in LIBRARIES if (text := _version(name))},
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": cores(),
        "memory, GiB": round(memory() / GIB, 1),
    }
    if torch.cuda.is_available():
        found |= {"CUDA": torch.version.cuda, "GPUs": _gpus()}
    return {name: value for name, value in found.items() if value is not None}


@functools.cache
def code_version() -> str:
    """Return the commit of the checkout, with -dirty if files differ from it; "unknown" outside a checkout.

    It is that of the first call, near the start of a program: its code is that of its start.
    """
    # --exclude=*: the hash, not a tag
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _gpus() -> str:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
