"""The speed of the loader, the way of its batches to the device, and the check of shared memory."""

import os
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from common.data import loader
from common.data.loader import Loading
from common.data.sampler import StreamSampler, StreamSamples
from common.errors import InputError


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_volumes_and_crops_after_the_first_are_counted(monkeypatch, workers):
    clock = iter([3.0, 11.0])
    monkeypatch.setattr(loader, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    numbers = DataLoader(torch.arange(20), batch_size=4, num_workers=workers)
    text = loader.measure_loader(numbers, iter(numbers), len, crops=3)
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
    batches = loader.device_batches([1, 2, 3], lambda batch, device: done.append(batch) or -batch, torch.device("cpu"))
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


def test_on_cuda_a_batch_is_asked_for_after_the_update_before_it(monkeypatch):
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

    def loaded():
        for number in (1, 2):
            log.append(f"batch {number} is asked for")
            yield number

    for batch in loader.device_batches(loaded(), prepare, torch.device("cuda")):
        log.append(f"update {int(batch['x'])}")
    assert log == [
        "side waits for main",
        "batch 1 is asked for",
        "batch 1 is prepared on side",
        "main waits for side",
        "batch 1 is used on main",
        "update 1",
        "batch 2 is asked for",
        "batch 2 is prepared on side",
        "main waits for side",
        "batch 2 is used on main",
        "update 2",
    ]


# ---------------------------------------------------------------- shared memory


def sampler_of(batches, micro_batch=8):
    sampler = StreamSampler(100, micro_batch, 1)
    sampler.stop = batches
    return sampler


def test_a_shared_memory_file_system_that_is_too_small_is_named(tmp_path, monkeypatch):
    sample = {"views": torch.zeros(1000, 1000), "key": torch.tensor(1)}  # 4 MB
    loading = Loading(defaultdict(lambda: sample))
    check = partial(loader.check_shared_memory, loading, folder=tmp_path)
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: SimpleNamespace(free=64e6))
    # two workers with two batches of 8 each, and the one that is trained on
    with pytest.raises(InputError, match=r"64 MB free, about 160 MB needed .*--shm-size.*--ipc=host.*--workers"):
        check(sampler_of(100), workers=2)
    check(sampler_of(100, micro_batch=3), workers=2)
    # a run of one batch, no loading processes, no such file system
    check(sampler_of(1), workers=2)
    check(sampler_of(100), workers=0)
    loader.check_shared_memory(loading, sampler_of(100), workers=2, folder=tmp_path / "none")
    # every process of the machine has its own loading processes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 process"):
        check(sampler_of(100, micro_batch=3), workers=2)


class BySampleIndex(dict):
    """A data set whose samples do not depend on the position in the stream."""

    def __getitem__(self, item):
        return super().__getitem__(item[1])


def test_the_largest_of_the_first_samples_counts(tmp_path, monkeypatch):
    # 4 bytes in the first sample, 4 MB in the third
    order = [index for _, index in StreamSamples(sampler_of(1))]
    samples = {index: {"numbers": torch.zeros(size)} for index, size in zip(order, (1, 1, 1_000_000, 1))}
    loading = Loading(BySampleIndex(samples))
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: SimpleNamespace(free=64e6))
    with pytest.raises(InputError, match="about 160 MB needed"):
        loader.check_shared_memory(loading, sampler_of(100), workers=2, folder=tmp_path)


def test_fewer_samples_are_on_their_way_than_in_batches():
    batches, samples = Loading(None), Loading(None, by_sample=True)
    # two batches, by all processes together instead of by each, and the one that is trained on
    assert loader.samples_on_their_way(batches, sampler_of(100), workers=4) == 8 * (4 * 2 + 1)
    assert loader.samples_on_their_way(samples, sampler_of(100), workers=4) == 8 * (2 + 1)
    # never less than two for each process, and no more than there are
    assert loader.samples_on_their_way(samples, sampler_of(100, micro_batch=1), workers=4) == 4 * 2 + 1
    assert loader.samples_on_their_way(samples, sampler_of(1), workers=4) == 8


def test_the_limit_of_open_files_is_raised_for_the_samples(monkeypatch):
    limits = {"soft": 1024, "hard": 4096}
    monkeypatch.setattr(loader.resource, "getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(loader.resource, "setrlimit", lambda _, new: limits.update(zip(limits, new)))
    loader.allow_open_files(500)
    assert limits == {"soft": 1024, "hard": 4096}
    loader.allow_open_files(3000)
    assert limits == {"soft": 3512, "hard": 4096}
    with pytest.raises(InputError, match=r"4096 allowed, 4512 needed for 4000 samples .*ulimit -Hn.*--workers"):
        loader.allow_open_files(4000)


def test_several_processes_load_a_micro_batch():
    loading = Loading(WhoLoads(), collate=list, by_sample=True)
    sampler = sampler_of(3, micro_batch=4)
    of_samples = loader.build_loader(loading, sampler, 2, torch.device("cpu"))
    try:
        made = list(loader.micro_batches(of_samples, loading, 4))
    finally:
        loader.end_workers(of_samples)
    assert [[item for item, _ in batch] for batch in made] == list(sampler)
    assert all(len({worker for _, worker in batch}) == 2 for batch in made)


class WhoLoads:
    """A data set whose samples are what was asked for and the loading process that made it."""

    def __getitem__(self, item):
        return item, get_worker_info().id
