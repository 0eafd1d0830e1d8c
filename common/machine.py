"""What a machine offers to the programs: processors, memory, disks, the rate of each, and what follows from that.

`python -m common.doctor` is the program. `measure` returns plain numbers, and `findings` is a function of them.
"""

import importlib
import json
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import blosc2
import numpy as np
import torch

from common.cli import parse
from common.config import setting
from common.doctor import installed, required
from common.files import nearest_folder
from common.rates import copy_rate, matmul_rate, per_second
from common.resources import GIB, cores, memory, quantity
from common.runlog import print_main

DRIVER = Path("/proc/driver/nvidia/version")
SHARED = Path("/dev/shm")
# bytes written and read to measure a disk, and seconds of every other measurement
DISK_BYTES = 128 << 20
SECONDS = 0.3
# lower values are reported. A checkpoint holds weights, teacher and moments: 1 GB and more for ViT-B
LEAST_DISK, LEAST_SHARED, LEAST_FILES = 10 * GIB, GIB, 1024
# bytes that building the largest permitted volume (2^30 voxels) with a label takes: docs/data.md, What is stored
LEAST_MEMORY = 16e9
SLOW_DISK = 100e6
WORKERS = 4
# lowest compute capability of a CUDA device with bfloat16
BF16 = (8, 0)
SHOWN = ("torch", "monai", "timm", "numpy", "nibabel", "blosc2")


@dataclass(kw_only=True)
class DoctorSettings:
    """Settings of the report."""

    cache_dir: Path = setting(Path("cache"), "folder of the cache, whose disk is measured")
    out_dir: Path = setting(Path("runs"), "folder of the runs")
    json: bool = setting(False, "print the report as JSON")


@dataclass(frozen=True)
class Finding:
    """Something that will fail, may fail or will be slow, and what to do about it."""

    level: Literal["fails", "may fail", "slow"]
    text: str
    remedy: str


