"""The summary at the start, the dry run and the measured speed: numbers against formulas, and nothing written."""

import pytest
import torch
from torch import nn

from common.distributed import Run
from common.training import speed, summary
from common.training.settings import BatchPlan, LoopSettings
from common.training.speed import Speed
from common.training.summary import start_summary, state_bytes, update_flop

PLAN = BatchPlan(micro_batch=2, accum=3, batch=6, steps_per_epoch=5, total_steps=50)
RUN = Run(torch.device("cpu"))


class Linear(nn.Module):
    """A method of one layer, 10 -> 20 without bias, and a frozen copy of it."""

    num_parts = 1

    def __init__(self):
        super().__init__()
        self.layer, self.teacher = nn.Linear(10, 20, bias=False), nn.Linear(10, 20, bias=False).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(20))

    def forward(self, batch, step=0, part=0):
        return {"a": self.layer(batch["x"]).square().sum(), "logged only": self.teacher(batch["x"]).sum()}


class Reads(Linear):
    def forward(self, batch, step=0, part=0):
        return {"a": self.layer(batch["x"]).sum() * batch["x"].sum().item()}


class Samples:
    """Samples that need a gradient, so that the layer has two products in the backward pass."""

    def __getitem__(self, key):
        return {"x": torch.zeros(7, 10)}


def weights(step):
    return {"a": 1.0}


def test_operations_are_those_of_the_matrix_products():
    product = 2 * 7 * 10 * 20
    # forward of layer and teacher, and the gradient of the weights: the input needs none
    assert update_flop(Linear(), Samples(), weights, PLAN) == 6 * 3 * product


def test_a_method_that_needs_values_is_not_counted():
    assert update_flop(Reads(), Samples(), weights, PLAN) is None
    text = start_summary("title", {"data": "three"}, Reads(), LoopSettings(out_dir="run"), PLAN, RUN, None)
    assert "compute  not counted" in text and "time     measured after the first updates" in text


def test_other_ranks_do_not_count(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert update_flop(Linear(), Samples(), weights, PLAN) is None


def test_memory_is_that_of_the_weights_and_adamw():
    settings = LoopSettings(out_dir="run")
    assert state_bytes(Linear(), settings, RUN) == 4 * (200 * 4 + 200 + 20)
    settings.precision.fsdp = True
    assert state_bytes(Linear(), settings, Run(torch.device("cpu"), world_size=2)) == 4 * (500 + 20)


def test_the_summary_fits_on_a_screen():
    text = start_summary("title", {"data": "three"}, Linear(), LoopSettings(out_dir="run"), PLAN, RUN, 4.2e12)
    lines = text.splitlines()
    assert lines[:2] == ["title", "  data     three"] and len(lines) < 20 and max(map(len, lines)) <= 120
    for part in ("200 trained, 200 not trained", "6 volumes: 1 process(es) x 2 x 3", "50: 100 epochs x 5", "4.2 TFLOP"):
        assert part in text


def test_the_time_is_bounded_by_the_rate_of_matrix_products(monkeypatch):
    monkeypatch.setattr(summary, "matmul_rate", lambda *args: 2e12)
    # 50 updates of 36 TFLOP on one process, and on two
    for processes, words in ((1, "at least about 15 min, at 2 TFLOP/s"), (2, "at least about 8 min")):
        assert words in summary.time_text(
            36e12, LoopSettings(out_dir="run"), PLAN, Run(RUN.device, world_size=processes)
        )


def test_the_first_interval_is_not_used(monkeypatch):
    clock = iter([0.0, 100.0, 101.0, 103.0, 110.0, 114.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    measured = Speed()
    measured.start(0)
    assert measured.seconds_per_update(10) == 10.0 and not measured.has_first_estimate
    # its end is the start of the next interval
    assert measured.seconds_per_update(12) == pytest.approx(1.0) and measured.has_first_estimate
