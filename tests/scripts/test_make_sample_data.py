"""The data set of the demo: synthetic without a network, real and checked with one, made once."""

import gzip
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from common.data.datalist import read_cases
from common.data.volume_io import read_image, read_label
from common.errors import InputError
from Finetune.presets import load_preset
from scripts import make_sample_data


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return make_sample_data.make(tmp_path_factory.mktemp("sample") / "sample_abdomen", synthetic=True)


def test_layout(synthetic):
    a, b = read_cases(synthetic)
    # the DICOM scan validates fold 0
    assert (a.fold, b.fold) == (1, 0) and b.image.is_dir()
    pretraining = {case.image for case in read_cases(synthetic, section="pretraining")}
    assert a.image in pretraining and b.image not in pretraining and len(pretraining) == 3
    # as in the real pair the second has no kidneys
    for case, missing in ((a, set()), (b, {2, 3})):
        image = read_image(case.image)
        label = read_label(case.label, image)
        assert set(label.unique().tolist()) == set(range(14)) - missing
        liver, air = image[label == 6], image[label == 0]
        assert 60 < liver.mean() < 150 and air.min() < -900
    assert (
        make_sample_data.is_synthetic(synthetic.parent)
        and "NOT REAL CT" in (synthetic.parent / "README.txt").read_text()
    )


def test_a_second_call_does_nothing(synthetic, monkeypatch):
    monkeypatch.setattr(make_sample_data, "write_synthetic", None)
    monkeypatch.setattr(make_sample_data, "download", None)
    before = synthetic.stat().st_mtime_ns
    assert make_sample_data.make(synthetic.parent) == synthetic and synthetic.stat().st_mtime_ns == before


def test_an_incomplete_folder_is_made_again(tmp_path):
    out = tmp_path / "s"
    make_sample_data.make(out, synthetic=True)
    (out / "labelsTs/abdomen_b.nii.gz").unlink()
    make_sample_data.make(out, synthetic=True)
    assert make_sample_data.is_complete(out) and [p.name for p in tmp_path.iterdir()] == ["s"]


def test_without_a_network_the_scans_are_synthetic(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_sample_data, "download", lambda package, folder: None)
    make_sample_data.make(tmp_path / "s")
    assert "SYNTHETIC" in capsys.readouterr().out and make_sample_data.is_synthetic(tmp_path / "s")


def test_a_failed_download_returns_none(tmp_path, monkeypatch):
    monkeypatch.setattr(make_sample_data.sys, "executable", "/nowhere/python")
    assert make_sample_data.download(make_sample_data.SLICERIO, tmp_path) is None


def test_another_archive_is_refused_and_leaves_nothing(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    with pytest.raises(InputError, match="SHA-256"):
        make_sample_data.make(tmp_path / "s", archive=tmp_path / "x.tar.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar.gz"]


def test_a_trunk_is_read_in_ras(tmp_path):
    """A file in the layout of slicerio's: its axes point left, posterior and superior."""
    hu = np.arange(24, dtype="<i4").reshape(2, 3, 4)
    header = (
        "NRRD0004\ntype: int\nsizes: 2 3 4\nspace directions: (-3,0,0) (0,-3,0) (0,0,10)\n"
        "encoding: gzip\nspace origin: (5,6,-7)\n\n"
    )
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr(make_sample_data.TRUNK, header.encode() + gzip.compress(hu.tobytes(order="F")))
    found, affine = make_sample_data.read_trunk(tmp_path / "x.whl")
    np.testing.assert_array_equal(found, hu)
    np.testing.assert_array_equal(affine, [[3, 0, 0, -5], [0, 3, 0, -6], [0, 0, 10, -7], [0, 0, 0, 1]])


def test_ids_are_mapped_to_those_of_btcv():
    names = {1: "spleen", 2: "right kidney", 5: "liver", 7: "pancreas", 15: "oesophagus", 52: "aorta", 64: "portal"}
    for theirs, name in names.items():
        assert make_sample_data.ORGANS[make_sample_data.TO_BTCV[theirs]].startswith(name)
    assert sorted(make_sample_data.TO_BTCV.values()) == sorted(make_sample_data.ORGANS) == list(range(1, 14))


def test_the_structures_of_the_demo(synthetic):
    """The labels of the demo are those of BTCV with the ids of scripts/demo.yaml."""
    btcv, structures = (read_cases(synthetic.parent / name) for name in make_sample_data.LISTS)
    names = load_preset(make_sample_data.DEMO_PRESET).labels
    for a, b in zip(btcv, structures):
        assert a.fold == b.fold
        image = read_image(b.image)
        # The demo trains on the upper part of the scan.
        slices = image.shape[3]
        assert torch.equal(read_image(a.image)[..., -slices:].as_tensor(), image.as_tensor())
        theirs = read_label(a.label, read_image(a.image))[..., -slices:]
        ours = read_label(b.label, image)
        for number, mine in make_sample_data.BTCV_TO_STRUCTURES.items():
            assert make_sample_data.ORGANS[number] == names[mine]
            assert torch.equal((theirs == number).as_tensor(), (ours == mine).as_tensor())
    assert set(make_sample_data.TO_STRUCTURES.values()) == set(names) - {0}


def test_the_synthetic_dicom_scan_is_a_complete_series(synthetic):
    _, b = read_cases(synthetic)
    image = read_image(b.image)
    assert torch.isfinite(image.as_tensor()).all() and image.shape[3] == len(list(b.image.iterdir()))
    np.testing.assert_allclose(np.asarray(image.pixdim), [2, 2, 3], atol=1e-5)


@pytest.mark.slow
def test_the_real_scans(tmp_path):
    """Labels lie on their organs: the HU inside are those of a liver, of an aorta with and without contrast."""
    listing = make_sample_data.make(tmp_path / "s")
    if make_sample_data.is_synthetic(tmp_path / "s"):
        pytest.skip("no network")
    # the download was removed
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    a, b = read_cases(listing)
    for case, liver, aorta, organs in ((a, (20, 60), (25, 60), 12), (b, (70, 110), (140, 260), 8)):
        image = read_image(case.image)
        label = read_label(case.label, image)
        hu = image.as_tensor()
        assert liver[0] < hu[label.as_tensor() == 6].mean() < liver[1]
        assert aorta[0] < hu[label.as_tensor() == 8].mean() < aorta[1]
        found = set(label.unique().tolist()) - {0}
        assert found <= set(make_sample_data.ORGANS) and len(found) >= organs
    _, chest, trunk = (read_image(case.image) for case in read_cases(listing, section="pretraining"))
    assert chest.shape == (1, 233, 167, 191) and trunk.shape == (1, 128, 128, 34)
    # An erect spine: bone behind the middle of the body, in most slices, and none before it.
    bone = (trunk.as_tensor()[0, 44:84] > 300).any(dim=0).float().mean(dim=1)
    assert bone[:64].max() > 0.8
    np.testing.assert_allclose(np.asarray(trunk.pixdim), [3.0469, 3.0469, 10], atol=1e-3)
