"""scripts.prepare on fabricated downloads: complete ones become the recipe's layout, others give one message."""

import json
import shlex
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.cli import parse
from common.errors import InputError
from Finetune import presets
from Finetune.cases import find_cases
from Finetune.presets import load_preset
from Pretrain import catalog
from Pretrain.catalog import DataSettings
from scripts import prepare
from tests.helpers import ROOT

SHAPE = (4, 5, 6)
# folders of the downloads: (images, labels), with names as published
FOLDERS = {
    "BTCV": ("RawData/Training/img", "RawData/Training/label"),
    "MMWHS_CT": ("MM-WHS 2017 Dataset/ct_train1", "MM-WHS 2017 Dataset/ct_train1"),
    "WORD": ("WORD-V0.1.0/imagesTr", "WORD-V0.1.0/labelsTr"),
    "COVID19_20": ("COVID-19-20_v2/Train", "COVID-19-20_v2/Train"),
    "FLARE22": ("FLARE22Train/images", "FLARE22Train/labels"),
}
NOT_COMPARED = "not compared with the published number, which is not known here"
LISTED = ("MSD01_BrainTumour", "MSD04_Hippocampus", "MSD06_Lung")


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


def download(name: str, root: Path) -> Path:
    """Write a download with every published file; all images are alike, and all labels."""
    preset = load_preset(name)
    published, layout = preset.published, preset.layout
    count = sum(published.cases) or 3
    cases = published.all_ids() or [f"{published.prefix}{number:04d}" for number in range(1, count + 1)]
    shape = (*SHAPE, preset.channels) if preset.channels > 1 else SHAPE
    values = sorted(preset.label_values or preset.labels)
    label = np.resize(np.array(values, np.int16), SHAPE)
    originals = [write(root / "image.nii.gz", np.arange(np.prod(shape), dtype=np.int16).reshape(shape))]
    originals.append(write(root / "label.nii.gz", label))
    if layout.datalist:
        folders, patterns = [f"{name}/imagesTr", f"{name}/labelsTr"], ["{case}.nii.gz"] * 2
        entries = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in cases]
        (root / name).mkdir()
        content = {"numTraining": count, "training": entries, "test": []}
        (root / name / "dataset.json").write_text(json.dumps(content))
    else:
        folders, patterns = FOLDERS[name], [pattern[0] for pattern in (layout.images, layout.labels)]
    for original, folder, pattern in zip(originals, folders, patterns):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for case in cases:
            shutil.copy(original, root / folder / Path(pattern.replace("{case}", case)).name)
        original.unlink()
    # as in archives made on a Mac
    (root / folders[0] / f"._{Path(patterns[0]).name}").touch()
    return root


def run(name: str, source: Path, out: Path, *flags: str) -> None:
    prepare.main([name, "--source", str(source), "--out", str(out), *flags])


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder.exists() else []


@pytest.fixture
def out(tmp_path):
    return tmp_path / "data/out"


@pytest.mark.parametrize("name", [*FOLDERS, *LISTED])
def test_a_complete_download_becomes_the_layout(tmp_path, out, capsys, name):
    source = download(name, tmp_path / "download")
    before = contents(source)
    run(name, source, out)
    preset = load_preset(name)
    cases = find_cases(preset, out)
    assert len(cases) == (len(preset.published.all_ids()) or sum(preset.published.cases) or 3)
    assert all(case.image.is_symlink() and case.image.resolve().is_relative_to(source.resolve()) for case in cases)
    assert all(case.label.is_symlink() and case.label.exists() for case in cases)
    assert contents(source) == before
    printed = capsys.readouterr().out
    assert f"DATA={out} bash scripts/{name}/run.sh" in printed and f"{len(cases)} volumes, complete; " in printed
    assert "note" not in printed


def test_the_same_command_again_changes_nothing(tmp_path, out, capsys):
    source = download("BTCV", tmp_path / "download")
    run("BTCV", source, out)
    (out / "img/img0003.nii.gz").unlink()
    run("BTCV", source, out)
    assert "30 volumes, complete; 1 links made, 59 were there" in capsys.readouterr().out
    run("BTCV", source, out)
    assert "0 links made, 60 were there" in capsys.readouterr().out
    # the layout itself may be checked, too
    run("BTCV", out, out, "--check")


def test_one_layout_serves_fine_tuning_and_pretraining(tmp_path):
    run("BTCV", download("BTCV", tmp_path / "download"), tmp_path / "data/BTCV")
    (source,) = catalog.load("BTCV")
    assert len(catalog.find(source, tmp_path / "data")[0]) == source.count == 24


