"""The paired comparison of two score cards."""

import json
import re

import nibabel as nib
import numpy as np
import pytest

from common.errors import InputError
from Finetune.evaluate import main
from tests.Finetune.scoring import run, save


def test_compare_is_paired_by_case(two_cases, capsys):
    run(two_cases, out="a")
    # b is a perfect prediction
    for path in (two_cases / "p").glob("*.nii.gz"):
        save(path, np.asarray(nib.load(two_cases / f"label/label{path.name[3:]}").dataobj))
    run(two_cases, out="b")
    main(["--compare", str(two_cases / "a"), str(two_cases / "b"), "--out", str(two_cases / "ab")])
    result = json.loads((two_cases / "ab/compare.json").read_text())
    a = json.loads((two_cases / "a/scores.json").read_text())
    assert result["metrics"]["dice"]["difference"] == pytest.approx(1 - a["mean"]["dice"]["mean"])
    assert result["metrics"]["dice"]["b_higher"] == 2 and result["metrics"]["hd95"]["difference"] < 0
    # a false positive in a, absent in b: no pair
    assert result["classes"]["right kidney"]["unpaired"] == 1
    text = capsys.readouterr().out
    assert re.search("mean HD95 .*b better in 2 of 2", text)
    assert re.search("right kidney .*b better in 1 of 1, 1 with a value in one only", text)
    assert not result["labels_differ_in"]
    compare_with(two_cases, "c", change_a_label)
    assert re.search("reference labels differ.* img0036", capsys.readouterr().out)
    with pytest.raises(InputError, match="d: not a readable score card"):
        compare_with(two_cases, "d", lambda folder: None, "[]")
    with pytest.raises(InputError, match="not the same cases"):
        compare_with(two_cases, "e", lambda folder: (folder / "p/img0036.nii.gz").unlink())


def change_a_label(folder):
    path = folder / "label/label0036.nii.gz"
    label = np.asarray(nib.load(path).dataobj)
    save(path, np.where(label == 6, 1, label))


def compare_with(folder, out, change, content=None):
    """Compare card a with another one after a change of the files, or with other content of its scores.json."""
    change(folder)
    run(folder, out=out)
    if content:
        (folder / out / "scores.json").write_text(content)
    main(["--compare", str(folder / "a"), str(folder / out), "--out", str(folder / "compared")])
