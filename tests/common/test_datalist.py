"""Data lists: JSON, folders, text files, and what is wrong with them."""

import json
from pathlib import Path

import pytest

from common.config import InputError
from common.datalist import Case, read_cases
from common.synthetic import affine_of, phantom, write_dicom
from tests.common.data import SHAPE, SPACING, nifti


def write_json(path: Path, **sections) -> Path:
    path.write_text(json.dumps(sections))
    return path


def test_decathlon_json(tmp_path):
    entries = [{"image": "imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz", "fold": 3}, "imagesTs/b.nii"]
    listing = write_json(tmp_path / "dataset.json", training=entries, other=[{"image": "/abs/c.nii.gz"}])
    assert read_cases(listing) == [
        Case("a", tmp_path / "imagesTr/a.nii.gz", tmp_path / "labelsTr/a.nii.gz", 3),
        Case("b", tmp_path / "imagesTs/b.nii"),
    ]
    assert read_cases(listing, root="elsewhere")[1].image == Path("elsewhere/imagesTs/b.nii")
    assert read_cases(listing, section="other") == [Case("c", Path("/abs/c.nii.gz"))]


def test_a_folder_gives_its_images_and_series_but_no_label(tmp_path):
    hu, _ = phantom(SHAPE)
    for name in ("one.nii.gz", "deep/two.nii", "labelsTr/one.nii.gz", ".hidden/three.nii.gz"):
        nifti(tmp_path / name, hu)
    write_dicom(tmp_path / "scans/patient", hu[:, :, :3], affine_of(SHAPE, SPACING))
    (tmp_path / "scans/notes.txt").write_text("not an image")
    (tmp_path / "scans/loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert [case.name for case in read_cases(tmp_path)] == ["two", "one", "patient"]


def test_a_text_file_of_paths(tmp_path):
    (tmp_path / "list.txt").write_text("a/x.nii.gz  # comment\n\n# nothing\nb/x.nii.gz\n/abs/y.nii\n")
    cases = read_cases(tmp_path / "list.txt")
    assert [case.image for case in cases] == [tmp_path / "a/x.nii.gz", tmp_path / "b/x.nii.gz", Path("/abs/y.nii")]
    assert [case.name for case in cases] == ["a_x", "b_x", "y"]


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "not JSON"),
        ("[]", "no list 'training'"),
        ('{"validation": []}', "allowed: validation"),
        ('{"training": []}', "the data list is empty"),
        ('{"training": [{"label": "a"}]}', "needs a path or a mapping with 'image'"),
        ('{"training": [{"image": "a", "fold": "0"}]}', "needs a whole number"),
    ],
)
def test_what_is_wrong_with_a_list_is_said(tmp_path, content, said):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(InputError, match=said) as error:
        read_cases(tmp_path / "list.json")
    assert "list.json" in str(error.value)


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"training": ["good.nii", {"image": "../a.nii"}]}', "leaves"),
        ('{"training": ["good.nii", {"image": "a.nii", "label": "b/../../a.nii"}]}', "leaves"),
        ('{"training": ["good.nii", "a.nii", "a.nii"]}', "twice"),
    ],
)
def test_a_bad_entry_is_that_cases_problem_and_the_list_goes_on(tmp_path, content, said):
    (tmp_path / "list.json").write_text(content)
    *good, bad = read_cases(tmp_path / "list.json")
    assert said in bad.problem and not any(case.problem for case in good)


def test_a_missing_list_and_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_cases(tmp_path / "none.json")
    with pytest.raises(InputError, match="empty"):
        read_cases(tmp_path)
