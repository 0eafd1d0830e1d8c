"""Cases in published layouts, folds, nested subsets, label values."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from common.cli import parse
from common.data.datalist import Case
from common.errors import InputError
from Finetune.cases import (
    development_and_test,
    few_labels,
    find_cases,
    label_for,
    map_values,
    split,
    with_mapped_labels,
)
from Finetune.presets import load_preset
from Finetune.settings import FinetuneSettings
from tests.helpers import touch


def names_of(cases):
    return [case.name for case in cases]


def test_btcv_folds_and_nested_lists(tmp_path, capsys):
    numbers = [*range(1, 11), *range(21, 41)]
    touch(tmp_path, *[f"img/img{n:04}.nii.gz" for n in numbers], *[f"label/label{n:04}.nii.gz" for n in numbers])
    preset = load_preset("BTCV")
    cases = find_cases(preset, tmp_path)
    assert len(cases) == 30 and cases[0].label == tmp_path / "label/label0001.nii.gz"
    training, validation = split(cases, preset, 0)
    assert names_of(validation) == [f"img{n:04}" for n in range(35, 41)] and len(training) == 24
    others = [split(cases, preset, fold)[1] for fold in range(5)]
    # each case validates once
    assert sorted(sum(map(names_of, others), [])) == sorted(names_of(cases))
    assert [len(fold) for fold in others] == [6] * 5
    lists = {n: set(names_of(few_labels(training, preset, count=n))) for n in (3, 6, 12, 24)}
    assert lists[3] < lists[6] < lists[12] < lists[24] == set(names_of(training))
    assert lists[6] == {f"img{n:04}" for n in range(1, 7)}
    assert lists[12] == {f"img{n:04}" for n in [*range(1, 11), 21, 22]}
    with pytest.raises(InputError, match="--fold 5.*0 1 2 3 4"):
        split(cases, preset, 5)
    split(cases[:-1], preset, 0)
    assert "warning: found 5 of the 6" in capsys.readouterr().out
    # fold 0 always has the cases of the papers
    with pytest.raises(InputError, match=r"img: found 0 of the 6.*img0035"):
        split(cases[:24], preset, 0)


@pytest.mark.parametrize(
    "preset, files, count",
    [
        ("AMOS22_CT", ["{}Tr/amos_0001.nii.gz", "{}Va/amos_0408.nii.gz", "{}Tr/amos_0507.nii.gz"], 2),
        ("WORD", ["{}Tr/word_0002.nii.gz", "{}Tr/word_0153.nii.gz"], 2),
    ],
)
def test_nnunet_layouts_without_the_mri_of_amos(tmp_path, preset, files, count):
    for kind in ("images", "labels"):
        touch(tmp_path, *[name.format(kind) for name in files])
    assert len(find_cases(load_preset(preset), tmp_path)) == count


def test_other_layouts_pair_images_and_labels(tmp_path):
    touch(tmp_path / "f", "images/FLARE22_Tr_0001_0000.nii.gz", "labels/FLARE22_Tr_0001.nii.gz")
    (case,) = find_cases(load_preset("FLARE22"), tmp_path / "f")
    assert case.label.name == "FLARE22_Tr_0001.nii.gz"
    touch(tmp_path / "c", "Train/volume-covid19-A-0003_ct.nii.gz", "Train/volume-covid19-A-0003_seg.nii.gz")
    (case,) = find_cases(load_preset("COVID19_20"), tmp_path / "c")
    assert case.label.name.endswith("_seg.nii.gz")
    assert label_for(load_preset("COVID19_20"), case.name, tmp_path / "c/Train") == case.label
    touch(tmp_path / "b", "label/label0035.nii.gz")
    assert label_for(load_preset("BTCV"), "img0035", tmp_path / "b/label").name == "label0035.nii.gz"
    assert label_for(load_preset("BTCV"), "img0036", tmp_path / "b/label") is None


def test_missing_files_are_refused(tmp_path):
    touch(tmp_path, "img/img0001.nii.gz")
    with pytest.raises(InputError, match="label0001.nii.gz.*missing"):
        find_cases(load_preset("BTCV"), tmp_path)
    with pytest.raises(InputError, match="found no dataset.json"):
        find_cases(load_preset("MSD09_Spleen"), tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        find_cases(load_preset("BTCV"), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: found no image.*img/img{case}.nii.gz"):
        find_cases(load_preset("BTCV"), tmp_path / "empty")


def test_folds_come_from_the_list_or_else_from_names(tmp_path):
    entries = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz", "fold": n % 2} for n in range(6)]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    preset = load_preset("MSD03_Liver")
    assert names_of(split(find_cases(preset, tmp_path), preset, 1)[1]) == ["1", "3", "5"]
    cases = [Case(f"case{n}", tmp_path / f"{n}.nii.gz", None, None) for n in range(484)]
    brain = load_preset("MSD01_BrainTumour")
    training, validation = split(cases, brain, 0)
    assert (len(training), len(validation)) == (387, 97)
    # the order of the list does not matter
    assert names_of(split(cases[::-1], brain, 0)[1]) == names_of(validation)
    covid = load_preset("COVID19_20")
    assert [len(part) for part in split(cases[:199], covid, 0)] == [160, 39]


def test_subsets_are_nested_for_each_seed():
    preset = load_preset("MSD06_Lung")
    cases = [Case(f"lung_{n:03}", None, None, None) for n in range(50)]
    for seed in range(3):
        sets = [set(names_of(few_labels(cases, preset, count=n, seed=seed))) for n in (1, 4, 8, 20, 50)]
        assert all(a < b for a, b in zip(sets, sets[1:]))
        assert names_of(few_labels(cases, preset, fraction=0.16, seed=seed)) == names_of(
            few_labels(cases, preset, count=8, seed=seed)
        )
    assert names_of(few_labels(cases, preset, count=8, seed=0)) != names_of(few_labels(cases, preset, count=8, seed=1))
    for wrong in ({"count": 0}, {"count": 51}, {"fraction": 1.2}, {"count": 1, "fraction": 0.5}):
        with pytest.raises(InputError, match="label_"):
            few_labels(cases, preset, **wrong)
    for fraction in ("0", "1.2"):
        with pytest.raises(InputError, match=f"--label_fraction {fraction}.*(more than 0|at most 1)"):
            parse(FinetuneSettings, ["--label_fraction", fraction])


def test_label_values_of_mmwhs_are_mapped_to_ids_once(tmp_path):
    preset = load_preset("MMWHS_CT")
    values = np.array([0, 205, 420, 421, 500, 550, 600, 820, 850, 0, 0, 0], np.uint16).reshape(3, 2, 2)
    path = tmp_path / "ct_train_1001_label.nii.gz"
    nib.save(nib.Nifti1Image(values, np.diag([2, 2, 3, 1.0])), path)
    case = Case("ct_train_1001_image", path, path, None)
    (mapped,) = with_mapped_labels([case], preset, tmp_path / "labels")
    ids = nib.load(mapped.label)
    assert np.asarray(ids.dataobj).flatten().tolist() == [0, 1, 2, 2, 3, 4, 5, 6, 7, 0, 0, 0]
    assert np.array_equal(ids.affine, np.diag([2, 2, 3, 1.0])) and ids.get_data_dtype() == np.uint8
    before = mapped.label.stat().st_mtime_ns
    assert with_mapped_labels([case], preset, tmp_path / "labels") == [mapped]
    assert mapped.label.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="label value 207.*205 420.*MMWHS_CT"):
        map_values(np.array([0, 207]), preset, path)


@pytest.mark.parametrize("or_ids", [False, True])
def test_ids_are_label_values_of_predictions_only(or_ids):
    preset, ids = load_preset("MMWHS_CT"), np.array([0, 3, 7])
    if or_ids:
        assert map_values(ids, preset, "prediction", or_ids=True).tolist() == [0, 3, 7]
    else:
        with pytest.raises(InputError, match="label: .*label value 3"):
            map_values(ids, preset, "label")


def test_two_images_of_one_name_are_refused(tmp_path):
    touch(tmp_path, *[f"{kind}{part}/amos_0001.nii.gz" for kind in ("images", "labels") for part in ("Tr", "Va")])
    with pytest.raises(InputError, match="imagesVa/amos_0001.nii.gz.*amos_0001"):
        find_cases(load_preset("AMOS22_CT"), tmp_path)


def test_more_folds_than_cases_need_no_memory(tmp_path):
    cases = [Case(f"c{n}", tmp_path / f"c{n}.nii") for n in range(4)]
    preset = replace(load_preset("sample_abdomen"), folds=10**12)
    assert [len(split(cases, preset, fold)[1]) for fold in range(4)] == [1] * 4


@pytest.mark.parametrize("share, expected", [(0.0, 0), (0.3, 3), (0.5, 5), (0.99, 9)])
def test_development_and_test_parts_do_not_overlap(tmp_path, share, expected):
    cases = [Case(f"c{n}", tmp_path / f"c{n}.nii") for n in range(10)]
    development, test = (names_of(part) for part in development_and_test(cases, share))
    assert len(development) == expected and sorted(development + test) == names_of(cases)
    assert set(names_of(development_and_test(cases[::-1], share)[0])) == set(development)


def test_a_single_held_out_case_is_a_test_case(tmp_path):
    cases = [Case("c", tmp_path / "c.nii")]
    assert development_and_test(cases, 0.5) == ([], cases)
