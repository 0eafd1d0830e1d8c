"""Dry run, verify, prune, report."""

import pytest

from common.cache import build, maintenance
from common.data.datalist import Case
from common.data.preprocessing import Preprocessing
from tests.common.made import labelled, nifti


@pytest.fixture
def cached(tmp_path):
    cases = [Case(str(seed), nifti(tmp_path / f"{seed}.nii.gz", seed=seed)) for seed in range(4)]
    cases.append(Case("labelled", *labelled(tmp_path, seed=4)))
    return cases, build.build_cache(cases, Preprocessing(), tmp_path / "cache"), tmp_path / "cache"


def test_a_dry_run_writes_nothing_and_is_about_right(cached, tmp_path):
    cases, volumes, _ = cached
    estimate = maintenance.estimate(cases, Preprocessing(), tmp_path / "other")
    assert not (tmp_path / "other").exists() or not maintenance.volume_folders(tmp_path / "other")
    actual = sum(maintenance.folder_bytes(volume.folder) for volume in volumes)
    assert actual / 2 < estimate.cache_bytes < actual * 2
    assert (estimate.volumes, estimate.cached, estimate.failed) == (5, 0, 0) and estimate.seconds > 0
    assert "about" in str(estimate)
    again = maintenance.estimate(cases, Preprocessing(), tmp_path / "cache")
    assert (again.cached, again.sampled) == (5, 0)


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda f: (f / "image.b2nd").write_bytes((f / "image.b2nd").read_bytes()[:-1]), "image.b2nd has changed"),
        (lambda f: (f / "image_2x.b2nd").unlink(), "image_2x.b2nd is missing"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json cannot be read"),
    ],
)
def test_verify_finds_the_damaged_volume(cached, damage, problem):
    _, volumes, folder = cached
    assert maintenance.verify(folder) == (5, {})
    damage(volumes[2].folder)
    count, wrong = maintenance.verify(folder, workers=2)
    assert count == 5 and list(wrong) == [volumes[2].folder] and problem in wrong[volumes[2].folder]


def test_prune_removes_volumes_that_no_list_names(cached):
    cases, _, folder = cached
    build.build_cache(cases, Preprocessing(low=-900), folder)
    folders, size = maintenance.prune(folder, cases[:3], remove=False)
    assert len(folders) == 4 and size > 0 and len(maintenance.volume_folders(folder)) == 10
    maintenance.prune(folder, cases[:3])
    assert len(maintenance.volume_folders(folder)) == 6
    assert build.build_missing(cases[:3], Preprocessing(), folder).built == 0
    assert build.build_missing(cases, Preprocessing(), folder).built == 2


def test_the_report_describes_the_volumes(cached):
    _, volumes, folder = cached
    text = maintenance.describe_cache(volumes)
    assert "5 volumes, 5 different" in text
    row = next(line for line in text.splitlines() if line.startswith("spacing W as scanned"))
    assert row.split()[-3:] == ["8", "8", "8"]
