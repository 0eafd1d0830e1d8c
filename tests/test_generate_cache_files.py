"""generate_cache_files.py builds the cache that training reads."""

import json
import re

import pytest

import generate_cache_files
from common.cache import build
from common.data.datalist import read_cases
from common.data.preprocessing import Preprocessing
from common.errors import InputError
from tests.common.made import labelled, nifti


@pytest.fixture
def listing(tmp_path):
    image, label = labelled(tmp_path)
    cases = [{"image": image.name, "label": label.name}]
    (tmp_path / "list.json").write_text(json.dumps({"training": cases, "pretraining": [image.name]}))
    return tmp_path / "list.json"


def run(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["generate_cache_files.py", *map(str, flags)])
    generate_cache_files.main()


def test_pretraining_finds_the_volumes(listing, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--datalist", listing, "--section", "pretraining", "--cache_dir", tmp_path / "cache")
    assert "1 of 1 volumes" in capsys.readouterr().out
    monkeypatch.setattr(build, "_write_volume", None)
    cases = read_cases(listing, section="pretraining")
    assert len(build.build_cache(cases, Preprocessing(), tmp_path / "cache")) == 1


def test_finetuning_finds_the_volumes_with_labels(listing, tmp_path, monkeypatch):
    flags = ["--labels", "--spacing", "5", "--low", "-175", "--high", "250"]
    run(monkeypatch, "--datalist", listing, "--cache_dir", tmp_path / "cache", *flags)
    monkeypatch.setattr(build, "_write_volume", None)
    settings = Preprocessing(spacing=(5.0, 5.0, 5.0), low=-175, high=250)
    (volume,) = build.build_cache(read_cases(listing), settings, tmp_path / "cache")
    assert volume.has_label


def test_a_bad_file_ends_in_an_error_unless_allowed(tmp_path, monkeypatch, capsys):
    nifti(tmp_path / "scans/good.nii.gz")
    (tmp_path / "scans/bad.nii.gz").write_bytes(b"nothing")
    flags = ["--datalist", tmp_path / "scans", "--cache_dir", tmp_path / "cache"]
    with pytest.raises(InputError, match="1 of 2 volumes cannot be used"):
        run(monkeypatch, *flags)
    assert re.search(r"bad\.nii\.gz: .*Not a gzipped file", capsys.readouterr().out)
    run(monkeypatch, *flags, "--allow_failures")
    assert "1 of 2 volumes" in capsys.readouterr().out


def test_shards_share_a_list_and_together_make_all(tmp_path, monkeypatch, capsys):
    for seed in range(5):
        nifti(tmp_path / f"scans/{seed}.nii.gz", seed=seed)
    flags = ["--datalist", tmp_path / "scans", "--cache_dir", tmp_path / "cache"]
    for shard, count in (("0/2", 3), ("1/2", 2)):
        run(monkeypatch, *flags, "--shard", shard)
        assert f"{count} of {count} volumes" in (printed := capsys.readouterr().out) and f"{count} built" in printed
    run(monkeypatch, *flags, "--report")
    printed = capsys.readouterr().out
    assert "5 of 5 volumes" in printed and "0 built" in printed and "spacing D as scanned" in printed
    assert "skipped" not in printed
    nifti(tmp_path / "scans/masks/0.nii.gz")
    run(monkeypatch, *flags, "--report")
    printed = capsys.readouterr().out
    assert "; 1 files or folders skipped" in printed and f"  skipped {tmp_path}/scans/masks: named as" in printed
    with pytest.raises(InputError, match="--shard 2/2: expected i/n"):
        run(monkeypatch, *flags, "--shard", "2/2")


def test_dry_run_verify_and_prune(tmp_path, monkeypatch, capsys):
    for seed in range(3):
        nifti(tmp_path / f"scans/{seed}.nii.gz", seed=seed)
    flags = ["--datalist", tmp_path / "scans", "--cache_dir", tmp_path / "cache"]
    run(monkeypatch, *flags, "--dry_run")
    assert "3 volumes, 0 of them cached already" in capsys.readouterr().out and not (tmp_path / "cache").exists()
    run(monkeypatch, *flags)
    run(monkeypatch, "--verify", "--cache_dir", tmp_path / "cache")
    assert "3 volumes, all complete" in capsys.readouterr().out
    (tmp_path / "scans/1.nii.gz").unlink()
    run(monkeypatch, *flags, "--prune", "--dry_run")
    assert "would remove 1 volumes" in capsys.readouterr().out
    run(monkeypatch, *flags, "--prune")
    next((tmp_path / "cache").glob("*/image.b2nd")).write_bytes(b"broken")
    with pytest.raises(InputError, match="1 of 2 volumes are damaged"):
        run(monkeypatch, "--verify", "--cache_dir", tmp_path / "cache")


def test_a_preset_brings_its_cases_labels_and_settings(listing, tmp_path, monkeypatch):
    listing.rename(tmp_path / "dataset.json")
    run(monkeypatch, "--preset", "sample_abdomen", "--data_root", tmp_path, "--cache_dir", tmp_path / "cache")
    monkeypatch.setattr(build, "_write_volume", None)
    settings = Preprocessing(spacing=(3, 3, 3), low=-175, high=250)
    assert build.build_cache(read_cases(tmp_path / "dataset.json"), settings, tmp_path / "cache")[0].has_label


def test_a_preset_takes_a_list_with_its_root(listing, tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    listing.rename(tmp_path / "lists/list.json")
    flags = [
        "--preset",
        "sample_abdomen",
        "--datalist",
        tmp_path / "lists/list.json",
        "--cache_dir",
        tmp_path / "cache",
    ]
    # no such file in lists/
    with pytest.raises(InputError, match="1 of 1 volumes cannot be used"):
        run(monkeypatch, *flags)
    run(monkeypatch, *flags, "--data_root", tmp_path)


def test_datasets_by_name(tmp_path, monkeypatch, capsys):
    nifti(tmp_path / "data/BTCV/imagesTr/img0001.nii.gz")
    nifti(tmp_path / "data/BTCV/imagesTr/img0035.nii.gz", seed=1)
    run(monkeypatch, "--datasets", "1k", "--data_root", tmp_path / "data", "--cache_dir", tmp_path / "cache")
    printed = capsys.readouterr().out
    assert "BTCV: 1 of 24 found" in printed and "TCIAcovid19: 0 of 722 found" in printed and "1 of 1 volumes" in printed
