"""The training loop: accumulation, skipping, resuming, logging, on a toy method."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import nn

from common import checkpoint
from common.data.sampler import StreamSampler, mix
from common.errors import InputError
from common.training.settings import LoopSettings, plan_updates
from tests.common.training.toy import Numbers, Toy, run_toy, same_logs, same_weights
from tests.helpers import read_log


def test_files_log_and_checkpoint_layout(tmp_path):
    method, content = run_toy(tmp_path)
    names = {p.name for p in tmp_path.iterdir() if p.suffix == ".pth"}
    assert names == {"checkpoint-1.pth", "checkpoint-3.pth", "checkpoint-last.pth", "checkpoint-previous.pth"}
    assert set(content) == {"model", "optimizer", "epoch", "args"}
    assert content["epoch"] == 3 and content["args"]["note"] == "toy" and content["args"]["step"] == 12
    log = read_log(tmp_path)
    assert [entry["epoch"] for entry in log] == [0, 1, 2, 3] and [entry["step"] for entry in log] == [3, 6, 9, 12]
    assert all(entry["skipped"] == 0 and entry["grad_norm"] > 0 and entry["seen"] > 0 for entry in log)
    assert any(p.name.startswith("events") for p in tmp_path.iterdir())


def test_hooks_stand_around_the_optimiser_step(tmp_path):
    method, _ = run_toy(tmp_path, epochs=1)
    assert method.calls == [(w, s, w == "before") for s in range(3) for w in ("before", "after")]


def test_the_update_is_torchs_own(tmp_path):
    """The same numbers from AdamW, the data in the stream's order and clipping written out by hand."""
    method, _ = run_toy(tmp_path, Toy(), epochs=1, clip_grad=0.5, amp="off")
    twin = Toy()
    decayed = [p for n, p in twin.named_parameters() if p.ndim > 1 and n != "cls_token"]
    rest = [p for n, p in twin.named_parameters() if p.ndim == 1 or n == "cls_token"]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    sampler = StreamSampler(12, 4, 1)
    sampler.start, sampler.stop = 0, 3
    for step, items in enumerate(sampler):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        samples = [Numbers()[item] for item in items]
        torch.manual_seed(mix(0, step, 0))
        loss = twin({k: torch.stack([s[k] for s in samples]) for k in "xy"}, step)["fit"] * 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
    for a, b in zip(method.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_accumulation_is_the_same_mathematics(tmp_path):
    def no_dropout():
        method = Toy()
        method.layers[2].p = 0.0
        return method

    whole, _ = run_toy(tmp_path / "a", no_dropout())
    parts, _ = run_toy(tmp_path / "b", no_dropout(), micro_batch_size=1)
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, workers):
    whole, _ = run_toy(tmp_path / "whole")

    class Interrupted(Toy):
        def after_step(self, step):
            if step == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "cut", Interrupted(), workers=workers)
    resumed, _ = run_toy(tmp_path / "cut", workers=workers)
    assert same_weights(whole, resumed)
    same_logs(tmp_path / "whole", tmp_path / "cut")


def test_an_exception_leaves_no_data_worker(tmp_path):
    class Broken(Toy):
        def after_step(self, step):
            raise RuntimeError

    # `error` holds the traceback, as the interpreter does when it ends a program.
    with pytest.raises(RuntimeError) as error:
        run_toy(tmp_path, Broken(), workers=1)
    assert error and not multiprocessing.active_children()


def test_a_finished_run_is_not_run_again(tmp_path):
    _, first = run_toy(tmp_path)
    method, second = run_toy(tmp_path)
    assert method.calls == [] and second["args"]["step"] == 12


def test_resume_none_starts_again(tmp_path):
    run_toy(tmp_path)
    method, _ = run_toy(tmp_path, resume="none")
    assert len(method.calls) == 24 and len(read_log(tmp_path)) == 4


def test_updates_without_a_finite_gradient_change_nothing(tmp_path):
    healthy, _ = run_toy(tmp_path / "a", epochs=1)
    with pytest.raises(InputError, match="epoch 2: no update had a finite gradient"):
        run_toy(tmp_path / "b", poisoned := Toy(poison_from=3))
    assert all(torch.equal(a, b) for a, b in zip(healthy.parameters(), poisoned.parameters()))
    assert checkpoint.load(tmp_path / "b" / checkpoint.LAST)["epoch"] == 0


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    run_toy(tmp_path)

    class Other(Toy):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

    with pytest.raises(InputError, match="checkpoint-last.pth.*extra"):
        run_toy(tmp_path, Other())


@pytest.mark.parametrize(
    "world, micro, batch, expected", [(1, None, 8, (8, 1)), (2, None, 8, (4, 1)), (2, 1, 8, (1, 4)), (1, 2, 8, (2, 4))]
)
def test_plan_keeps_the_global_batch(world, micro, batch, expected):
    settings = LoopSettings(out_dir=Path("x"), epochs=10, batch_size=batch, micro_batch_size=micro)
    plan = plan_updates(settings, 100, world)
    assert (plan.micro_batch, plan.accum) == expected and plan.batch == 8
    assert plan.steps_per_epoch == 12 and plan.total_steps == 120


def test_plan_says_what_cannot_be_cut():
    with pytest.raises(InputError, match="multiple of 6"):
        plan_updates(LoopSettings(out_dir=Path("x"), batch_size=8, micro_batch_size=3), 10, 2)
    with pytest.raises(InputError, match="empty"):
        plan_updates(LoopSettings(out_dir=Path("x")), 0, 1)
