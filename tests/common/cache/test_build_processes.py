"""One cache, many processes: work is shared, a killed one leaves nothing broken, a dying worker stops nothing."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from common.cache import build, failures, hashing, maintenance
from common.data.datalist import Case
from common.data.preprocessing import Preprocessing
from scripts.synthetic_ct import affine_of, phantom
from tests.common.made import nifti


def _volumes(folder, count, shape=(80, 72, 64)):
    cases = []
    for seed in range(count):
        hu, label = phantom(shape, seed=seed)
        paths = [folder / f"{seed}{kind}.nii" for kind in ("", "_label")]
        for path, array in zip(paths, (hu, label)):
            nifti(path, array, affine_of(shape, (4.0, 4.0, 4.0)))
        cases.append(Case(str(seed), *paths))
    return cases


def _fill(cases, folder, results):
    results.put(build.fill_cache(cases, Preprocessing(), folder).built)


def _start(cases, folder, count):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_fill, args=(cases, folder, results)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes, results


def test_four_processes_fill_one_cache_and_one_is_killed(tmp_path):
    cases, folder = _volumes(tmp_path, 24), tmp_path / "cache"
    processes, results = _start(cases, folder, 4)
    while not (folder.is_dir() and any(folder.glob(".tmp-*"))):  # amid the writing
        time.sleep(0.001)
    os.kill(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0, 0]
    count, damaged = maintenance.verify(folder)
    assert (count, damaged) == (24, {})
    filled = build.fill_cache(cases, Preprocessing(), folder)
    assert filled.built == 0 and len(filled.entries) == 24
    for entry, case in zip(filled.entries, cases):
        wanted = Preprocessing().apply(build.read_image(case.image))[0]
        assert float((entry.read((0, 0, 0), entry.shape) - wanted.as_tensor()).abs().max()) < 1e-6


def test_processes_share_the_work(tmp_path):
    cases = _volumes(tmp_path, 12)
    processes, results = _start(cases, tmp_path / "cache", 3)
    built = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len(maintenance.entry_folders(tmp_path / "cache")) == 12
    assert sum(built) == 12 and max(built) < 12
    assert not list((tmp_path / "cache").glob(".tmp-*")) and not list((tmp_path / "cache/locks").iterdir())


def test_what_a_killed_process_left_is_pruned(tmp_path):
    cases = _volumes(tmp_path, 2, (40, 40, 40))
    build.build_cache(cases, Preprocessing(), tmp_path / "cache")
    (dead := multiprocessing.get_context("fork").Process(target=int)).start()
    dead.join()
    for name, pid in (("mine", os.getpid()), ("left", dead.pid)):
        (tmp_path / f"cache/.tmp-{os.uname().nodename}-{pid}-{name}").mkdir()
    gone, _ = maintenance.prune(tmp_path / "cache", cases)
    assert [folder.name.rsplit("-", 1)[1] for folder in gone] == ["left"]


def _die(case, *rest):
    if case.name == "3":
        os.kill(os.getpid(), signal.SIGKILL)  # as when memory runs out
    return failures.Failure(case, "fine")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_is_one_failure(monkeypatch, workers):
    context = multiprocessing.get_context("fork")
    pool = build.ProcessPoolExecutor
    monkeypatch.setattr(build, "_pool", lambda count: pool(count, mp_context=context))
    monkeypatch.setattr(build, "_build_case", _die)
    jobs = {n: (Case(str(n), f"{n}.nii"), None, None) for n in range(9)}
    reasons = {number: failure.reason for number, failure in build._in_workers(jobs, workers)}
    assert len(reasons) == 9 and "3.nii: the process that read it died" in reasons.pop(3)
    assert set(reasons.values()) == {"fine"}


@pytest.mark.slow
def test_worker_processes_give_what_one_process_gives(tmp_path):
    cases = _volumes(tmp_path, 9, (40, 40, 40))
    alone = build.build_cache(cases, Preprocessing(), tmp_path / "one")
    many = build.build_cache(cases, Preprocessing(), tmp_path / "two", workers=2)
    assert [entry.folder.name for entry in alone] == [entry.folder.name for entry in many]
    for a, b in zip(alone, many):
        np.testing.assert_array_equal(a.read((0, 0, 0), a.shape), b.read((0, 0, 0), b.shape))


def _memory_after(folder, counts, results):
    """Memory now, after each of the counts of built volumes."""
    preprocessing, done = Preprocessing(spacing=(5.0, 5.0, 5.0)), 0
    affine = affine_of((64, 64, 48), (4.0, 4.0, 4.0))
    hu, label = phantom((64, 64, 48))
    for count in counts:
        for number in range(done, count):
            image = nifti(folder / "x.nii.gz", np.roll(hu, number, axis=0), affine)
            case = Case(str(number), image, nifti(folder / "l.nii.gz", label, affine))
            (entry,) = build.fill_cache([case], preprocessing, folder / "cache").entries
            entry.read((3, 3, 3), (32, 32, 32))
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
    assert hashing.peak_memory() > 0
