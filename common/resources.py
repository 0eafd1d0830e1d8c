"""What a process may use of its machine, what it has used, and times as text."""

import os
import resource
import sys
from pathlib import Path

GIB = 1 << 30
# where control groups (containers, Slurm) keep the limits of memory and of processor time, versions 2 and 1
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
PREFIXES = ("", "k", "M", "G", "T", "P", "E")
CPU_LIMIT = "/sys/fs/cgroup/cpu.max"


def peak_memory() -> int:
    """Return the largest memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cores() -> float:
    """Return the number of cores that this process may use: its affinity, and the limit of its control group."""
    try:
        allowed = float(len(os.sched_getaffinity(0)))
    # macOS
    except AttributeError:
        allowed = float(os.cpu_count() or 1)
    words = _words(CPU_LIMIT)
    return min(allowed, int(words[0]) / int(words[1])) if len(words) == 2 and words[0].isdigit() else allowed


def memory() -> int:
    """Return the bytes of memory that this process may use: those of the machine, or fewer in a control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(words[0]) for path in MEMORY_LIMITS if (words := _words(path)) and words[0].isdigit()]
    return min([total, *limits])


def unused_memory() -> int | None:
    """Return the bytes of the machine's memory that programs could take, None where the system does not report them."""
    words = _words("/proc/meminfo")
    return int(words[words.index("MemAvailable:") + 1]) * 1024 if "MemAvailable:" in words else None


def available_memory() -> int | None:
    """Return the bytes of `unused_memory` within the limit of the control group (version 2), None if unknown."""
    unused = unused_memory()
    limit, used = (_words(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if unused is None or not used or not limit or not limit[0].isdigit():
        return unused
    return min(unused, int(limit[0]) - int(used[0]))


def _words(path: str) -> list[str]:
    try:
        return Path(path).read_text().split()
    # another system, or no permission
    except OSError:
        return []


def quantity(value: float, unit: str) -> str:
    """Return a number of units with three digits and a prefix of 1000: `1.23 TFLOP`, `45 MB`."""
    power = 0
    while value >= 1000 and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {PREFIXES[power]}{unit}"


def duration(seconds: float) -> str:
    """Return a time as text in its largest unit: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
