"""Running means: what counts, and what is left of them after a restart on as many ranks or on others."""

import pytest
import torch

from common.distributed import Run
from common.training.running_mean import RunningMean

CPU = torch.device("cpu")


def filled(*rows):
    means = RunningMean()
    for value, made in rows:
        means.add({"a": torch.tensor(value), "b": torch.tensor(2 * value)}, weight=torch.tensor(made))
        means.add({"skipped": 1 - torch.tensor(made)})
    means.add({"once": torch.tensor(7.0)})
    return means


def test_values_of_updates_that_were_not_made_do_not_count():
    means = filled((1.0, 1.0), (float("nan"), 0.0), (4.0, 1.0))
    assert means.read() == {"a": 2.5, "b": 5.0, "skipped": pytest.approx(1 / 3), "once": 7.0}


def test_restored_is_the_same_and_goes_on():
    means = filled((1.0, 1.0), (3.0, 1.0))
    again = RunningMean.from_state(means.state(), Run(CPU, 0, 1))
    assert again.read() == means.read()
    for one in (means, again):
        one.add({"a": torch.tensor(0.3), "b": torch.tensor(0.1)}, weight=torch.tensor(1.0))
    assert again.read() == means.read()
    assert RunningMean.from_state(RunningMean().state(), Run(CPU, 0, 1)).read() == {}


def test_another_number_of_ranks_takes_the_mean_of_the_ranks():
    state = filled((1.0, 1.0)).state()
    state["rows"] = torch.cat([state["rows"], filled((3.0, 1.0)).state()["rows"]])  # two ranks
    assert RunningMean.from_state(state, Run(CPU, 1, 2)).read()["a"] == 3.0
    assert (
        RunningMean.from_state(state, Run(CPU, 2, 4)).read()["a"]
        == RunningMean.from_state(state, Run(CPU, 0, 1)).read()["a"]
        == 2.0
    )
