"""Bad updates: never made, reported with their files, and the policy that follows."""

import json
import math
import os
import signal

import pytest
import torch

from common import checkpoint
from common.data.sampler import StreamSampler, generator, index_at
from common.errors import InputError
from common.training.nonfinite import SPIKE_WARMUP, NonFiniteGuard, batch_names, dump_batches
from tests.common.training.toy import Numbers, Toy, run_toy, same_logs, same_weights
from tests.helpers import read_log


class Poisoned(Toy):
    """Its loss is not finite wherever the sample at one of these positions of the seed's stream is in the batch."""

    def __init__(self, *positions, seed=0):
        super().__init__()
        self.keys = {round(float(sample(p, seed)), 4) for p in positions}

    def forward(self, batch, step=0, part=0):
        values = super().forward(batch, step)
        hit = any(round(float(y), 4) in self.keys for y in batch["y"])
        return values | {"fit": values["fit"] * (float("nan") if hit else 1.0)}


def sample(position, seed):
    return (torch.rand(4, generator=generator(seed, position)) + index_at(position, 12, seed)).sum()


def logged(out_dir):
    return [json.loads(line) for line in (out_dir / "anomalies.jsonl").read_text().splitlines()]


def test_a_bad_update_is_skipped_and_logged_with_its_files(tmp_path, capsys):
    run_toy(tmp_path, Poisoned(17), micro_batch_size=2)  # update 4 takes the positions 16..19
    names = [f"scan{index_at(p, 12, 0)}" for p in range(16, 20)]
    assert logged(tmp_path) == [{"step": 4, "rollbacks": 0, "files": names}]
    said = capsys.readouterr().out
    assert "update 4 skipped" in said and ", ".join(names) in said
    dump = checkpoint.load(tmp_path / "anomalies/update-4-rank0.pth")
    assert [p for micro in dump["items"] for p, _ in micro] == [16, 17, 18, 19] and len(dump["batches"]) == 2
    assert float(dump["batches"][0]["y"][1]) == pytest.approx(float(sample(17, 0)))
    told_by_epoch = read_log(tmp_path)
    assert [round(line["skipped"], 3) for line in told_by_epoch] == [0, 0.333, 0, 0]
    assert all(
        math.isfinite(line["fit"]) and math.isfinite(line["grad_norm"]) for line in told_by_epoch
    )  # of updates that were made


def test_weights_and_moments_stay_as_they_were(tmp_path):
    """One epoch whose last update is bad ends with the weights and moments of the update before it."""
    poisoned, content = run_toy(tmp_path / "bad", Poisoned(9), epochs=1)

    class Stopped(Toy):
        def before_step(self, step):
            if step == 2:
                for p in self.parameters():
                    p.grad.fill_(float("inf"))

    by_hand, expected = run_toy(tmp_path / "hand", Stopped(), epochs=1)
    assert same_weights(poisoned, by_hand)
    state = content["optimizer"]["state"][0]
    assert state["step"] == 2 and torch.equal(state["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"])


def test_stop(tmp_path):
    with pytest.raises(InputError, match="--on_nan stop: update 4 .*anomalies.jsonl"):
        run_toy(tmp_path, Poisoned(17), on_nan="stop")
    assert checkpoint.load(tmp_path / checkpoint.LAST)["args"]["step"] == 3 and logged(tmp_path)[0]["step"] == 4


def rollback(out_dir, method, **settings):
    return run_toy(out_dir, method, on_nan="rollback", nan_row=2, log_every=1, **settings)


def test_rollback_returns_to_the_last_good_checkpoint(tmp_path, capsys):
    method, content = rollback(tmp_path, Poisoned(*range(16, 24)))  # updates 4 and 5
    said = capsys.readouterr().out
    assert "2 consecutive bad updates until update 5" in said and "(3 updates done)" in said
    assert content["args"]["loop"]["rollbacks"] == 1 and content["args"]["step"] == 12
    assert [line["step"] for line in read_log(tmp_path)] == [3, 6, 9, 12] and all(
        line["skipped"] == 0 for line in read_log(tmp_path)
    )
    assert [line["step"] for line in logged(tmp_path)] == [4, 5]  # kept: they say why

    reference = tmp_path / "reference"
    run_toy(reference, epochs=1)
    start = checkpoint.load(reference / checkpoint.LAST)
    start["args"]["loop"]["rollbacks"] = 1
    checkpoint.save(reference / checkpoint.LAST, start)
    expected, _ = run_toy(reference)
    assert same_weights(method, expected)


