"""All fault-injection trials (driver.py) as one test."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.slow
def test_every_trial_ends_as_the_undisturbed_run(tmp_path):
    command = [sys.executable, "-m", "tests.reliability.driver", "--table", str(tmp_path / "table.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
    assert (tmp_path / "table.md").read_text().count("\n| ") > 20
