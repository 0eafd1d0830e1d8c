"""The measurement of the loader's speed counts volumes and crops after the first batch."""

import re

import pytest
import torch
from torch.utils.data import DataLoader

from common.data.loader import disk_bytes, measure_loader


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_volumes_and_crops_after_the_first_are_counted(workers):
    text = measure_loader(DataLoader(torch.arange(20), batch_size=4, num_workers=workers), len, crops=3)
    batches, seconds = map(float, re.search(r"(\d+) batches in ([\d.]+) s", text).groups())
    volumes, crops = (float(re.search(rf"([\d.]+) {unit}/s", text)[1]) for unit in ("volumes", "crops"))
    assert (
        batches == 4 and abs(volumes * seconds - 16) <= 0.06 * volumes and crops == pytest.approx(3 * volumes, rel=0.01)
    )


def test_bytes_read_from_disk_are_counted():
    assert disk_bytes() >= 0
