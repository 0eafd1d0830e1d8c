"""Shared by the tests of pretraining."""

import pytest

from tests.helpers import write_scans


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder of three small CT-like volumes."""
    return write_scans(tmp_path_factory.mktemp("scans"))
