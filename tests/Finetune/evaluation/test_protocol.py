"""Notes of a score card, and protocols of several folders."""

import json
import re

import pytest

from common.errors import InputError
from Finetune.evaluate import main
from tests.Finetune.scoring import run


def test_notes_name_label_authors_leaks_and_selection(two_cases):
    (two_cases / "dataset.json").write_text(json.dumps({"labels_by": "a model (X), not experts"}))
    member = {"checkpoint": "c.pth", "sha256": "0" * 64, "selected": "best", "fold": 1, "init": "x.pth", "leak": "seen"}
    protocol = {"checkpoints": [member], "overlap": 0.5, "blending": "gaussian", "flips": False, "cases": []}
    (two_cases / "p/predictions.json").write_text(json.dumps(protocol))
    card = run(two_cases)
    assert card["protocol"]["overlap"] == 0.5 and card["protocol"]["checkpoints"] == [member]
    text = "\n".join(card["notes"])
    for note in ("a model (X), not experts", "LEAK in fold 1, c.pth: seen", "c.pth was picked by validation"):
        assert note in text
    assert re.search("2 case.* not made by this prediction: img0035, img0036", text)
    found = {"cases": ["img0035", "img0036"], "failed": ["img0037"], "trained_on": ["img0036", "img0001"]}
    (two_cases / "p/predictions.json").write_text(json.dumps(protocol | found | {"preset": "WORD"}))
    text = "\n".join(run(two_cases)["notes"])
    assert re.search("1 case.* could not be predicted.*: img0037", text) and "preset WORD" in text
    assert re.search("1 case.* TRAINED the network: img0036", text) and "not made by" not in text


def test_folds_are_pooled_and_each_case_counts_once(two_cases):
    together = run(two_cases)
    (two_cases / "q").mkdir()
    (two_cases / "p/img0036.nii.gz").rename(two_cases / "q/img0036.nii.gz")
    flags = ["--predictions", two_cases / "p", two_cases / "q", "--labels", two_cases / "label", "--preset", "BTCV"]
    main([*map(str, flags), "--out", str(two_cases / "folds")])
    assert json.loads((two_cases / "folds/scores.json").read_text())["mean"] == together["mean"]
    for folder, overlap in (("p", 0.5), ("q", 0.25)):
        content = {"checkpoints": [], "cases": ["img0035", "img0036"], "overlap": overlap, "flips": True}
        (two_cases / folder / "predictions.json").write_text(json.dumps(content))
    main([*map(str, flags), "--out", str(two_cases / "folds")])
    card = json.loads((two_cases / "folds/scores.json").read_text())
    assert "overlap" not in card["protocol"] and card["protocol"]["flips"] is True
    assert any("different settings: overlap" in note for note in card["notes"])
    (two_cases / "q/img0035.nii.gz").write_bytes((two_cases / "p/img0035.nii.gz").read_bytes())
    with pytest.raises(InputError, match="img0035 also in"):
        main([*map(str, flags), "--out", str(two_cases / "folds")])
