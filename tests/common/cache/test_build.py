"""The cache returns what the preprocessing made, notices every change, and is never incomplete."""

import copy
import functools
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from common.cache import build, failures, maintenance, storage
from common.data.datalist import Case
from common.data.preprocessing import Preprocessing
from common.data.volume_io import read_image, read_label
from common.errors import InputError
from scripts.synthetic_ct import affine_of, phantom
from tests.common.made import SHAPE, labelled, nifti


@pytest.fixture
def case(tmp_path):
    return Case("a", *labelled(tmp_path))


def full(volume, level=0):
    return volume.read((0, 0, 0), volume.levels[level], level)


def test_whole_hu_are_kept_as_they_are(case, tmp_path):
    settings = Preprocessing(low=-1000, high=1000)
    (volume,) = build.build_cache([case], settings, tmp_path / "cache")
    image = read_image(case.image)
    wanted, label = settings.apply(image, read_label(case.label, image))
    hu = torch.round(full(volume) * 2000).int() - 1000
    assert torch.equal(hu, torch.round(wanted.as_tensor() * 2000).int() - 1000)
    assert torch.equal(volume.read_label((0, 0, 0), volume.shape), label.as_tensor())
    np.testing.assert_allclose(volume.affine, wanted.affine.numpy())
    assert volume.spacing == pytest.approx(tuple(wanted.pixdim.tolist())) and volume.channels == 1


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
def test_the_rounding_error_is_the_recorded_one(case, tmp_path, settings):
    (volume,) = build.build_cache([case], settings, tmp_path / "cache")
    wanted, _ = settings.apply(read_image(case.image))
    error = float((full(volume) - wanted.as_tensor()).abs().max())
    recorded = json.loads((volume.folder / "meta.json").read_text())["quantisation"]["max_error"]
    assert error == pytest.approx(recorded, abs=1e-6)
    assert error <= volume.scale / 2 + 1e-6
    # outside is exactly 0
    assert float(volume.read((-9, -9, -9), (4, 4, 4)).abs().max()) == 0


def test_a_box_is_a_part_of_the_volume_and_zero_outside(case, tmp_path):
    (volume,) = build.build_cache([case], Preprocessing(), tmp_path / "cache")
    padded = torch.nn.functional.pad(full(volume), (50,) * 6)
    labels = torch.nn.functional.pad(volume.read_label((0, 0, 0), volume.shape), (50,) * 6)
    rng = np.random.default_rng(0)
    for _ in range(40):
        start, size = rng.integers(-45, 45, 3), rng.integers(1, 50, 3)
        window = (slice(None), *(slice(50 + a, 50 + a + n) for a, n in zip(start.tolist(), size.tolist())))
        if any(w.stop > n for w, n in zip(window[1:], padded.shape[1:])):
            continue
        assert torch.equal(volume.read(start, size), padded[window])
        assert torch.equal(volume.read_label(start, size), labels[window])
    assert not volume.read((500, 0, 0), (8, 8, 8)).any() and volume.read((0, -99, 0), (3, 4, 5)).shape == (1, 3, 4, 5)


@pytest.mark.parametrize("settings", [Preprocessing(), Preprocessing(intensity="zscore", dtype="uint8")])
def test_a_box_is_resized_as_its_floats_would_be(case, tmp_path, settings):
    (volume,) = build.build_cache([case], settings, tmp_path / "cache")
    for start, size in (((2, 3, 4), (20, 18, 16)), ((-6, 10, -3), (30, 40, 20))):
        box = volume.read(start, size)
        wanted = torch.nn.functional.interpolate(box[None], size=(12, 13, 14), mode="trilinear")[0]
        torch.testing.assert_close(volume.read(start, size, out_size=(12, 13, 14)), wanted, atol=1e-5, rtol=1e-4)


