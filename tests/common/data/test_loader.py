"""The loader's measure counts what came and what was waited for."""

import time

import torch
from torch.utils.data import DataLoader

from common.data.loader import disk_bytes, measure_loader


def _sizes(batch):
    return len(batch), 3 * len(batch)


def test_counts_batches_volumes_crops_without_the_first():
    speed = measure_loader(DataLoader(torch.arange(20), batch_size=4), _sizes)
    assert (speed.batches, speed.volumes, speed.crops) == (4, 16, 48)
    speed = measure_loader(DataLoader(torch.arange(20), batch_size=4), _sizes, max_batches=2)
    assert (speed.batches, speed.volumes) == (2, 8)
    assert "volumes/s" in str(speed) and speed.bytes_read >= 0 and disk_bytes() >= 0


def test_waiting_is_the_loaders_time_not_the_works():
    def slow_loader():
        for number in range(6):
            time.sleep(0.01)
            yield [number]

    idle = measure_loader(slow_loader(), _sizes)
    assert idle.waited > 0.9 * idle.seconds
    busy = measure_loader(slow_loader(), _sizes, work=lambda batch: time.sleep(0.03))
    assert 0.04 < busy.waited < 0.6 * busy.seconds


def test_workers_are_counted():
    speed = measure_loader(DataLoader(torch.arange(12), batch_size=2, num_workers=1), _sizes)
    assert speed.volumes == 10
