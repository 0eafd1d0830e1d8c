"""The data sets of the papers: what is taken of their folders, and what is said when it is not there."""

import json

import pytest

from common.data.datalist import Case
from common.errors import InputError
from Pretrain import catalog
from Pretrain.catalog import find, load, read_datasets


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_the_papers_tables():
    assert {s.name: s.count for s in load("1k")} == {"BTCV": 24, "TCIAcovid19": 722}
    assert sum(s.count for s in load("10k")) == 10452  # the rows; the papers print 10502
    for name in catalog.available():
        for source in load(name):
            assert source.where and source.licence and source.citation and source.layout


@pytest.mark.parametrize("layout", ["imagesTr", "RawData/Training/img", "img", "."])
def test_btcv_without_its_fold_0_and_without_labels(tmp_path, layout, capsys):
    numbers = [*range(1, 11), *range(21, 41)]
    touch(tmp_path, *(f"BTCV/{layout}/img{n:04d}.nii.gz" for n in numbers))
    touch(tmp_path, *(f"BTCV/{layout}/label{n:04d}.nii.gz" for n in numbers))
    touch(tmp_path, *(f"BTCV/labelsTr/img{n:04d}.nii.gz" for n in numbers), "BTCV/imagesTs/img0061.nii.gz")
    cases = read_datasets(["BTCV"], tmp_path)
    assert len(cases) == 24 and "BTCV: 24 of 24 found\n" in capsys.readouterr().out
    taken = {case.image.name for case in cases}
    assert not taken & {f"img{n:04d}.nii.gz" for n in range(35, 41)} and all(n.startswith("img") for n in taken)


def test_the_users_layout_works_as_it_is(tmp_path, capsys):
    touch(tmp_path, "BTCV/imagesTr/img0001.nii.gz", "TCIAcovid19/volume-1.nii.gz", "TCIAcovid19/sub/volume-2.nii.gz")
    touch(tmp_path, "Luna-jx/subset0/1.2.3.nii.gz", "Luna-jx/masks/1.2.3.nii.gz", "Luna-jx/seg-lungs-LUNA16/1.mhd")
    names = [case.name for case in read_datasets(["1k", "LUNA16"], tmp_path)]
    wanted = ["BTCV/imagesTr/img0001", "TCIAcovid19/sub/volume-2", "TCIAcovid19/volume-1", "LUNA16/subset0/1.2.3"]
    assert names == wanted
    said = capsys.readouterr().out
    assert "BTCV: 1 of 24 found, 23 fewer" in said and "LUNA16: 1 of 843 found" in said


def test_totalsegmentator_takes_the_scan_and_no_organ(tmp_path):
    touch(tmp_path, *(f"TotalSegmentator/s000{n}/{f}.nii.gz" for n in range(3) for f in ("ct", "segmentations/liver")))
    (source,) = load("TotalSegmentator")
    assert [case.name for case in find(source, tmp_path)] == [f"TotalSegmentator/s000{n}/ct" for n in range(3)]


def test_a_missing_set_says_where_to_get_it_and_all_missing_is_an_error(tmp_path, capsys):
    touch(tmp_path, "HNSCC/a.nii.gz")
    assert read_datasets(["HNSCC", "STOIC21"], tmp_path) == [Case("HNSCC/a", tmp_path / "HNSCC/a.nii.gz")]
    assert "STOIC21: 0 of 2000 found" in (said := capsys.readouterr().out) and "CC BY-NC" in said
    with pytest.raises(InputError, match="found no volume of BTCV"):
        read_datasets(["BTCV"], tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_datasets(["BTCV"], tmp_path / "none")


def test_a_wrong_name_names_the_nearest_and_ones_own_yaml_works(tmp_path):
    with pytest.raises(InputError, match="did you mean FLARE23"):
        load("FLARE32")
    own = dict.fromkeys(("description", "where", "licence", "citation", "layout"), "ours")
    (tmp_path / "own.yaml").write_text(json.dumps({"name": "own", "folders": ["here"], "count": 1} | own))
    touch(tmp_path, "here/a.nii")
    assert len(read_datasets([str(tmp_path / "own.yaml")], tmp_path)) == 1


@pytest.mark.parametrize("folder", ["../elsewhere", "/elsewhere", "a/../../b"])
def test_a_data_set_of_ones_own_stays_below_the_data_root(tmp_path, folder):
    words = dict.fromkeys(("name", "description", "where", "licence", "citation", "layout"), "x")
    (tmp_path / "own.yaml").write_text(json.dumps(words | {"count": 1, "folders": [folder]}))
    with pytest.raises(InputError, match=f"own.yaml: folders: found '{folder}'"):
        load(str(tmp_path / "own.yaml"))
