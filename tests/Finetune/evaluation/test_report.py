"""The files of a score card."""

import csv

import numpy as np
import pytest

from tests.Finetune.scoring import run


def test_score_card_of_two_cases(two_cases, capsys):
    card = run(two_cases)
    rows = list(csv.DictReader(open(two_cases / "card/scores.csv")))
    assert len(rows) == 2 * 13 and len(card["classes"]) == 13
    by_key = {(row["case"], row["name"]): row for row in rows}
    assert by_key["img0036", "left kidney"]["status"] == "absent" and by_key["img0036", "left kidney"]["dice"] == ""
    assert by_key["img0036", "right kidney"]["status"] == "false positive"
    assert by_key["img0036", "spleen"]["status"] == "missed" and float(by_key["img0036", "spleen"]["nsd"]) == 0
    diagonal = np.linalg.norm(np.array([30, 28, 26]) * [2, 2, 3])
    assert float(by_key["img0036", "spleen"]["hd95"]) == pytest.approx(diagonal)
    assert card["counts"] == {"present": 24, "missed": 1, "false_positives": 1, "absent": 1}
    dice = [[float(r["dice"]) for r in rows if r["case"] == case and r["dice"]] for case in ("img0035", "img0036")]
    assert card["mean"]["dice"]["mean"] == pytest.approx(np.mean([np.mean(values) for values in dice]))
    low, high = card["mean"]["dice"]["ci95"]
    assert low <= card["mean"]["dice"]["mean"] <= high
    text = capsys.readouterr().out
    assert "right adrenal gland" in text and "rule: " in text and "predictions.json: it is unknown how" in text
    assert (two_cases / "card/dice.png").stat().st_size > 5000
    assert [p.name for p in sorted((two_cases / "card/worst").iterdir())] == ["1-img0036.png", "2-img0035.png"]
