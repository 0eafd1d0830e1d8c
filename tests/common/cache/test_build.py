"""The cache gives back what the preprocessing made, notices every change, and is whole or absent."""

import json
import multiprocessing
import os
import pickle
import time

import numpy as np
import pytest
import torch

from common.cache import build, storage
from common.data.datalist import Case
from common.data.preprocessing import Preprocessing
from common.data.volume_io import read_image, read_label
from common.errors import InputError
from scripts.synthetic_ct import phantom
from tests.common.made import SHAPE, labelled, nifti


@pytest.fixture
def case(tmp_path):
    return Case("a", *labelled(tmp_path))


def whole(entry, level=0):
    return entry.read((0, 0, 0), entry.levels[level], level)


def test_whole_hu_are_kept_as_they_are(case, tmp_path):
    settings = Preprocessing(low=-1000, high=1000)
    (entry,) = build.build_cache([case], settings, tmp_path / "cache")
    image = read_image(case.image)
    wanted, label = settings.apply(image, read_label(case.label, image))
    hu = torch.round(whole(entry) * 2000).int() - 1000
    assert torch.equal(hu, torch.round(wanted.as_tensor() * 2000).int() - 1000)
    assert torch.equal(entry.read_label((0, 0, 0), entry.shape), label.as_tensor())
    np.testing.assert_allclose(entry.affine, wanted.affine.numpy())
    assert entry.spacing == pytest.approx(tuple(wanted.pixdim.tolist())) and entry.channels == 1


@pytest.mark.parametrize(
    "settings",
    [
        Preprocessing(spacing=(5.0, 5.0, 5.0), low=-175, high=250),
        Preprocessing(intensity="percentiles", low=1, high=99),
        Preprocessing(intensity="zscore"),
        Preprocessing(low=-175, high=250, dtype="uint8"),
        Preprocessing(intensity="zscore", dtype="uint8"),
    ],
)
def test_rounding_costs_what_the_entry_says(case, tmp_path, settings):
    (entry,) = build.build_cache([case], settings, tmp_path / "cache")
    wanted, _ = settings.apply(read_image(case.image))
    error = float((whole(entry) - wanted.as_tensor()).abs().max())
    said = json.loads((entry.folder / "meta.json").read_text())["quantisation"]["max_error"]
    assert error == pytest.approx(said, abs=1e-6)
    assert error <= entry.scale / 2 + 1e-6
    assert float(entry.read((-9, -9, -9), (4, 4, 4)).abs().max()) == 0  # outside is exactly 0


def test_a_box_is_that_part_of_the_volume_and_zero_outside(case, tmp_path):
    (entry,) = build.build_cache([case], Preprocessing(), tmp_path / "cache")
    padded = torch.nn.functional.pad(whole(entry), (50,) * 6)
    labels = torch.nn.functional.pad(entry.read_label((0, 0, 0), entry.shape), (50,) * 6)
    rng = np.random.default_rng(0)
    for _ in range(40):
        start, size = rng.integers(-45, 45, 3), rng.integers(1, 50, 3)
        window = (slice(None), *(slice(50 + a, 50 + a + n) for a, n in zip(start.tolist(), size.tolist())))
        if any(w.stop > n for w, n in zip(window[1:], padded.shape[1:])):
            continue
        assert torch.equal(entry.read(start, size), padded[window])
        assert torch.equal(entry.read_label(start, size), labels[window])
    assert not entry.read((500, 0, 0), (8, 8, 8)).any() and entry.read((0, -99, 0), (3, 4, 5)).shape == (1, 3, 4, 5)


@pytest.mark.parametrize("settings", [Preprocessing(), Preprocessing(intensity="zscore", dtype="uint8")])
def test_a_box_is_resized_as_its_floats_would_be(case, tmp_path, settings):
    (entry,) = build.build_cache([case], settings, tmp_path / "cache")
    for start, size in (((2, 3, 4), (20, 18, 16)), ((-6, 10, -3), (30, 40, 20))):
        box = entry.read(start, size)
        wanted = torch.nn.functional.interpolate(box[None], size=(12, 13, 14), mode="trilinear")[0]
        torch.testing.assert_close(entry.read(start, size, out_size=(12, 13, 14)), wanted, atol=1e-5, rtol=1e-4)


