"""Cores and memory that a process may use, and numbers as text."""

import os

import pytest

from common import resources


def test_limits_of_a_control_group_count(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("123456\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(resources, "MEMORY_LIMITS", [str(tmp_path / "memory.max"), str(tmp_path / "missing")])
    monkeypatch.setattr(resources, "CPU_LIMIT", str(tmp_path / "cpu.max"))
    assert resources.memory() == 123456 and resources.cores() == 0.5


def test_a_control_group_without_limits_does_not_count(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    monkeypatch.setattr(resources, "MEMORY_LIMITS", [str(tmp_path / "memory.max")])
    monkeypatch.setattr(resources, "CPU_LIMIT", str(tmp_path / "cpu.max"))
    assert resources.memory() > 1 << 28 and resources.cores() == len(os.sched_getaffinity(0))
    assert 0 < resources.peak_memory() < resources.memory()


@pytest.mark.parametrize("seconds, text", [(40, "40 s"), (720, "12 min"), (12600, "3.5 h")])
def test_durations_are_in_their_largest_unit(seconds, text):
    assert resources.duration(seconds) == text


@pytest.mark.parametrize("value, text", [(5, "5 B"), (1500, "1.5 kB"), (2.345e12, "2.35 TB"), (3e21, "3e+03 EB")])
def test_quantities_have_a_prefix(value, text):
    assert resources.quantity(value, "B") == text


@pytest.mark.parametrize(
    "files, unused, available",
    [
        ({"/proc/meminfo": "MemFree: 1 kB MemAvailable: 4 kB"}, 4096, 4096),
        ({"/proc/meminfo": "MemAvailable: 4 kB", "max": "3000", "current": "1000"}, 4096, 2000),
        ({"/proc/meminfo": "MemAvailable: 4 kB", "max": "max", "current": "1000"}, 4096, 4096),
        ({"max": "3000", "current": "1000"}, None, None),
    ],
)
def test_memory_that_is_available(monkeypatch, files, unused, available):
    monkeypatch.setattr(resources, "_words", lambda path: files.get(path, files.get(path.split(".")[-1], "")).split())
    assert (resources.unused_memory(), resources.available_memory()) == (unused, available)
