"""The measurement of the loader's speed counts volumes and crops after the first batch."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from common.data import loader


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_volumes_and_crops_after_the_first_are_counted(monkeypatch, workers):
    clock = iter([3.0, 11.0])
    monkeypatch.setattr(loader, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    text = loader.measure_loader(DataLoader(torch.arange(20), batch_size=4, num_workers=workers), len, crops=3)
    assert "4 batches in 8.0 s; 2.00 volumes/s, 6.0 crops/s" in text


def test_bytes_read_by_all_processes_are_added_up(tmp_path, monkeypatch):
    # the worker 8 has ended
    for pid, count in ((os.getpid(), 5), (7, 4)):
        (tmp_path / str(pid)).write_text(f"rchar: 90\nread_bytes: {count}\nwrite_bytes: 90\n")
    monkeypatch.setattr(loader, "Path", lambda path: tmp_path / path.split("/")[2])
    assert loader.disk_bytes([7, 8]) == 9
