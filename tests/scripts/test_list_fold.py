"""The list of a fold's training cases holds all of them and none that is held out."""

import json
from pathlib import Path

import pytest

from common.data.datalist import read_cases
from common.errors import InputError
from Finetune.cases import find_cases, split
from Finetune.presets import load_preset
from scripts.list_fold import main
from tests.Finetune.made import make_dataset


def test_list_holds_the_training_cases_of_a_fold_only(tmp_path):
    preset = load_preset("MSD09_Spleen")
    make_dataset(preset, tmp_path / "spleen")
    out = tmp_path / "lists/fold1.json"
    main(["--preset", preset.name, "--data", str(tmp_path / "spleen"), "--fold", "1", "--out", str(out)])
    training, held_out = split(find_cases(preset, tmp_path / "spleen"), preset, 1)
    listed = read_cases(out, None)
    assert [case.name for case in listed] == [case.name for case in training] and held_out
    assert all(case.label is None and Path(case.image).is_file() for case in listed)
    assert list(json.loads(out.read_text())) == ["training"]


def test_a_fold_that_does_not_exist_is_refused(tmp_path):
    make_dataset(load_preset("MSD09_Spleen"), tmp_path / "spleen")
    with pytest.raises(InputError, match="--fold 99"):
        main(["--preset", "MSD09_Spleen", "--data", str(tmp_path / "spleen"), "--fold", "99", "--out", "x.json"])
