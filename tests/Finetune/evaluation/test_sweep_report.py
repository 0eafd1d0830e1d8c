"""The results of a sweep."""

import pytest

from Finetune.evaluation.sweep_report import draw_curves, summary, sweep_table

CASES = [f"c{i}" for i in range(20)]


def test_differences_are_paired_by_case_and_seed():
    first = {case: 0.3 + 0.03 * number for number, case in enumerate(CASES)}
    second = {case: dice + 0.1 for case, dice in first.items()}
    better = [{case: dice + 0.02 for case, dice in scores.items()} for scores in (first, second)]
    scratch = summary({0: first, 1: second}, CASES, {"scratch": {}})
    row = summary(dict(enumerate(better)), CASES, {"scratch": {0: first, 1: second, 2: second}})
    delta = row["minus_scratch"]
    assert delta["difference"] == pytest.approx(0.02) and delta["ci95"] == pytest.approx([0.02, 0.02])
    assert delta["seeds"] == 2 and scratch["minus_scratch"] is None
    assert scratch["ci95"][1] - scratch["ci95"][0] > 0.1


def test_results_are_of_the_test_cases_only():
    scores = {0: {case: 0.9 if number < 10 else 0.5 for number, case in enumerate(CASES)}}
    row = summary(scores, CASES[10:], {})
    assert row["score"] == pytest.approx(0.5) and row["seeds"] == {"0": pytest.approx(0.5)}


def row(model, init, count, score, **more):
    same = {"seeds": {"0": score, "1": score}, "score": score, "ci95": [score - 0.1, score + 0.1], "missing": 0}
    same |= {"pretraining_seeds": 0, "chosen": {"lr": 0.001}, "minus_scratch": None, "minus_dynunet": None}
    return {"model": model, "init": init, "count": count} | same | more


def test_the_table_has_what_was_chosen_and_both_differences(tmp_path):
    delta = {"difference": 0.2, "ci95": [0.1, 0.3], "seeds": 2}
    rows = [row("dynunet", "scratch", 4, 0.6), row("unetr", "mae", 4, 0.5, pretraining_seeds=3, minus_scratch=delta)]
    rows += [row("unetr", "mae", count, 0.5) for count in (8, 32)]
    result = {"preset": "X", "fold": 0, "score": "mean Dice", "updates": 100, "seeds": [0, 1], "tuned": True}
    result |= {"with_dynunet": True, "development_cases": CASES[:10], "test_cases": CASES[10:], "rows": rows}
    table = sweep_table(result | {"failed": {"one": "no memory"}})
    assert "over 10 test cases after 100 updates" in table and "10 development cases" in table
    assert "minus dynunet" in table and "lr 0.001" in table and "+0.2000 (+0.1000..+0.3000)" in table
    assert table.endswith("FAILED: one: no memory\n")
    plain = sweep_table(result | {"failed": {}, "tuned": False, "with_dynunet": False, "seeds": [0]})
    assert "dynunet " in plain and "minus dynunet" not in plain and "chosen" not in plain and "one seed" in plain
    draw_curves(tmp_path / "sweep.png", rows, "mean Dice")
    assert (tmp_path / "sweep.png").stat().st_size > 5000
