"""Data lists: JSON, folders, text files, and what is wrong with them."""

import json
import re
from pathlib import Path

import pytest

from common.data.datalist import Case, read_cases
from common.errors import InputError
from Pretrain.catalog import DataSettings
from scripts.synthetic_ct import affine_of, phantom, write_dicom
from tests.common.made import SHAPE, SPACING, nifti


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


def test_a_text_file_of_paths(tmp_path):
    (tmp_path / "list.txt").write_text("a/x.nii.gz  # comment\n\n# nothing\nb/x.nii.gz\n/abs/y.nii\n")
    cases = read_cases(tmp_path / "list.txt", "/")
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


# ---------------------------------------------------------------- the root of a list


@pytest.fixture
def places(tmp_path):
    """A root with files, links that stay in it and links that leave it; `outside/` beside it."""
    root = tmp_path / "root"
    for folder in (root / "in", tmp_path / "outside"):
        folder.mkdir(parents=True)
        (folder / "a.nii").touch()
    for series in ("series", "linked"):
        (root / series).mkdir()
    (root / "stays.nii").symlink_to(root / "in/a.nii")
    (root / "out.nii").symlink_to("../outside/a.nii")
    (root / "loop.nii").symlink_to("loop.nii")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "series/1.dcm").symlink_to(root / "in/a.nii")
    (root / "linked/1.dcm").symlink_to(tmp_path / "outside/a.nii")
    (tmp_path / "alias").symlink_to(root)
    return tmp_path


INSIDE = ["in/a.nii", "in/../in/a.nii", "stays.nii", "series", "missing.nii", "loop.nii", "{0}/root/in/b.nii"]
OUTSIDE = ["../outside/a.nii", "in/../../outside/a.nii", "{0}/outside/a.nii", "out.nii", "folder/a.nii", "linked"]


@pytest.mark.parametrize("root", ["root", "alias"])
def test_no_path_of_a_list_leaves_its_root(places, root):
    bad = [path.format(places) for path in OUTSIDE]
    good = [path.format(places) for path in INSIDE]
    labelled = [{"image": f"in/{n}.nii", "label": path} for n, path in enumerate(bad)]
    entries = [*good, *bad, *labelled, {"image": "in/9.nii", "label": "stays.nii"}]
    cases = read_cases(write_json(places / "root/list.json", training=entries), places / root)
    wrong = [case.problem and case.problem.split(": ")[0] for case in cases]
    assert [path for path in wrong if path] == bad + bad and not any(wrong[: len(good)]) and not wrong[-1]
    for case in cases[len(good) : -1]:
        assert f"leaves the root {places}/root; --data_root FOLDER names another" in case.problem
        assert "list.json" in case.problem and f"leads to {places}/outside/a.nii" in case.problem


def test_the_root_of_everything_lets_every_path_pass(places):
    paths = [path.format(places) for path in INSIDE + OUTSIDE]
    (places / "root/list.txt").write_text("\n".join(paths))
    cases = read_cases(places / "root/list.txt", "/")  # relative paths start from the list's folder
    assert [(case.image, case.problem) for case in cases] == [(places / "root" / path, None) for path in paths]


def test_the_links_of_a_folder_stay_in_it_or_in_the_root(tmp_path):
    nifti(tmp_path / "scans/own.nii.gz"), nifti(tmp_path / "disk/far.nii.gz")
    (tmp_path / "scans/far.nii.gz").symlink_to(tmp_path / "disk/far.nii.gz")
    (tmp_path / "scans/more").symlink_to(tmp_path / "disk")
    bad = {case.name for case in read_cases(tmp_path / "scans", tmp_path / "elsewhere") if case.problem}
    assert bad == {"scans_far", "more_far"}
    for root in ("/", tmp_path / "disk"):
        assert not any(case.problem for case in read_cases(tmp_path / "scans", root))


def test_the_programs_say_how_to_allow_a_list_of_absolute_paths(places):
    paths = [f"{places}/outside/a.nii", f"{places}/root/in/a.nii"]
    (places / "root/in/list.txt").write_text("\n".join(paths))
    (places / "far.txt").write_text(f"{places}/root/in/a.nii\n")
    own = DataSettings(datalist=(places / "root/in/list.txt",)).cases()
    assert own[0].problem and not own[1].problem  # without data_root: the folder of the list
    (places / "root/in/far.txt").write_text(paths[0])
    with pytest.raises(InputError, match=f"none of its 1 paths can be used; {re.escape(paths[0])}.*--data_root /"):
        DataSettings(datalist=(places / "root/in/far.txt",)).cases()
    for root in ("/", str(places)):
        assert not any(
            case.problem
            for case in DataSettings(
                datalist=(places / "root/in/list.txt", places / "root/in/far.txt"), data_root=Path(root)
            ).cases()
        )


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
    with pytest.raises(InputError, match="nor begin with a dot"):
        read_cases(listing, section="dot")


def test_a_missing_list_and_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_cases(tmp_path / "none.json")
    with pytest.raises(InputError, match="empty"):
        read_cases(tmp_path)