def main(argv: list[str] | None = None) -> None:
    """Print the report. SystemExit with code 1 when something will surely fail."""
    settings = parse(DoctorSettings, argv, description=importlib.import_module("common.doctor").__doc__)
    report = measure({"cache": settings.cache_dir, "runs": settings.out_dir})
    found = list(findings(report))
    if settings.json:
        print_main(json.dumps(report | {"findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        print_main(screen(report, found))
    if any(finding.level == "fails" for finding in found):
        raise SystemExit(1)


# ---------------------------------------------------------------- measurements


def measure(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return the report in plain types; sizes in bytes, rates per second.

    Args:
        folders: name -> folder that need not exist yet.
    """
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    driver = re.search(r"Module\s+(\d[\d.]+)", DRIVER.read_text()) if DRIVER.exists() else None
    rates = {"matmul cpu": matmul_rate("cpu", 1024, torch.float32, SECONDS)}
    rates |= {"memory copy": copy_rate(SECONDS), "decode": decode_rate()}
    for number, gpu in enumerate(gpus):
        dtype = torch.bfloat16 if (gpu.major, gpu.minor) >= BF16 else torch.float16
        rates[f"matmul cuda:{number}"] = matmul_rate(f"cuda:{number}", 8192, dtype, SECONDS)
        rates[f"copy cuda:{number}"] = copy_rate(SECONDS, f"cuda:{number}")
    shared = measure_disk(SHARED) if SHARED.is_dir() else {"write": None, "read": None}
    return {
        "versions": {name: installed(name) for name in required()},
        "gpus": [{"name": gpu.name, "memory": gpu.total_memory, "capability": [gpu.major, gpu.minor]} for gpu in gpus],
        "driver": driver[1] if driver else None,
        "cuda": torch.version.cuda,
        "cores": cores(),
        "memory": memory(),
        "shared": shutil.disk_usage(SHARED).total if SHARED.is_dir() else None,
        "shared_rates": {way: shared[way] for way in ("write", "read")},
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "rates": rates,
        "disks": {name: measure_disk(folder) for name, folder in folders.items()},
    }


def decode_rate() -> float:
    """Return the voxels per second that one core decompresses, of a volume with noise stored as in the cache."""
    noise = np.random.default_rng(0).normal(40, 12, (128, 128, 128)).astype(np.int16)
    params = blosc2.CParams(codec=blosc2.Codec.LZ4HC, clevel=5, nthreads=1, filters=[blosc2.Filter.SHUFFLE])
    stored = blosc2.asarray(noise, chunks=(64, 64, 64), blocks=(32, 32, 32), cparams=params)
    return per_second(lambda: stored[:], noise.size, SECONDS)


def measure_disk(folder: Path) -> dict[str, Any]:
    """Return the free bytes of the disk of a folder, and the bytes per second of writing and reading a file there.

    A folder that does not exist is not created; the nearest one above it is used. None where it cannot be written.
    """
    place = nearest_folder(folder)
    free = shutil.disk_usage(place).free
    result = {"folder": str(folder.absolute()), "free": free, "write": None, "read": None}
    if free < 2 * DISK_BYTES or not os.access(place, os.W_OK | os.X_OK):
        return result | {"writable": os.access(place, os.W_OK | os.X_OK)}
    content = os.urandom(DISK_BYTES)
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        began = time.perf_counter()
        file.write(content)
        os.fsync(file.fileno())
        written = time.perf_counter()
        file.seek(0)
        # or it would be read from memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 22):
            pass
        ended = time.perf_counter()
    return result | {"writable": True, "write": DISK_BYTES / (written - began), "read": DISK_BYTES / (ended - written)}


# ---------------------------------------------------------------- what follows


def findings(report: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what will fail, may fail or will be slow according to a report of `measure`."""
    yield from _gpu_findings(report)
    if report["memory"] < LEAST_MEMORY:
        needed = f"1.6 GB for a CT of 512 x 512 x 275, up to {quantity(LEAST_MEMORY, 'B')} for the largest"
        text = f"{quantity(report['memory'], 'B')} of memory; each process that builds the cache takes {needed}"
        yield Finding("may fail", text, "fewer --workers, or for very large volumes a machine with more memory")
    if report["cores"] < WORKERS + 1:
        text = f"{report['cores']:g} cores for one training process and {WORKERS} loading processes (the default)"
        yield Finding("slow", text, f"--workers {max(0, int(report['cores']) - 1)}")
    if report["shared"] is not None and report["shared"] < LEAST_SHARED:
        text = f"{quantity(report['shared'], 'B')} in {SHARED}, through which loading processes pass their batches"
        yield Finding("may fail", text, "docker run --shm-size=16g (or --ipc=host), or --workers 0")
    if report["open_files"] < LEAST_FILES:
        text = f"{report['open_files']} open files are allowed"
        yield Finding("may fail", text, f"ulimit -n {LEAST_FILES * 4}")
    yield from _disk_findings(report)


def _gpu_findings(report: Mapping[str, Any]) -> Iterator[Finding]:
    if not report["gpus"] and report["driver"]:
        text = f"NVIDIA driver {report['driver']}, but torch {report['versions']['torch']} finds no GPU"
        remedy = "install the torch and torchvision for this driver (https://pytorch.org/get-started/locally)"
        yield Finding("slow", text, f"{remedy}; check CUDA_VISIBLE_DEVICES")
    elif not report["gpus"]:
        text = "no GPU: the demo runs, but the recipes are made for GPUs"
        yield Finding("slow", text, "use a GPU node; --dry_run shows the time of a pass here")
    for number, gpu in enumerate(report["gpus"]):
        if tuple(gpu["capability"]) < BF16:
            text = f"cuda:{number} ({gpu['name']}) has no bfloat16, which --amp auto uses"
            yield Finding("slow", text, "--amp fp16")


def _disk_findings(report: Mapping[str, Any]) -> Iterator[Finding]:
    for name, disk in report["disks"].items():
        flag = {"cache": "--cache_dir", "runs": "--out_dir"}[name]
        if not disk["writable"]:
            yield Finding("fails", f"{disk['folder']}: cannot be written", f"{flag} on another disk")
        elif disk["free"] < LEAST_DISK:
            text = f"{disk['folder']}: only {quantity(disk['free'], 'B')} free"
            level = "fails" if disk["free"] < 2 * DISK_BYTES else "may fail"
            yield Finding(level, text, f"make room, or {flag} on another disk")
        elif disk["write"] < SLOW_DISK or (name == "cache" and disk["read"] < SLOW_DISK):
            rate = min(disk["write"], disk["read"])
            text = f"{disk['folder']}: {quantity(rate, 'B/s')}"
            yield Finding("slow", text, f"{flag} on a local disk; --loader_only measures the loading of views")


# ---------------------------------------------------------------- text


def screen(report: Mapping[str, Any], found: list[Finding]) -> str:
    """Return the report as text for one screen."""
    rates, gpus = report["rates"], report["gpus"]
    rows = {
        "packages": ", ".join(f"{name} {report['versions'][name]}" for name in SHOWN) + "; all of requirements.txt fit",
        "GPUs": "none" if not gpus else f"{len(gpus)}, driver {report['driver'] or 'unknown'}, CUDA {report['cuda']}",
    }
    for number, gpu in enumerate(gpus):
        rate = quantity(rates[f"matmul cuda:{number}"], "FLOP/s")
        copies = quantity(rates[f"copy cuda:{number}"], "B/s")
        name, size = gpu["name"], f"{gpu['memory'] / GIB:.1f} GiB"
        rows[f"cuda:{number}"] = f"{name}, {size}; matrix product {rate}, copies to it {copies}"
    rows |= {
        "cores": f"{report['cores']:g}; matrix product {quantity(rates['matmul cpu'], 'FLOP/s')} (float32), "
        f"cache {quantity(rates['decode'], 'voxel/s')} decoded per core",
        "memory": f"{report['memory'] / GIB:.1f} GiB; copy {quantity(rates['memory copy'], 'B/s')}",
        str(SHARED): "none"
        if report["shared"] is None
        else "; ".join([f"{report['shared'] / GIB:.1f} GiB", *speeds(report["shared_rates"])]),
    }
    for name, disk in report["disks"].items():
        rows[name] = "; ".join([disk["folder"], f"{quantity(disk['free'], 'B')} free", *speeds(disk)])
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {text}" for name, text in rows.items()]
    lines += [f"{finding.level}: {finding.text}\n  remedy: {finding.remedy}" for finding in found]
    return "\n".join(lines if found else [*lines, "nothing will fail or be slow, as far as this report can tell"])


def speeds(disk: Mapping[str, float | None]) -> list[str]:
    """Return the rates of writing and reading as text, those that were measured."""
    return [f"{way} {quantity(disk[way], 'B/s')}" for way in ("write", "read") if disk[way]]