def test_channels(tmp_path):
    array = np.random.default_rng(0).normal(size=(20, 18, 16, 4)).astype(np.float32) + 5
    settings = Preprocessing(intensity="zscore", channels=4)
    (volume,) = build.build_cache([Case("m", nifti(tmp_path / "m.nii.gz", array))], settings, tmp_path / "cache")
    wanted = settings.apply(read_image(tmp_path / "m.nii.gz", 4))[0].as_tensor()
    torch.testing.assert_close(full(volume), wanted, atol=1e-3, rtol=0)
    assert volume.channels == 4 and volume.read((3, 3, 3), (2, 3, 4)).shape == (4, 2, 3, 4)


def test_another_setting_or_content_is_another_volume(case, tmp_path):
    folder, first = tmp_path / "cache", Preprocessing()
    (volume,) = build.build_cache([case], first, folder)
    changed = [
        Preprocessing(low=-900),
        Preprocessing(spacing=(5.0, 5.0, 5.0)),
        Preprocessing(margin=2),
        Preprocessing(foreground_threshold=None),
        Preprocessing(dtype="uint8"),
    ]
    keys = {build.build_cache([case], settings, folder)[0].folder for settings in changed}
    assert len(keys | {volume.folder}) == 6
    # without its label
    assert build.build_cache([Case("a", case.image)], first, folder)[0].folder != volume.folder
    # another scan under the same name
    nifti(case.image, phantom(SHAPE, seed=5)[0])
    (replaced,) = build.build_cache([case], first, folder)
    assert replaced.folder != volume.folder and replaced.content_hash != volume.content_hash
    assert not torch.equal(full(replaced), full(volume))


def test_whole_and_decimal_settings_are_the_same_setting(case, tmp_path):
    (one,) = build.build_cache([case], Preprocessing(spacing=(5, 5, 5), low=-175, high=250), tmp_path / "cache")
    (two,) = build.build_cache(
        [case], Preprocessing(spacing=(5.0, 5.0, 5.0), low=-175.0, high=250.0), tmp_path / "cache"
    )
    assert one.folder == two.folder


def test_the_same_call_again_builds_nothing_and_reads_no_volume(case, tmp_path, monkeypatch):
    before = build.build_cache([case], Preprocessing(), tmp_path / "cache")
    # would be called to read a file
    monkeypatch.setattr(build.hashing, "file_hash", None)
    assert build.build_cache([case], Preprocessing(), tmp_path / "cache") == before


def test_content_hash_is_of_the_voxels_not_of_the_file(case, tmp_path):
    hu, _ = phantom(SHAPE)
    flipped = nifti(tmp_path / "other.nii", hu[::-1].astype(np.float32), np.diag([-6.0, 7.0, 8.0, 1.0]))
    one, two = build.build_cache([case, Case("b", flipped)], Preprocessing(), tmp_path / "cache")
    assert one.content_hash == two.content_hash and one.folder != two.folder
    (spaced,) = build.build_cache([case], Preprocessing(spacing=(5.0, 5.0, 5.0)), tmp_path / "cache")
    assert spaced.content_hash == one.content_hash


def test_class_points_lie_in_their_class(case, tmp_path):
    (volume,) = build.build_cache([case], Preprocessing(), tmp_path / "cache")
    label = volume.read_label((0, 0, 0), volume.shape)[0].numpy()
    assert sorted(volume.class_points) == np.unique(label).tolist()
    for number, points in volume.class_points.items():
        assert (label[tuple(points.T)] == number).all()
        assert len(points) == min(build.MAX_POINTS, (label == number).sum()) == len(np.unique(points, axis=0))


def _read(volume):
    return volume.read((1, 2, 3), (8, 8, 8))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_volumes_work_in_other_processes(case, tmp_path, method):
    (volume,) = build.build_cache([case], Preprocessing(), tmp_path / "cache")
    # opened in this process first
    here = _read(volume)
    assert torch.equal(_read(copy.deepcopy(volume)), here)
    # the volume is pickled on its way
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert torch.equal(pool.apply(_read, (volume,)), here)


