"""Dry run, verify, prune, fingerprint."""

import pytest

from common.cache import build, maintenance
from common.data.datalist import Case
from common.data.preprocessing import Preprocessing
from tests.common.made import labelled, nifti


@pytest.fixture
def filled(tmp_path):
    cases = [Case(str(seed), nifti(tmp_path / f"{seed}.nii.gz", seed=seed)) for seed in range(4)]
    cases.append(Case("labelled", *labelled(tmp_path, seed=4)))
    return cases, build.build_cache(cases, Preprocessing(), tmp_path / "cache"), tmp_path / "cache"


def test_a_dry_run_writes_nothing_and_is_about_right(filled, tmp_path):
    cases, entries, _ = filled
    guess = maintenance.estimate(cases, Preprocessing(), tmp_path / "other")
    assert not (tmp_path / "other").exists() or not maintenance.entry_folders(tmp_path / "other")
    really = sum(maintenance.folder_bytes(entry.folder) for entry in entries)
    assert really / 2 < guess.cache_bytes < really * 2
    assert (guess.volumes, guess.cached, guess.bad) == (5, 0, 0) and guess.seconds > 0
    assert "about" in str(guess)
    again = maintenance.estimate(cases, Preprocessing(), tmp_path / "cache")
    assert (again.cached, again.sampled) == (5, 0)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: (f / "image.b2nd").write_bytes((f / "image.b2nd").read_bytes()[:-1]), "image.b2nd has changed"),
        (lambda f: (f / "image_2x.b2nd").unlink(), "image_2x.b2nd is missing"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json cannot be read"),
    ],
)
def test_verify_finds_the_damaged_entry(filled, damage, said):
    _, entries, folder = filled
    assert maintenance.verify(folder) == (5, {})
    damage(entries[2].folder)
    count, wrong = maintenance.verify(folder, workers=2)
    assert count == 5 and list(wrong) == [entries[2].folder] and said in wrong[entries[2].folder]


def test_prune_removes_what_no_list_names_whatever_its_settings(filled):
    cases, _, folder = filled
    build.build_cache(cases, Preprocessing(low=-900), folder)
    gone, freed = maintenance.prune(folder, cases[:3], remove=False)
    assert len(gone) == 4 and freed > 0 and len(maintenance.entry_folders(folder)) == 10
    maintenance.prune(folder, cases[:3])
    assert len(maintenance.entry_folders(folder)) == 6
    assert build.fill_cache(cases[:3], Preprocessing(), folder).built == 0
    assert build.fill_cache(cases, Preprocessing(), folder).built == 2


def test_the_fingerprint_tells_the_data_set(filled):
    _, entries, folder = filled
    text = maintenance.describe_cache(entries)
    assert "5 volumes, 5 different" in text
    row = next(line for line in text.splitlines() if line.startswith("spacing W as scanned"))
    assert row.split()[-3:] == ["8", "8", "8"]
