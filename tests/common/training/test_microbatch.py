"""`--micro_batch_size auto`: the size that it finds, and that nothing of the trials remains."""

import pytest
import torch

from common.errors import InputError
from common.training import microbatch
from common.training.microbatch import largest
from common.training.settings import LoopSettings, PrecisionSettings, plan_updates
from tests.common.training.toy import Toy, run_toy, same_weights


def set_memory(monkeypatch, volumes, keeps=1000):
    """Let a pass of one volume keep `keeps` bytes, and just `volumes` of them fit."""
    monkeypatch.setattr(microbatch, "kept_bytes", lambda *_: keeps)
    monkeypatch.setattr(microbatch, "available_memory", lambda: 4 * keeps * volumes)


def no_dropout():
    method = Toy()
    method.layers[2].p = 0.0
    return method


@pytest.mark.parametrize("fitting, expected", [(0, None), (1, 1), (5, 4), (100, 12)])
def test_largest_size_before_one_does_not_fit(fitting, expected):
    tried = []
    assert largest([1, 2, 4, 6, 12], lambda size: tried.append(size) or size <= fitting) == expected
    # none after the first that failed
    assert sum(size > fitting for size in tried) <= 1


@pytest.mark.parametrize("volumes, expected", [(1, 1), (2, 2), (3, 2), (4, 4), (1000, 4)])
def test_a_run_has_the_largest_size_that_divides_its_batch(tmp_path, monkeypatch, capsys, volumes, expected):
    set_memory(monkeypatch, volumes)
    _, content = run_toy(tmp_path, epochs=1, micro_batch_size="auto")
    assert content["args"]["micro_batch"] == expected
    assert f"micro-batches of {expected} volume(s)" in capsys.readouterr().out


kept = microbatch.kept_bytes


def test_a_run_is_the_same_as_with_the_number(tmp_path, monkeypatch):
    """With dropout as well: no random number is left over, and no gradient or mean of the trial."""
    set_memory(monkeypatch, 2)
    monkeypatch.setattr(microbatch, "kept_bytes", lambda state, batch, weights: kept(state, batch, weights) and 1000)
    found, by_auto = run_toy(tmp_path / "a", micro_batch_size="auto")
    given, by_number = run_toy(tmp_path / "b", micro_batch_size=2)
    assert same_weights(found, given)
    assert by_auto["args"]["loop"]["guard"] == by_number["args"]["loop"]["guard"]


def test_nothing_of_a_trial_remains(tmp_path, monkeypatch):
    set_memory(monkeypatch, 1)
    seen = {}

    class Watched(Toy):
        def discard_passes(self):
            seen["called"] = True

    def traced(state, batch, weights):
        torch.rand(7)
        return kept(state, batch, weights)

    monkeypatch.setattr(microbatch, "kept_bytes", traced)
    plain = microbatch.with_largest_micro_batch

    def checked(plan, state, *args):
        before = torch.get_rng_state()
        plan = plain(plan, state, *args)
        seen["rng"] = torch.equal(torch.get_rng_state(), before)
        seen["gradients"] = [p.grad for p in state.parameters]
        return plan

    monkeypatch.setattr("common.training.trainer.with_largest_micro_batch", checked)
    run_toy(tmp_path, Watched(), epochs=1, micro_batch_size="auto")
    assert seen["called"] and seen["rng"] and all(grad is None for grad in seen["gradients"])


def test_a_resumed_run_keeps_its_size_and_may_have_another(tmp_path, monkeypatch):
    whole, _ = run_toy(tmp_path / "whole", no_dropout(), micro_batch_size=4)

    class Interrupted(Toy):
        def after_step(self, step):
            if step == 7:
                raise KeyboardInterrupt

    cut = Interrupted()
    cut.layers[2].p = 0.0
    set_memory(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "cut", cut, micro_batch_size="auto")
    # more fits now, and the run keeps its 2
    set_memory(monkeypatch, 4)
    resumed, content = run_toy(tmp_path / "cut", no_dropout(), epochs=4, micro_batch_size="auto")
    assert content["args"]["micro_batch"] == 2
    # less fits than it had
    set_memory(monkeypatch, 1)
    _, content = run_toy(tmp_path / "cut", no_dropout(), epochs=5, micro_batch_size="auto")
    assert content["args"]["micro_batch"] == 1
    for a, b in zip(whole.parameters(), resumed.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_found_is_named(tmp_path, monkeypatch):
    set_memory(monkeypatch, 0)
    with pytest.raises(InputError, match="a pass of one volume does not fit the memory of cpu"):
        run_toy(tmp_path, micro_batch_size="auto")
    sharded = PrecisionSettings(fsdp=True)
    with pytest.raises(InputError, match="--micro_batch_size auto: cannot be tried with --fsdp"):
        plan_updates(LoopSettings(out_dir=tmp_path, micro_batch_size="auto", precision=sharded), 10, 2)
    both = PrecisionSettings(fsdp=True, channels_last=True)
    with pytest.raises(InputError, match="--channels_last: found --fsdp too"):
        plan_updates(LoopSettings(out_dir=tmp_path, precision=both), 10, 2)


def test_kept_bytes_grow_with_the_activations():
    """Compared for a linear layer, GELU and another linear layer."""
    found = {}

    class Wide(Toy):
        def __init__(self, width):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.GELU(), torch.nn.Linear(width, 1))

    for width in (1000, 2000):
        method = Wide(width)
        state = type(
            "State", (), dict(method=method, autocast=None, run=type("Run", (), {"device": torch.device("cpu")}))
        )
        found[width] = kept(state, {"x": torch.rand(1, 4), "y": torch.rand(1)}, {"fit": 1.0})
    # input and output of GELU in float32
    assert found[2000] - found[1000] == 2 * 1000 * 4


def test_a_device_out_of_memory_is_a_size_that_does_not_fit(monkeypatch):
    cuda = dict(empty_cache=None, reset_peak_memory_stats=None, mem_get_info=(1000, 1000), memory_reserved=0)
    for name, value in (cuda | dict(max_memory_allocated=800)).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    parameter = torch.nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.AdamW([parameter])

    def passes(state, batch, weights):
        if batch > 4:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(microbatch, "run_passes", passes)
    run = type("Run", (), {"device": torch.device("cuda")})
    state = type("State", (), dict(optimizer=optimizer, parameters=[parameter], run=run))
    fits = microbatch.trial(state, int, {})
    assert [fits(size) for size in (1, 4, 8)] == [True, True, False]
    # 800 bytes and the two moments of 40 parameters are more than 90 % of 1000
    state.parameters = [torch.nn.Parameter(torch.zeros(20))]
    assert not microbatch.trial(state, int, {})(1)
