"""The leakage check finds a scan whatever its name and format, per fold, and writes a clean list."""

import json

import pytest

from common import checkpoint
from common.cache import build
from common.data.datalist import Case, read_cases
from common.data.preprocessing import Preprocessing
from common.errors import InputError
from Finetune import leakage
from scripts import check_leakage
from scripts.synthetic_ct import affine_of, phantom, write_dicom
from tests.common.made import SHAPE, SPACING, labelled, nifti


@pytest.fixture
def data(tmp_path):
    """Pretraining on scans 0, 1, 2; fine-tuning on 0 (as DICOM, another name), 5, 6 in folds 0, 0, 1."""
    for seed in range(3):
        nifti(tmp_path / f"pretrain/volume{seed}.nii.gz", seed=seed)
    write_dicom(tmp_path / "tune/patient", phantom(SHAPE, seed=0)[0], affine_of(SHAPE, SPACING))
    nifti(tmp_path / "tune/patient_label.nii.gz", phantom(SHAPE, seed=0)[1])
    cases = [{"image": "patient", "label": "patient_label.nii.gz", "fold": 0}]
    for seed, fold in ((5, 0), (6, 1)):
        image, label = labelled(tmp_path / "tune", f"case{seed}", seed)
        cases.append({"image": image.name, "label": label.name, "fold": fold})
    (tmp_path / "tune/dataset.json").write_text(json.dumps({"training": cases}))
    return tmp_path


def run(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["leaks", *map(str, flags)])
    check_leakage.main()


def test_overlap_is_found_by_content_per_fold(data, monkeypatch, capsys):
    flags = ["--pretrain", data / "pretrain", "--finetune", data / "tune/dataset.json", "--cache_dir", data / "cache"]
    run(monkeypatch, *flags, "--exclude_leaks", data / "clean.txt")
    printed = capsys.readouterr().out
    assert "fold 0: 1 of 2 cases seen in pretraining: patient" in printed
    assert "fold 1: 0 of 1 cases seen in pretraining\n" in printed
    clean = read_cases(data / "clean.txt")
    assert [(case.name, case.problem) for case in clean] == [("volume1", None), ("volume2", None)]
    # all are in the index now
    monkeypatch.setattr("common.data.volume_io.read_image", None)
    run(monkeypatch, *flags)


def test_overlap_with_the_data_of_a_checkpoint(data, monkeypatch, capsys):
    volumes = build.build_cache(read_cases(data / "pretrain"), Preprocessing(), data / "cache")
    state = {"student": {}, "epoch": 0, "args": {"data": [volume.content_hash for volume in volumes]}}
    checkpoint.save(data / "checkpoint-0.pth", state)
    flags = ["--finetune", data / "tune/dataset.json", "--cache_dir", data / "cache"]
    run(monkeypatch, "--pretrain", data / "checkpoint-0.pth", *flags)
    assert "fold 0: 1 of 2 cases seen in pretraining: patient" in capsys.readouterr().out
    tuned = build.build_cache(read_cases(data / "tune/dataset.json"), Preprocessing(spacing=(5, 5, 5)), data / "cache")
    assert leakage.seen_cases(state, tuned[:2]) == ["patient"]
    assert leakage.seen_cases(state, tuned[2:]) == []
    assert leakage.seen_cases({"model": {}}, tuned) is None


def test_a_preset_is_compared_fold_by_fold(data, monkeypatch, capsys):
    flags = ["--finetune", "sample_abdomen", "--data", data / "tune", "--cache_dir", data / "cache"]
    run(monkeypatch, "--pretrain", data / "pretrain", *flags)
    assert "fold 0: 1 of 2" in capsys.readouterr().out


def test_a_preset_whose_cases_are_missing_is_no_clean_result(data, monkeypatch):
    for kind in ("img", "label"):
        nifti(data / f"btcv/{kind}/{kind}0099.nii.gz")
    flags = ["--finetune", "BTCV", "--data", data / "btcv", "--cache_dir", data / "cache"]
    with pytest.raises(InputError, match="found 0 of the .* validation cases that preset BTCV names"):
        run(monkeypatch, "--pretrain", data / "pretrain", *flags)


def test_a_file_that_cannot_be_read_is_printed(data, capsys):
    (data / "bad.nii.gz").write_bytes(b"x")
    cases = [Case("bad", data / "bad.nii.gz"), *read_cases(data / "pretrain")]
    assert len(check_leakage.content_hashes(cases, data / "cache")) == 3
    assert "not compared" in capsys.readouterr().out