def test_check_writes_nothing(tmp_path, out, capsys):
    run("BTCV", download("BTCV", tmp_path / "download"), out, "--check")
    assert "30 volumes, complete; nothing was written" in capsys.readouterr().out and not out.parent.exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def unmapped(path: Path) -> None:
    write(path, np.full(SHAPE, 99, np.int16))


def reshaped(path: Path) -> None:
    write(path, np.zeros((4, 5, 7), np.int16))


def cut(path: Path) -> None:
    """Leave out a case of a list, which still states the number of all."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"training": content["training"][1:]}))


LUNG = "lung_0002.nii.gz"
IMG, LABEL = "RawData/Training/img/img0002.nii.gz", "RawData/Training/label/label0002.nii.gz"


@pytest.mark.parametrize(
    "name, path, change, message",
    [
        ("BTCV", IMG, Path.unlink, r"found no img/img0002.nii.gz; get BTCV from https://www.synapse.org.*licence"),
        ("BTCV", LABEL, Path.unlink, "found no label/label0002.nii.gz"),
        ("BTCV", LABEL, unmapped, r"label0002.nii.gz: found the label value 99, expected one of 0 1 2"),
        ("BTCV", LABEL, reshaped, r"label0002.nii.gz: found a label of shape \(4, 5, 7\), expected \(4, 5, 6\)"),
        ("BTCV", IMG, truncate, "img0002.nii.gz: not a NIfTI volume, or a damaged one"),
        ("BTCV", IMG, lambda path: path.write_bytes(b""), "img0002.nii.gz: found no NIfTI header"),
        (
            "BTCV",
            IMG,
            lambda path: shutil.copytree(path.parent, path.parents[3] / "copy"),
            "img0001.nii.gz: found twice",
        ),
        ("WORD", "WORD-V0.1.0/imagesTr/word_0002.nii.gz", Path.unlink, "found 99 of 100 files imagesTr/word_{case}"),
        ("MSD06_Lung", f"MSD06_Lung/labelsTr/{LUNG}", Path.unlink, f"labelsTr/{LUNG}: listed in dataset.json"),
        ("MSD06_Lung", "MSD06_Lung/dataset.json", cut, "dataset.json: found 2 of 3 cases of numTraining; get MSD06"),
        ("MSD04_Hippocampus", "MSD04_Hippocampus/dataset.json", cut, "found 259 of 260 published cases; get MSD04"),
        ("MSD06_Lung", "MSD06_Lung/dataset.json", Path.unlink, "found 0 files dataset.json, expected one"),
        ("MSD01_BrainTumour", "MSD01_BrainTumour/imagesTr/BRATS_0002.nii.gz", reshaped, "found 1 channels, expected 4"),
        ("MMWHS_CT", "MM-WHS 2017 Dataset/ct_train1/ct_train_1003_label.nii.gz", unmapped, "label value 99"),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path, out, name, path, change, message):
    source = download(name, tmp_path / "download")
    change(source / path)
    with pytest.raises(InputError, match=message):
        run(name, source, out)
    assert not out.parent.exists()


def test_what_is_there_can_be_used(tmp_path, out, capsys):
    source = download("BTCV", tmp_path / "download")
    (source / IMG).unlink()
    run("BTCV", source, out, "--allow_missing")
    said = capsys.readouterr().out
    assert "warning" in said and "found no img/img0002.nii.gz" in said and "29 volumes, incomplete" in said
    assert len(find_cases(load_preset("BTCV"), out)) == 29
    shutil.rmtree(source / "RawData")
    with pytest.raises(InputError, match=r"found no img/img0001.nii.gz.*and 55 more \(60 in all\)"):
        run("BTCV", source, tmp_path / "none", "--allow_missing")


def test_a_list_that_states_no_number_is_not_compared(tmp_path, out, capsys):
    source = download("MSD06_Lung", tmp_path / "download")
    path = source / "MSD06_Lung/dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"numTraining": None}))
    run("MSD06_Lung", source, out, "--check")
    assert f"MSD06_Lung: 3 volumes, {NOT_COMPARED}; nothing" in capsys.readouterr().out


def test_another_set_of_the_decathlon_is_refused(tmp_path, out):
    source = download("MSD06_Lung", tmp_path / "download")
    message = "found lung_0001.nii.gz, expected names that start with colon_; this is not the list of MSD10_Colon"
    with pytest.raises(InputError, match=f"dataset.json: {message}"):
        run("MSD10_Colon", source, out)
    prefixes = [load_preset(name).published.prefix for name in presets.available() if name.startswith("MSD")]
    assert all(prefixes) and len(set(prefixes)) == len(prefixes) == 8


@pytest.mark.parametrize(
    "name, case, message",
    [
        ("BTCV", "{}0061", "found 31, more than the 30 published cases"),
        ("WORD", "word_0101", "found 101, more than the 100 files imagesTr/word_{case}.nii.gz"),
        ("MSD06_Lung", "lung_0004", "found 4, more than the 3 cases of numTraining"),
    ],
)
def test_more_than_is_published_is_noted(tmp_path, out, capsys, name, case, message):
    source = download(name, tmp_path / "download")
    folders = FOLDERS.get(name) or (f"{name}/imagesTr", f"{name}/labelsTr")
    for folder, kind in zip(folders, ("img", "label")):
        first = min(path for path in (source / folder).iterdir() if path.name[0] != ".")
        shutil.copy(first, first.with_name(f"{case.format(kind)}.nii.gz"))
    if (path := source / name / "dataset.json").exists():
        content = json.loads(path.read_text())
        content["training"].append({"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"})
        path.write_text(json.dumps(content))
    run(name, source, out)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("note: ") and message in line] == printed[:1]
    assert " volumes, complete; " in printed[1]


def test_mri_scans_are_left_out(tmp_path, out, capsys):
    """AMOS has CT and MRI in the same folders, and two pairs of folders with the same names of files."""
    for part, numbers in (("Tr", ("0001", "0507")), ("Va", ("0008",))):
        for number in numbers:
            write(
                tmp_path / f"amos22/images{part}/amos_{number}.nii.gz", np.arange(120).reshape(SHAPE).astype(np.int16)
            )
            write(tmp_path / f"amos22/labels{part}/amos_{number}.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(InputError, match=r"found 1 of 200 files imagesTr/amos_.*found 1 of 100 files imagesVa"):
        run("AMOS22_CT", tmp_path / "amos22", out)
    run("AMOS22_CT", tmp_path / "amos22", out, "--allow_missing")
    names = [name for name in contents(out) if name.endswith(".nii.gz")]
    assert names == [
        f"{kind}{rest}" for kind in ("images", "labels") for rest in ("Tr/amos_0001.nii.gz", "Va/amos_0008.nii.gz")
    ]


def test_folders_of_slices_are_linked_and_to_be_converted(tmp_path, out, capsys):
    for name in ("Normal", "NCP", "CP"):
        (tmp_path / f"download/part/{name}/1/2").mkdir(parents=True)
        (tmp_path / f"download/part/{name}/1/2/0.png").write_bytes(b"picture")
    run("CC_CCII", tmp_path / "download", out)
    assert contents(out)[:3] == ["CP", "NCP", "Normal"] and (out / "CP/1/2/0.png").exists()
    printed = capsys.readouterr().out
    assert f"next: python -m scripts.convert_cc_ccii --data {out}" in printed
    assert f"CC_CCII: 3 scans in 3 folders, {NOT_COMPARED}; 3 links made" in printed
    (tmp_path / "download/part/NCP/1/2/0.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"NCP/1/2/0.png: found an empty file \(0 bytes\)"):
        run("CC_CCII", tmp_path / "download", tmp_path / "other")
    shutil.rmtree(tmp_path / "download/part/CP")
    with pytest.raises(InputError, match="found no CP/PATIENT/SCAN"):
        run("CC_CCII", tmp_path / "download", tmp_path / "other")


def test_volumes_are_not_made_in_the_download(tmp_path, monkeypatch, capsys):
    """The volumes of CC-CCII go to data/CC_CCII, so the links to its pictures go elsewhere."""
    for name in ("Normal", "NCP", "CP"):
        (tmp_path / f"download/{name}/1/2").mkdir(parents=True)
        (tmp_path / f"download/{name}/1/2/0.png").write_bytes(b"picture")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--out data/CC_CCII: this is the folder of the volumes"):
        run("CC_CCII", Path("download"), Path("data/CC_CCII"))
    prepare.main(["CC_CCII", "--source", "download"])
    assert "--data data/CC_CCII_pictures --out data/CC_CCII\n" in capsys.readouterr().out
    assert contents(tmp_path / "data")[0] == "CC_CCII_pictures"


# ---------------------------------------------------------------- pretraining sets


def test_a_pretraining_set_is_linked_as_a_whole(tmp_path, capsys):
    out = tmp_path / "data/TotalSegmentator"
    source = tmp_path / "download/Totalsegmentator_dataset"
    write(source / "s0001/ct.nii.gz", np.arange(120, dtype=np.int16).reshape(SHAPE))
    write(source / "s0001/segmentations/liver.nii.gz", np.zeros(SHAPE, np.uint8))
    run("TotalSegmentator", source, out)
    assert out.is_symlink() and out.resolve() == source.resolve()
    run("TotalSegmentator", source, out)
    said = capsys.readouterr().out
    assert f"1 volumes, {NOT_COMPARED}; 1 links made" in said and "0 links made, 1 were there" in said
    assert f"--datasets TotalSegmentator --data_root {out.parent}" in said


@pytest.mark.parametrize("name", ["TotalSegmentator", "Totalsegmentator_dataset"])
def test_the_next_command_finds_a_pretraining_set(tmp_path, capsys, name):
    source, out = tmp_path / "download", tmp_path / "my data" / name
    write(source / "s0001/ct.nii.gz", np.arange(120, dtype=np.int16).reshape(SHAPE))
    run("TotalSegmentator", source, out)
    words = shlex.split(capsys.readouterr().out.split("next: ")[1])
    settings = parse(DataSettings, words[words.index("--datasets") :])
    assert [case.image for case in settings.cases()] == [out / "s0001/ct.nii.gz"]


def test_a_folder_under_another_name_is_refused(tmp_path):
    message = r"out: HNSCC is not looked for under this name; expected a folder called HNSCC, such as .*/out/HNSCC$"
    write(tmp_path / "download/1.nii.gz", np.arange(120, dtype=np.int16).reshape(SHAPE))
    with pytest.raises(InputError, match=message):
        run("HNSCC", tmp_path / "download", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_next_command_of_a_recipe_names_the_folder(tmp_path, capsys):
    run("BTCV", download("BTCV", tmp_path / "download"), tmp_path / "my data/l")
    words = shlex.split(capsys.readouterr().out.split("next: ")[1])
    assert words[:3] == [f"DATA={tmp_path}/my data/l", "bash", "scripts/BTCV/run.sh"]


def test_a_pretraining_set_must_be_complete(tmp_path):
    out = tmp_path / "data/TCIAcovid19"
    write(tmp_path / "download/a/1.nii.gz", np.arange(120, dtype=np.int16).reshape(SHAPE))
    with pytest.raises(InputError, match="found 1 of 771 published volumes; get TCIAcovid19 from https"):
        run("TCIAcovid19", tmp_path / "download", out)
    run("TCIAcovid19", tmp_path / "download", out, "--allow_missing")
    truncate(tmp_path / "download/a/1.nii.gz")
    with pytest.raises(InputError, match="1.nii.gz: not a NIfTI volume"):
        run("TCIAcovid19", tmp_path / "download", tmp_path / "other/TCIAcovid19", "--allow_missing")
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- links and names


def test_what_is_in_the_way_is_not_replaced(tmp_path, out):
    source = download("BTCV", tmp_path / "download")
    other = write(out / "img/img0040.nii.gz", np.zeros(SHAPE, np.int16))
    with pytest.raises(InputError, match="img0040.nii.gz: is there already"):
        run("BTCV", source, out)
    assert contents(out) == ["img", "img/img0040.nii.gz"] and not other.is_symlink()


def test_links_are_removed_when_one_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    link = Path.symlink_to

    def fails(path, target):
        if path.name == "third":
            raise OSError(28, "No space left on device")
        link(path, target)

    monkeypatch.setattr(Path, "symlink_to", fails)
    with pytest.raises(InputError, match="third: cannot be written .No space"):
        prepare.make_links({tmp_path / name: tmp_path / "a" for name in ("first", "second", "third")})
    assert contents(tmp_path) == ["a"]


def test_a_list_cannot_make_links_elsewhere(tmp_path, out):
    source = download("MSD06_Lung", tmp_path / "download")
    write(tmp_path / "download/lung_secret.nii.gz", np.arange(120, dtype=np.int16).reshape(SHAPE))
    path = source / "MSD06_Lung/dataset.json"
    entry = {"image": "../lung_secret.nii.gz", "label": "./labelsTr/lung_0001.nii.gz"}
    path.write_text(json.dumps({"training": [entry]}))
    with pytest.raises(InputError, match="leaves the folder"):
        run("MSD06_Lung", source, out)


@pytest.mark.parametrize(
    "words, message",
    [
        (["BTVC", "--source", "."], "BTVC: unknown data set; did you mean 'BTCV'"),
        (["BTCV", "--source", "/nowhere"], "expected the folder of the download; get BTCV from"),
        (["BTCV"], "expected the folder of the download"),
        ([], "NAME: unknown data set"),
        (["1k", "--source", "."], "unknown data set"),
    ],
)
def test_bad_words_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        prepare.main(words)


def test_every_data_set_states_what_is_published():
    missing = [name for name in presets.available() if not load_preset(name).published]
    assert missing == ["sample_abdomen"]
    sources = {source.name for source in catalog.load_all(catalog.available())}
    assert set(prepare.names()) == {*presets.available(), *sources} - {"sample_abdomen"} and len(sources) == 8


def test_the_table_of_the_document_is_that_of_the_yamls(capsys):
    prepare.main(["--list"])
    table = capsys.readouterr().out.strip()
    assert table in (ROOT / "docs/data.md").read_text(), f"docs/data.md: replace its table by\n{table}"