def test_a_rolled_back_run_resumes_exactly_too(tmp_path):
    whole, _ = rollback(tmp_path / "whole", Poisoned(*range(16, 24)))

    class Asked(Poisoned):
        def after_step(self, step):
            if step == 7:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        rollback(tmp_path / "cut", Asked(*range(16, 24)))
    resumed, _ = rollback(tmp_path / "cut", Poisoned(*range(16, 24)))
    assert same_weights(whole, resumed)
    same_logs(tmp_path / "whole", tmp_path / "cut")
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")


def test_rollback_counts_over_the_end_of_an_epoch(tmp_path, capsys):
    """Five in a row where an epoch has three."""
    _, content = run_toy(tmp_path, Poisoned(*range(12, 36)), on_nan="rollback", nan_row=5, log_every=1)
    assert "5 consecutive bad updates until update 7" in capsys.readouterr().out
    assert content["args"]["loop"]["rollbacks"] == 1 and content["args"]["step"] == 12


def test_a_batch_that_cannot_be_dumped_does_not_end_the_run(tmp_path, capsys):
    tmp_path.joinpath("anomalies").write_text("in the way")
    _, content = run_toy(tmp_path, Poisoned(17))
    assert content["args"]["step"] == 12 and "warning: " in capsys.readouterr().out


def test_rollbacks_end(tmp_path):
    with pytest.raises(InputError, match="after 5 rollbacks: stopped"):
        rollback(tmp_path, Toy(poison_from=4))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class Broken(Toy):
        def after_step(self, step):
            if step == 4:
                self.cls_token.data.fill_(float("inf"))

    with pytest.raises(InputError, match="weights are not finite"):
        run_toy(tmp_path, Broken(), log_every=1)
    assert checkpoint.load(tmp_path / checkpoint.LAST)["args"]["step"] == 3


def test_spikes():
    """Ten times the mean is a spike once the mean has settled; a level that lasts becomes the new normal."""
    guard = NonFiniteGuard(torch.device("cpu"), spike_factor=10.0)
    one = torch.tensor(1.0)
    assert guard.check(50 * one, one) == 0  # not settled
    assert not any(guard.check(one + 0.1 * (i % 3), one) for i in range(2 * SPIKE_WARMUP))
    assert guard.check(30 * one, one) == 1 and guard.check(one, 30 * one) == 1 and guard.in_a_row == 2
    assert guard.check(one, one) == 0 and guard.in_a_row == 0
    assert (
        guard.check(torch.tensor(float("nan")), one) == 1 and guard.check(one, one) == 0
    )  # and the mean is not poisoned
    verdicts = [bool(guard.check(40 * one, one)) for _ in range(60)]
    assert verdicts[0] and not verdicts[-1] and sum(verdicts) < 50


def test_an_overflow_under_a_scaler_is_skipped_but_no_anomaly():
    guard = NonFiniteGuard(torch.device("cpu"), scaled=True)
    inf, one = torch.tensor(float("inf")), torch.tensor(1.0)
    assert guard.check(inf, one) == 1 and guard.in_a_row == 0
    assert guard.check(inf, inf) == 1 and guard.in_a_row == 1


def test_the_dump_is_this_ranks_share(tmp_path):
    sampler = StreamSampler(12, 2, 1, rank=1, world_size=2, seed=0)
    dump_batches(tmp_path / "a" / "x.pth", 3, Numbers(), sampler)
    assert [p for micro in checkpoint.load(tmp_path / "a" / "x.pth")["items"] for p, _ in micro] == [14, 15]
    assert len(batch_names(3, Numbers(), sampler)) == 4