def test_channels(tmp_path):
    array = np.random.default_rng(0).normal(size=(20, 18, 16, 4)).astype(np.float32) + 5
    settings = Preprocessing(intensity="zscore", channels=4)
    (entry,) = build.build_cache([Case("m", nifti(tmp_path / "m.nii.gz", array))], settings, tmp_path / "cache")
    wanted = settings.apply(read_image(tmp_path / "m.nii.gz", 4))[0].as_tensor()
    torch.testing.assert_close(whole(entry), wanted, atol=1e-3, rtol=0)
    assert entry.channels == 4 and entry.read((3, 3, 3), (2, 3, 4)).shape == (4, 2, 3, 4)


def test_any_other_setting_or_content_is_another_entry(case, tmp_path):
    folder, first = tmp_path / "cache", Preprocessing()
    (entry,) = build.build_cache([case], first, folder)
    changed = [
        Preprocessing(low=-900),
        Preprocessing(spacing=(5.0, 5.0, 5.0)),
        Preprocessing(margin=2),
        Preprocessing(foreground_threshold=None),
        Preprocessing(dtype="uint8"),
    ]
    keys = {build.build_cache([case], settings, folder)[0].folder for settings in changed}
    assert len(keys | {entry.folder}) == 6
    assert build.build_cache([Case("a", case.image)], first, folder)[0].folder != entry.folder  # without its label
    nifti(case.image, phantom(SHAPE, seed=5)[0])  # another scan under the same name
    (replaced,) = build.build_cache([case], first, folder)
    assert replaced.folder != entry.folder and replaced.content_hash != entry.content_hash
    assert not torch.equal(whole(replaced), whole(entry))


def test_whole_and_decimal_settings_are_the_same_setting(case, tmp_path):
    (one,) = build.build_cache([case], Preprocessing(spacing=(5, 5, 5), low=-175, high=250), tmp_path / "cache")
    (two,) = build.build_cache(
        [case], Preprocessing(spacing=(5.0, 5.0, 5.0), low=-175.0, high=250.0), tmp_path / "cache"
    )
    assert one.folder == two.folder


def test_the_same_call_again_builds_nothing_and_reads_no_volume(case, tmp_path, monkeypatch):
    before = build.build_cache([case], Preprocessing(), tmp_path / "cache")
    monkeypatch.setattr(build.hashing, "file_hash", None)  # would be called to look into a file
    assert build.build_cache([case], Preprocessing(), tmp_path / "cache") == before


def test_content_hash_is_of_the_voxels_not_of_the_file(case, tmp_path):
    hu, _ = phantom(SHAPE)
    flipped = nifti(tmp_path / "other.nii", hu[::-1].astype(np.float32), np.diag([-6.0, 7.0, 8.0, 1.0]))
    one, two = build.build_cache([case, Case("b", flipped)], Preprocessing(), tmp_path / "cache")
    assert one.content_hash == two.content_hash and one.folder != two.folder
    (spaced,) = build.build_cache([case], Preprocessing(spacing=(5.0, 5.0, 5.0)), tmp_path / "cache")
    assert spaced.content_hash == one.content_hash


def test_class_points_lie_in_their_class(case, tmp_path):
    (entry,) = build.build_cache([case], Preprocessing(), tmp_path / "cache")
    label = entry.read_label((0, 0, 0), entry.shape)[0].numpy()
    assert sorted(entry.class_points) == np.unique(label).tolist()
    for number, points in entry.class_points.items():
        assert (label[tuple(points.T)] == number).all()
        assert len(points) == min(build.MAX_POINTS, (label == number).sum()) == len(np.unique(points, axis=0))


