"""A long run with faults (long_run.py), shortened. The numbers of 5,000 updates are in docs/reliability.md."""

import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import ROOT
from tests.reliability.long_run import LEAST_PROCESSES, UNITS, across_processes, trend


@pytest.mark.slow
def test_a_long_run_ends_as_undisturbed_with_flat_use():
    command = [sys.executable, "-m", "tests.reliability.long_run", "--updates", "600"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("growth, flat", [(0.0, True), (0.5, True), (20.0, False)])
def test_a_trend_tells_growth_from_noise(growth, flat):
    steps = np.arange(500)
    noise = np.random.default_rng(0).normal(0.0, 1.0, 500)
    found = trend(list(steps), list(100.0 + growth * steps / 499 + noise))
    assert found.flat == flat and found.growth == pytest.approx(growth, abs=0.5)


@pytest.mark.parametrize("growth, flat", [(0.9, True), (1.1, False)])
def test_one_per_cent_of_steady_growth_is_noticed(growth, flat):
    steps = list(range(48))
    assert trend(steps, [100.0 + growth * step / 47 for step in steps]).flat == flat


def test_a_step_is_no_growth():
    steps = np.arange(500)
    noise = np.random.default_rng(0).normal(0.0, 0.1, 500)
    found = trend(list(steps), list(100.0 + 5.0 * (steps > 250) + noise))
    assert found.flat and found.growth > 4.0


@pytest.mark.parametrize("growth, flat", [(0.0, True), (1.0, False)])
def test_growth_across_processes_is_noticed(growth, flat):
    samples = [
        {"process": process, "step": step} | dict.fromkeys(UNITS, 100 + growth * process)
        for process in range(LEAST_PROCESSES)
        for step in (0, 10)
    ]
    assert [found.flat for found in across_processes(samples).values()] == [flat] * len(UNITS)
    assert across_processes(samples[2:]) == {}