def test_more_volumes_than_open_arrays(tmp_path, monkeypatch):
    opened = functools.lru_cache(maxsize=2)(storage._open.__wrapped__)
    monkeypatch.setattr(storage, "_open", opened)
    cases = [Case(str(seed), nifti(tmp_path / f"{seed}.nii", seed=seed)) for seed in range(4)]
    volumes = build.build_cache(cases, Preprocessing(), tmp_path / "cache")
    first = [full(volume) for volume in volumes]
    assert all(torch.equal(full(volume), wanted) for volume, wanted in zip(volumes, first))
    assert opened.cache_info().currsize == 2 < opened.cache_info().misses


def test_a_bad_case_is_reported_and_the_others_are_built(case, tmp_path):
    bad = nifti(tmp_path / "bad.nii.gz", np.ones(SHAPE, np.int16))
    cases = [Case("bad", bad), case, Case("no", tmp_path / "no.nii")]
    result = build.build_missing(cases, Preprocessing(), tmp_path / "cache")
    assert [volume.name for volume in result.volumes] == ["a"] and result.built == 1
    assert [failure.case.name for failure in result.failures] == ["bad", "no"]
    with pytest.raises(InputError, match=r"bad.nii.gz: found only the value.*1 more of 3"):
        build.build_cache(cases, Preprocessing(), tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".tmp")]


def test_a_damaged_volume_is_named(case, tmp_path):
    (volume,) = build.build_cache([case], Preprocessing(), tmp_path / "cache")
    os.truncate(volume.folder / "image.b2nd", 200)
    with pytest.raises(InputError, match="part of the cache is damaged"):
        volume.read((0, 0, 0), (40, 30, 30))
    with pytest.raises(InputError, match="part of the cache is damaged"):
        volume.read_into(torch.empty(1, 4, 4, 4, dtype=torch.int16), (0, 0, 0))
    (volume.folder / "label.b2nd").unlink()
    with pytest.raises(InputError, match="part of the cache is missing"):
        volume.read_label((0, 0, 0), (4, 4, 4))


def test_a_cut_off_line_of_the_index_is_ignored(case, tmp_path):
    before = build.build_cache([case], Preprocessing(), tmp_path / "cache")
    index = tmp_path / "cache/index.jsonl"
    index.write_bytes(index.read_bytes()[:-20] + b"\n")
    assert build.build_cache([case], Preprocessing(), tmp_path / "cache") == before


# ---------------------------------------------------------------- several processes


def _volumes(folder, count, shape=(80, 72, 64)):
    cases = []
    for seed in range(count):
        hu, label = phantom(shape, seed=seed)
        paths = [folder / f"{seed}{kind}.nii" for kind in ("", "_label")]
        for path, array in zip(paths, (hu, label)):
            nifti(path, array, affine_of(shape, (4.0, 4.0, 4.0)))
        cases.append(Case(str(seed), *paths))
    return cases


def _build(cases, folder, results):
    results.put(build.build_missing(cases, Preprocessing(), folder).built)


def _start(cases, folder, count):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_build, args=(cases, folder, results)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes, results


def test_four_processes_build_a_cache_and_one_is_killed(tmp_path):
    cases, folder = _volumes(tmp_path, 24), tmp_path / "cache"
    processes, results = _start(cases, folder, 4)
    # until one is writing
    while not (folder.is_dir() and any(folder.glob(".tmp-*"))):
        time.sleep(0.001)
    os.kill(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0, 0]
    count, damaged = maintenance.verify(folder)
    assert (count, damaged) == (24, {})
    result = build.build_missing(cases, Preprocessing(), folder)
    assert result.built == 0 and len(result.volumes) == 24
    for volume, case in zip(result.volumes, cases):
        wanted = Preprocessing().apply(build.read_image(case.image))[0]
        assert float((volume.read((0, 0, 0), volume.shape) - wanted.as_tensor()).abs().max()) < 1e-6


