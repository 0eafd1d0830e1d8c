"""Batch norm's running statistics: of updates that were made, and of all ranks."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from common.distributed import Run
from common.training.nonfinite import BatchNormStatistics
from tests.common.training.test_nonfinite import Poisoned
from tests.common.training.toy import run_toy


class Normed(Poisoned):
    """A toy that normalises its input over the batch, and is not finite there."""

    def __init__(self, *positions):
        super().__init__(*positions)
        self.layers.insert(0, nn.BatchNorm1d(4))

    @property
    def grad_norm_parameter(self):
        return self.layers[1].weight

    def forward(self, batch, step=0, part=0):
        bad = self.keys & {round(float(y), 4) for y in batch["y"]}
        return super().forward(batch | {"x": batch["x"] * (float("nan") if bad else 1.0)}, step)


def statistics(method):
    return BatchNormStatistics(method).buffers


def test_a_bad_update_leaves_them_alone(tmp_path):
    method, _ = run_toy(tmp_path / "bad", Normed(9), epochs=1)  # the last of three updates
    by_hand, _ = run_toy(tmp_path / "two", Normed(), samples_per_epoch=8, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(statistics(method), statistics(by_hand), strict=True))
    assert all(buffer.isfinite().all() for buffer in statistics(method))


def test_methods_without_have_none():
    empty = BatchNormStatistics(nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm1d(2), nn.LayerNorm(2)))
    empty.remember()
    empty.restore_if_skipped(torch.tensor(0.0))
    assert empty.buffers == []


def worker(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    method, _ = run_toy(folder / "run", Normed(), run=Run(torch.device("cpu"), rank, 2), epochs=1)
    torch.save(statistics(method), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_they_are_those_of_all_ranks(tmp_path):
    torch.multiprocessing.start_processes(worker, args=(tmp_path,), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    one, _ = run_toy(tmp_path / "one", Normed(), epochs=1)
    torch.testing.assert_close(first[0], statistics(one)[0], rtol=1e-2, atol=0)  # the means: of the same samples
