"""The speed of the loader, the way of its batches to the device, and the check of shared memory."""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from common.data import loader
from common.data.sampler import StreamSampler
from common.errors import InputError


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


# ---------------------------------------------------------------- the way to the device


def test_on_a_cpu_a_batch_is_prepared_when_it_is_asked_for():
    done = []
    batches = loader.DeviceBatches([1, 2, 3], lambda batch, device: done.append(batch) or -batch, torch.device("cpu"))
    assert done == [] and next(batches) == -1 and done == [1]
    assert list(batches) == [-2, -3]


class Stream:
    """Stands for a CUDA stream: writes down what waits for it and what runs on it."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Recorded(torch.Tensor):
    def record_stream(self, stream):
        stream.log.append(f"batch {int(self)} is used on {stream.name}")


def test_on_cuda_a_batch_is_prepared_one_ahead(monkeypatch):
    log = []
    main, side = Stream(log, "main"), Stream(log, "side")
    active = [main]

    @contextmanager
    def on(stream):
        active.append(stream)
        yield
        active.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: active[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)

    def prepare(number, device):
        log.append(f"batch {number} is prepared on {active[-1].name}")
        return {"x": torch.tensor(number).as_subclass(Recorded), "names": ["a"]}

    batches = loader.DeviceBatches([1, 2], prepare, torch.device("cuda"))
    assert [int(next(batches)["x"]), log.append("update 1"), int(next(batches)["x"])] == [1, None, 2]
    assert log == [
        "side waits for main",
        "batch 1 is prepared on side",
        "main waits for side",
        "batch 1 is used on main",
        "batch 2 is prepared on side",
        "update 1",
        "main waits for side",
        "batch 2 is used on main",
    ]
    assert list(batches) == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_prepared_on_cuda_are_complete_when_used():
    device = torch.device("cuda", torch.cuda.current_device())

    def prepare(batch, device):
        x = batch.to(device, non_blocking=True)
        for _ in range(200):
            x = x * 1.0
        return {"x": x + 1}

    hosts = [torch.full((1 << 22,), float(i)).pin_memory() for i in range(20)]
    sums = [batch["x"].mean() for batch in loader.DeviceBatches(hosts, prepare, device)]
    assert torch.stack(sums).tolist() == [i + 1.0 for i in range(20)]


# ---------------------------------------------------------------- shared memory


def sampler_of(batches, micro_batch=8):
    sampler = StreamSampler(100, micro_batch, 1)
    sampler.stop = batches
    return sampler


def test_a_shared_memory_file_system_that_is_too_small_is_named(tmp_path, monkeypatch):
    sample = {"views": [torch.zeros(1000, 1000)], "key": torch.tensor(1)}  # 4 MB
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: SimpleNamespace(free=64e6))
    # two workers with two batches each, and the one that is trained on
    with pytest.raises(InputError, match=r"64 MB free, about 160 MB needed .*--shm-size.*--ipc=host.*--workers"):
        loader.check_shared_memory(sample, sampler_of(100), workers=2, folder=tmp_path)
    loader.check_shared_memory(sample, sampler_of(100, micro_batch=3), workers=2, folder=tmp_path)
    # a run of one batch, no loading processes, no such file system
    loader.check_shared_memory(sample, sampler_of(1), workers=2, folder=tmp_path)
    loader.check_shared_memory(sample, sampler_of(100), workers=0, folder=tmp_path)
    loader.check_shared_memory(sample, sampler_of(100), workers=2, folder=tmp_path / "none")
    # every process of the machine has its own loading processes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 process"):
        loader.check_shared_memory(sample, sampler_of(100, micro_batch=3), workers=2, folder=tmp_path)
