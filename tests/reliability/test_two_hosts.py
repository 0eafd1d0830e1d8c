"""Training and filling a cache on two hosts (two_hosts.py), where the machine permits network namespaces."""

import warnings

import pytest

from tests.helpers import run_module
from tests.reliability.two_hosts import CACHE_TRIAL, EXIT_UNAVAILABLE, TRIALS


@pytest.mark.slow
def test_two_hosts_end_with_a_reason_and_resume(tmp_path):
    done = run_module("tests.reliability.two_hosts", "--table", tmp_path / "table.md", check=False, timeout=2400)
    if done.returncode == EXIT_UNAVAILABLE:
        # A skipped test does not show its reason by default, a warning does.
        warnings.warn(done.stderr.strip(), stacklevel=1)
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
    rows = (tmp_path / "table.md").read_text()
    assert all(f"| {name} | yes |" in rows for name in (*TRIALS, CACHE_TRIAL))
