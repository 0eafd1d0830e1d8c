"""The results of a sweep."""

import pytest

from Finetune.evaluation.sweep_report import summary


def test_differences_are_paired_by_case_and_seed():
    first = {f"c{i}": 0.3 + 0.03 * i for i in range(20)}
    second = {case: dice + 0.1 for case, dice in first.items()}
    better = [{case: dice + 0.02 for case, dice in scores.items()} for scores in (first, second)]
    scratch = summary("scratch", 4, 2, {0: first, 1: second}, {})
    row = summary("x", 4, 3, dict(enumerate(better)), {0: first, 1: second})
    delta = row["minus_scratch"]
    assert delta["difference"] == pytest.approx(0.02) and delta["ci95"] == pytest.approx([0.02, 0.02])
    assert row["missing"] == 1 and scratch["missing"] == 0 and scratch["minus_scratch"] is None
    assert scratch["ci95"][1] - scratch["ci95"][0] > 0.1
