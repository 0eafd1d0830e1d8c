"""Data lists: JSON, folders, text files, and their errors."""

import json
from pathlib import Path

import pytest

from common.data.datalist import Case, read_cases
from common.errors import InputError
from scripts.synthetic_ct import affine_of, phantom, write_dicom
from tests.common.made import SHAPE, SPACING, nifti


def write_json(path: Path, **sections) -> Path:
    path.write_text(json.dumps(sections))
    return path


def test_decathlon_json(tmp_path):
    listed = [{"image": "imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz", "fold": 3}, "imagesTs/b.nii"]
    listing = write_json(tmp_path / "dataset.json", training=listed, other=[{"image": "/abs/c.nii.gz"}])
    assert read_cases(listing) == [
        Case("a", tmp_path / "imagesTr/a.nii.gz", tmp_path / "labelsTr/a.nii.gz", 3),
        Case("b", tmp_path / "imagesTs/b.nii"),
    ]
    assert read_cases(listing, root="elsewhere")[1].image == Path("elsewhere/imagesTs/b.nii")
    assert read_cases(listing, "/", section="other") == [Case("c", Path("/abs/c.nii.gz"))]


def test_a_folder_gives_its_images_and_series_but_no_label(tmp_path):
    hu, _ = phantom(SHAPE)
    for name in ("one.nii.gz", "deep/two.nii", "labelsTr/one.nii.gz", ".hidden/three.nii.gz"):
        nifti(tmp_path / name, hu)
    write_dicom(tmp_path / "scans/patient", hu[:, :, :3], affine_of(SHAPE, SPACING))
    (tmp_path / "scans/notes.txt").write_text("not an image")
    (tmp_path / "scans/loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert [case.name for case in read_cases(tmp_path)] == ["two", "one", "patient"]


@pytest.mark.parametrize(
    "name", ["labelsTr", "labels", "LABELS_ts", "seg", "masks", "labelsTr20", "segmentation_masks"]
)
def test_a_folder_of_labels_is_skipped_and_printed(tmp_path, capsys, name):
    nifti(tmp_path / "a.nii.gz"), nifti(tmp_path / name / "b.nii.gz")
    assert [case.name for case in read_cases(tmp_path)] == ["a"]
    assert f"skipped 1 files or folders: {tmp_path / name} (named as a folder of labels)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["seg_dicom4qi", "mask-fitting study", "labelled", "segment7", "annotated"])
def test_a_folder_is_not_skipped_for_the_start_of_its_name(tmp_path, capsys, name):
    write_dicom(tmp_path / name, phantom(SHAPE)[0][:, :, :3], affine_of(SHAPE, SPACING))
    assert [case.name for case in read_cases(tmp_path)] == [name]
    assert not capsys.readouterr().out


def test_what_else_is_skipped_is_printed(tmp_path, capsys):
    (tmp_path / "x.nii.gz").mkdir()
    nifti(tmp_path / "y.nii.gz/y.nii.gz"), nifti(tmp_path / "both/z.nii")
    write_dicom(tmp_path / "both", phantom(SHAPE)[0][:, :, :3], affine_of(SHAPE, SPACING))
    assert [case.name for case in read_cases(tmp_path)] == ["z", "y"]
    printed = capsys.readouterr().out
    assert "skipped 2 " in printed and "both (DICOM files beside image files)" in printed
    assert "x.nii.gz (a folder named as a file)" in printed


def test_a_text_file_of_paths(tmp_path):
    (tmp_path / "list.txt").write_text("a/x.nii.gz  # comment\n\n# nothing\nb/x.nii.gz\n/abs/y.nii\n")
    cases = read_cases(tmp_path / "list.txt", "/")
    assert [case.image for case in cases] == [tmp_path / "a/x.nii.gz", tmp_path / "b/x.nii.gz", Path("/abs/y.nii")]
    assert [case.name for case in cases] == ["a_x", "b_x", "y"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
        ('{"training": [' + "[" * 900 + "]" * 900 + "]}", "expected a path or a mapping"),
        ('{"training": ["a\\u0000b/c.nii"]}', "NUL character.* in the path"),
        ('{"training": [{"image": "a.nii", "label": "b\\u0000/c.nii"}]}', "NUL character.* in the path"),
        ("[]", "no list 'training'"),
        ('{"validation": []}', "expected one of the sections validation"),
        ('{"training": []}', "empty data list"),
        ('{"training": [{"label": "a"}]}', "expected a path or a mapping with 'image'"),
        ('{"training": [{"image": "a", "fold": "0"}]}', "expected a whole number"),
    ],
)
def test_a_malformed_list_is_refused(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_cases(tmp_path / "list.json")
    assert "list.json" in str(error.value)


def test_a_file_that_is_listed_twice_is_used_once(tmp_path):
    cases = read_cases(write_json(tmp_path / "list.json", training=["good.nii", "a.nii", "./a.nii"]))
    assert [case.name for case in cases] == ["good", "a", "a"]
    assert [bool(case.problem) for case in cases] == [False, False, True] and "twice" in cases[2].problem


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize("root, base", [(None, "lists"), ("/", "lists"), ("elsewhere", "elsewhere")])
def test_where_the_paths_of_a_list_start(tmp_path, monkeypatch, root, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    paths = ["in/a.nii", "../b.nii", "/abs/c.nii"]
    write_json(tmp_path / "lists/list.json", training=[{"image": path, "label": path} for path in paths])
    (tmp_path / "lists/list.txt").write_text("\n".join(paths))
    wanted = [Path(base, "in/a.nii"), Path(base, "../b.nii"), Path("/abs/c.nii")]
    for listing in ("lists/list.json", "lists/list.txt"):
        cases = read_cases(listing, root)
        assert [case.image for case in cases] == wanted and not any(case.problem for case in cases)
    assert [case.label for case in read_cases("lists/list.json", root)] == wanted


def test_links_are_followed(tmp_path):
    nifti(tmp_path / "disk/far.nii.gz"), nifti(tmp_path / "scans/own.nii.gz")
    (tmp_path / "scans/link.nii.gz").symlink_to(tmp_path / "disk/far.nii.gz")
    (tmp_path / "scans/more").symlink_to(tmp_path / "disk")
    assert [case.name for case in read_cases(tmp_path / "scans")] == ["link", "far", "own"]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "a\\b", ".hidden", "..", "a\nb", "a\0b"])