def test_reduced_levels_are_means_without_aliasing():
    ramp = torch.arange(101.0)[None, :, None, None].expand(1, 101, 4, 4)
    half = storage.halve(ramp, 1)
    assert half.shape[1] == 51
    torch.testing.assert_close(half.mean(), ramp.mean())  # the same extent, nothing counted twice
    middle = (torch.arange(51) + 0.5) * 101 / 51 - 0.5
    torch.testing.assert_close(half[0, :, 0, 0], middle, atol=0.03, rtol=0)
    stripes = (torch.arange(64) % 2).float()[None, :, None, None].expand(1, 64, 4, 4)
    assert (storage.halve(stripes, 1) == 0.5).all()


def test_thick_slices_are_not_reduced_further():
    assert storage.reduced_shape((512, 512, 60), (0.8, 0.8, 5.0)) == (256, 256, 60)
    assert storage.reduced_shape((200, 200, 201), (1.0, 1.0, 1.2)) == (100, 100, 101)
    assert storage.reduced_shape((40, 20, 40), (1.0, 1.0, 1.0)) == (20, 20, 20)


def _read(entry):
    return entry.read((1, 2, 3), (8, 8, 8))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_entries_work_in_other_processes(case, tmp_path, method):
    (entry,) = build.build_cache([case], Preprocessing(), tmp_path / "cache")
    here = _read(entry)  # opened in this process first
    assert torch.equal(_read(pickle.loads(pickle.dumps(entry))), here)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert torch.equal(pool.apply(_read, (entry,)), here)


def test_more_entries_than_arrays_held_open(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_OPEN", 2)
    cases = [Case(str(seed), nifti(tmp_path / f"{seed}.nii", seed=seed)) for seed in range(4)]
    entries = build.build_cache(cases, Preprocessing(), tmp_path / "cache")
    first = [whole(entry) for entry in entries]
    assert all(torch.equal(whole(entry), wanted) for entry, wanted in zip(entries, first))
    assert len(storage._arrays) <= 2


def test_a_bad_case_is_reported_and_the_others_are_built(case, tmp_path):
    bad = nifti(tmp_path / "bad.nii.gz", np.ones(SHAPE, np.int16))
    cases = [Case("bad", bad), case, Case("no", tmp_path / "no.nii")]
    filled = build.fill_cache(cases, Preprocessing(), tmp_path / "cache")
    assert [entry.name for entry in filled.entries] == ["a"] and filled.built == 1
    assert [failure.case.name for failure in filled.failures] == ["bad", "no"]
    with pytest.raises(InputError, match=r"bad.nii.gz: found all voxels of one value.*1 more of 3"):
        build.build_cache(cases, Preprocessing(), tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".tmp")]


def test_a_damaged_entry_says_which(case, tmp_path):
    (entry,) = build.build_cache([case], Preprocessing(), tmp_path / "cache")
    os.truncate(entry.folder / "image.b2nd", 200)
    with pytest.raises(InputError, match="part of the cache is damaged"):
        entry.read((0, 0, 0), (40, 30, 30))
    (entry.folder / "label.b2nd").unlink()
    with pytest.raises(InputError, match="part of the cache is missing"):
        entry.read_label((0, 0, 0), (4, 4, 4))


def test_a_cut_off_index_line_costs_time_only(case, tmp_path):
    before = build.build_cache([case], Preprocessing(), tmp_path / "cache")
    index = tmp_path / "cache/index.jsonl"
    index.write_bytes(index.read_bytes()[:-20] + b"\n")
    assert build.build_cache([case], Preprocessing(), tmp_path / "cache") == before


def test_a_crop_does_not_cost_the_volume(tmp_path):
    """A 32^3 box of a large volume is read in a fraction of the time that the volume takes."""
    big = np.random.default_rng(0).integers(0, 900, (224, 224, 224)).astype(np.int16)
    storage.write(tmp_path / "image.b2nd", big[None])
    storage.read_box(tmp_path / "image.b2nd", (0, 0, 0), (8, 8, 8))

    def seconds(size):
        start = time.perf_counter()
        storage.read_box(tmp_path / "image.b2nd", (64, 64, 64), size)
        return time.perf_counter() - start

    small = min(seconds((32, 32, 32)) for _ in range(5))
    assert small < min(seconds((160, 160, 160)) for _ in range(3)) / 10