def test_processes_share_the_work(tmp_path):
    cases = _volumes(tmp_path, 12)
    processes, results = _start(cases, tmp_path / "cache", 3)
    built = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len(maintenance.volume_folders(tmp_path / "cache")) == 12
    assert sum(built) == 12 and max(built) < 12
    assert not list((tmp_path / "cache").glob(".tmp-*")) and not list((tmp_path / "cache/locks").iterdir())


def test_folders_of_killed_processes_are_pruned(tmp_path):
    cases = _volumes(tmp_path, 2, (40, 40, 40))
    build.build_cache(cases, Preprocessing(), tmp_path / "cache")
    (dead := multiprocessing.get_context("fork").Process(target=int)).start()
    dead.join()
    for name, pid in (("mine", os.getpid()), ("left", dead.pid)):
        (tmp_path / f"cache/.tmp-{os.uname().nodename}-{pid}-{name}").mkdir()
    removed, _ = maintenance.prune(tmp_path / "cache", cases)
    assert [folder.name.rsplit("-", 1)[1] for folder in removed] == ["left"]


def _die(job):
    if job.case.name == "3":
        # as when memory runs out
        os.kill(os.getpid(), signal.SIGKILL)
    return failures.Failure(job.case, "fine")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_is_one_failure(monkeypatch, workers):
    context = multiprocessing.get_context("fork")
    pool = build.ProcessPoolExecutor
    monkeypatch.setattr(build, "_pool", lambda count: pool(count, mp_context=context))
    monkeypatch.setattr(build, "_build_case", _die)
    jobs = {n: build.Job(Case(str(n), f"{n}.nii"), None, None, None) for n in range(9)}
    reasons = {number: failure.reason for number, failure in build._in_workers(jobs, workers)}
    assert len(reasons) == 9 and "3.nii: the process that read it died" in reasons.pop(3)
    assert set(reasons.values()) == {"fine"}


@pytest.mark.slow
def test_worker_processes_give_what_one_process_gives(tmp_path):
    cases = _volumes(tmp_path, 9, (40, 40, 40))
    alone = build.build_cache(cases, Preprocessing(), tmp_path / "one")
    many = build.build_cache(cases, Preprocessing(), tmp_path / "two", workers=2)
    assert [volume.folder.name for volume in alone] == [volume.folder.name for volume in many]
    for a, b in zip(alone, many):
        np.testing.assert_array_equal(a.read((0, 0, 0), a.shape), b.read((0, 0, 0), b.shape))


def _memory_after(folder, counts, results):
    """Put the memory in use after each of the counts of built volumes."""
    preprocessing, done = Preprocessing(spacing=(5.0, 5.0, 5.0)), 0
    affine = affine_of((64, 64, 48), (4.0, 4.0, 4.0))
    hu, label = phantom((64, 64, 48))
    for count in counts:
        for number in range(done, count):
            image = nifti(folder / "x.nii.gz", np.roll(hu, number, axis=0), affine)
            case = Case(str(number), image, nifti(folder / "l.nii.gz", label, affine))
            (volume,) = build.build_missing([case], preprocessing, folder / "cache").volumes
            volume.read((3, 3, 3), (32, 32, 32))
        done = count
        results.put(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))


@pytest.mark.slow
def test_memory_of_a_worker_stays_flat_over_a_thousand_volumes(tmp_path):
    context = multiprocessing.get_context("fork")
    results, counts = context.Queue(), (200, 1000)
    worker = context.Process(target=_memory_after, args=(tmp_path, counts, results))
    worker.start()
    early, late = (results.get(timeout=600) for _ in counts)
    worker.join()
    assert late - early < 24 * 2**20, f"{early / 2**20:.0f} MiB after 200 volumes, {late / 2**20:.0f} after 1000"