def test_a_name_that_cannot_be_a_files_is_refused(tmp_path, name):
    listing = write_json(tmp_path / "list.json", training=[{"image": "a.nii", "name": name}])
    with pytest.raises(InputError, match="list.json: found the name .* for .*a.nii"):
        read_cases(listing)


def test_names_are_given_or_made_of_files_and_folders(tmp_path):
    given = [{"image": "a.nii", "name": "Änne 1 (2).x"}, ".v1/b.nii", ".v2/b.nii"]
    listing = write_json(tmp_path / "list.json", training=given, wrong=[{"image": "a.nii", "name": 7}], dot=[".a.nii"])
    assert [case.name for case in read_cases(listing)] == ["Änne 1 (2).x", "v1_b", "v2_b"]
    with pytest.raises(InputError, match=r"wrong\[0\]: found the name 7"):
        read_cases(listing, section="wrong")
    with pytest.raises(InputError, match="not starting with a dot"):
        read_cases(listing, section="dot")


def test_a_missing_list_and_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="^[^:]*none.json: the data list cannot be read"):
        read_cases(tmp_path / "none.json")
    with pytest.raises(InputError, match="empty"):
        read_cases(tmp_path)


@pytest.mark.parametrize("path", ["a\\ud800.nii", "a\\u0000.nii", "\\udfff/a.nii"])
def test_a_path_that_no_system_accepts_is_refused(tmp_path, path):
    (tmp_path / "a.json").write_text(f'{{"training": ["{path}"]}}')
    with pytest.raises(InputError, match=r"a\.json.*(NUL|name)"):
        read_cases(tmp_path / "a.json")


def test_a_device_is_no_list():
    with pytest.raises(InputError, match="/dev/zero.*device"):
        read_cases("/dev/zero")
