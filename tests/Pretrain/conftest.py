"""Shared by the tests of pretraining."""

import pytest

from tests.helpers import ct, write_nifti


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder of three small CT-like volumes."""
    folder = tmp_path_factory.mktemp("scans")
    for i in range(3):
        write_nifti(folder / f"scan{i}.nii.gz", ct((40, 36, 30 + 4 * i), seed=i))
    return folder
