"""The shape of a NIfTI file without its voxels, and files that are not complete."""

import gzip

import numpy as np
import pytest

from common.data import nifti
from common.errors import InputError
from tests.common.made import nifti as write

ARRAY = np.random.default_rng(0).integers(-1000, 1000, (9, 8, 7), dtype=np.int16)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_the_shape_needs_no_voxels(tmp_path, monkeypatch, name):
    path = write(tmp_path / name, ARRAY)
    monkeypatch.setattr(nifti, "read", None)
    assert nifti.read_shape(path) == (9, 8, 7)


def test_several_gzip_members_are_one_file(tmp_path):
    content = write(tmp_path / "a.nii", ARRAY).read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))
    assert nifti.read_shape(tmp_path / "b.nii.gz") == (9, 8, 7)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_off_is_an_error(tmp_path, name, kept):
    path = write(tmp_path / name, ARRAY)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=name):
        nifti.read_shape(path)


def test_a_gzip_file_of_fewer_voxels_is_an_error(tmp_path):
    content = write(tmp_path / "a.nii", ARRAY).read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content[:-2]))
    with pytest.raises(InputError, match="b.nii.gz: not a NIfTI volume"):
        nifti.read_shape(tmp_path / "b.nii.gz")
