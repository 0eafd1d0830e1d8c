"""All fault-injection trials (driver.py) as one test."""

import pytest

from tests.helpers import run_module


@pytest.mark.slow
def test_every_trial_ends_as_the_undisturbed_run(tmp_path):
    # a bound on hanging, not on speed
    run_module("tests.reliability.driver", "--table", tmp_path / "table.md", timeout=2400)
    assert (tmp_path / "table.md").read_text().count("\n| ") > 20
