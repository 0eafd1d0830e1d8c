"""The data sets of the papers: which files are used, and what is printed about missing ones."""

import json

import pytest

from common.data.datalist import Case
from common.errors import InputError
from Pretrain import catalog
from Pretrain.catalog import find, load, read_datasets
from tests.helpers import touch


def test_the_papers_tables():
    assert {s.name: s.count for s in load("1k")} == {"BTCV": 24, "TCIAcovid19": 722}
    # the sum of the rows; the papers print 10502
    assert sum(s.count for s in load("10k")) == 10452
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
    printed = capsys.readouterr().out
    # the folder labelsTr, the label files and the six cases of fold 0
    assert len(cases) == 24 and "BTCV: 24 of 24 found\nBTCV: skipped 38 files or folders" in printed
    used = {case.image.name for case in cases}
    assert not used & {f"img{n:04d}.nii.gz" for n in range(35, 41)} and all(n.startswith("img") for n in used)


def test_the_users_layout_works_as_it_is(tmp_path, capsys):
    touch(tmp_path, "BTCV/imagesTr/img0001.nii.gz", "TCIAcovid19/volume-1.nii.gz", "TCIAcovid19/sub/volume-2.nii.gz")
    touch(tmp_path, "Luna-jx/subset0/1.2.3.nii.gz", "Luna-jx/masks/1.2.3.nii.gz", "Luna-jx/seg-lungs-LUNA16/1.mhd")
    names = [case.name for case in read_datasets(["1k", "LUNA16"], tmp_path)]
    wanted = ["BTCV/imagesTr/img0001", "TCIAcovid19/sub/volume-2", "TCIAcovid19/volume-1", "LUNA16/subset0/1.2.3"]
    assert names == wanted
    printed = capsys.readouterr().out
    assert "BTCV: 1 of 24 found, 23 fewer" in printed and "LUNA16: 1 of 843 found" in printed


def test_totalsegmentator_uses_the_scans_only(tmp_path):
    touch(tmp_path, *(f"TotalSegmentator/s000{n}/{f}.nii.gz" for n in range(3) for f in ("ct", "segmentations/liver")))
    (source,) = load("TotalSegmentator")
    assert [case.name for case in find(source, tmp_path)[0]] == [f"TotalSegmentator/s000{n}/ct" for n in range(3)]


def test_a_missing_set_is_reported_with_its_source(tmp_path, capsys):
    touch(tmp_path, "HNSCC/a.nii.gz")
    assert read_datasets(["HNSCC", "STOIC21"], tmp_path) == [Case("HNSCC/a", tmp_path / "HNSCC/a.nii.gz")]
    assert "STOIC21: 0 of 2000 found" in (printed := capsys.readouterr().out) and "CC BY-NC" in printed
    with pytest.raises(InputError, match="found no volume of BTCV"):
        read_datasets(["BTCV"], tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_datasets(["BTCV"], tmp_path / "none")


def test_a_wrong_name_gets_a_hint_and_a_custom_yaml_is_read(tmp_path):
    with pytest.raises(InputError, match="did you mean FLARE23"):
        load("FLARE32")
    own = dict.fromkeys(("description", "where", "licence", "citation", "layout"), "x")
    (tmp_path / "own.yaml").write_text(json.dumps({"name": "own", "folders": ["here"], "count": 1} | own))
    touch(tmp_path, "here/a.nii")
    assert len(read_datasets([str(tmp_path / "own.yaml")], tmp_path)) == 1


def test_a_list_that_contains_itself_is_refused(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        text = f"{{name: {name}, description: x, datasets: [{tmp_path / other}.yaml]}}"
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(InputError, match=r"a\.yaml.*contains itself"):
        load(str(tmp_path / "a.yaml"))
