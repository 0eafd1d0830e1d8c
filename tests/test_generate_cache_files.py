"""The command line: what it makes is what training finds."""

import json

import pytest

import generate_cache_files
from common import cache
from common.config import InputError
from common.datalist import read_cases
from common.volumes import Preprocessing
from tests.common.data import labelled, nifti


@pytest.fixture
def listing(tmp_path):
    image, label = labelled(tmp_path)
    entries = [{"image": image.name, "label": label.name}]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries, "pretraining": [image.name]}))
    return tmp_path / "list.json"


def run(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["generate_cache_files.py", *map(str, flags)])
    generate_cache_files.main()


def test_pretraining_finds_the_entries(listing, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--datalist", listing, "--section", "pretraining", "--cache_dir", tmp_path / "cache")
    assert "1 of 1 volumes" in capsys.readouterr().out
    monkeypatch.setattr(cache, "_build", None)
    cases = read_cases(listing, section="pretraining")
    assert len(cache.ensure(cases, Preprocessing(), tmp_path / "cache")) == 1


def test_finetuning_finds_the_entries_with_labels(listing, tmp_path, monkeypatch):
    flags = ["--labels", "--spacing", "5", "--low", "-175", "--high", "250"]
    run(monkeypatch, "--datalist", listing, "--cache_dir", tmp_path / "cache", *flags)
    monkeypatch.setattr(cache, "_build", None)
    settings = Preprocessing(spacing=(5.0, 5.0, 5.0), low=-175, high=250)
    (entry,) = cache.ensure(read_cases(listing), settings, tmp_path / "cache")
    assert entry.has_label


def test_a_bad_file_ends_in_an_error_unless_allowed(tmp_path, monkeypatch, capsys):
    nifti(tmp_path / "scans/good.nii.gz")
    (tmp_path / "scans/bad.nii.gz").write_bytes(b"nothing")
    flags = ["--datalist", tmp_path / "scans", "--cache_dir", tmp_path / "cache"]
    with pytest.raises(InputError, match="1 of 2 volumes cannot be used"):
        run(monkeypatch, *flags)
    assert "bad.nii.gz: found a file that is not gzip" in capsys.readouterr().out
    run(monkeypatch, *flags, "--allow_failures")
    assert "1 of 2 volumes" in capsys.readouterr().out
