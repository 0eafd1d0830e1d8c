"""The order of the runs of a sweep, and several at once, with programs that only record."""

import types

import pytest

from common.signals import EXIT_REQUEUE, Requeue
from Finetune.presets import load_preset
from Finetune.sweeps import schedule
from Finetune.sweeps.plan import Group, Plan, SweepRun
from Finetune.sweeps.recipe import Recipe
from Finetune.sweeps.runs import Program

SEEDS = (0, 1, 2)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A plan of one group, whose runs score what `scores` says of their candidate, and fake programs."""
    done, started, scores = {}, [], [0.2, 0.7, 0.5]
    runs = {(c, s): SweepRun(f"candidate {c}, seed {s}", (), tmp_path / f"{c}-{s}") for c in range(3) for s in SEEDS}
    group = Group("unetr", "mae", 4, 1, runs)
    grid = tuple({"lr": lr} for lr in (0.1, 0.2, 0.3))
    plan = Plan(load_preset("BTCV"), Recipe({}, 20, 0.1), grid, SEEDS, (), ("a", "b"), ("c",), (group,))
    number = {run.folder: candidate for (candidate, _), run in runs.items()}

    def execute(config, plan, run):
        code = yield Program("train", (), 1, 2)
        if code:
            return "no memory"
        done[run.folder] = True

    monkeypatch.setattr(schedule, "execute", execute)
    monkeypatch.setattr(schedule, "is_done", lambda run, preset: run.folder in done)
    of_cases = {"a": 0.0, "c": -9.0}
    monkeypatch.setattr(schedule, "case_scores", lambda run, preset: of_cases | {"b": 2 * scores[number[run.folder]]})
    codes, order = {}, []

    def start(key, module, flags, log, lock, threads, environment):
        started.append((key, environment))
        order.append(key)

    def wait():
        key = order.pop(0)
        return key, codes.get(key, 0)

    programs = types.SimpleNamespace(start=start, wait=wait, send_signal=lambda number: None)

    def run(jobs=1):
        made = schedule.Schedule(types.SimpleNamespace(jobs=jobs), plan, plan.groups, programs)
        made.run()
        return made

    return types.SimpleNamespace(run=run, started=started, codes=codes, plan=plan, group=group)


def test_the_best_candidate_is_used_for_the_other_seeds(sweep, capsys):
    sweep.run()
    first = [f"candidate {c}, seed 0" for c in range(3)]
    assert [key for key, _ in sweep.started] == [*first, "candidate 1, seed 1", "candidate 1, seed 2"]
    assert schedule.chosen(sweep.group, sweep.plan) == 1
    assert schedule.development_scores(sweep.group, sweep.plan) == pytest.approx([0.2, 0.7, 0.5])
    assert "5 of 5 runs are done" in capsys.readouterr().out
    sweep.run()
    assert len(sweep.started) == 5


def test_a_failed_candidate_leaves_its_group_unfinished(sweep):
    sweep.codes["candidate 0, seed 0"] = 2
    assert sweep.run().failures == {"candidate 0, seed 0": "no memory"}
    assert len(sweep.started) == 3 and schedule.chosen(sweep.group, sweep.plan) is None
    # the same command tries it again
    sweep.codes.clear()
    assert sweep.run().failures == {} and len(sweep.started) == 6


def test_a_stopped_run_stops_the_sweep(sweep):
    sweep.codes["candidate 1, seed 0"] = EXIT_REQUEUE
    with pytest.raises(Requeue):
        sweep.run()
    assert len(sweep.started) == 2
    sweep.codes.clear()
    sweep.run()
    assert len(sweep.started) == 2 + 4


def test_runs_at_once_are_dealt_over_the_devices(sweep, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(schedule.torch.cuda, "device_count", lambda: 2)
    sweep.run(jobs=3)
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in sweep.started[:3]] == ["4", "7", "4"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert schedule.cuda_devices() == ["0", "1"]
