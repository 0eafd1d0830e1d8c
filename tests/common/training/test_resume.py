"""A run that is stopped after any update and started again is the run that was not: weights, logs, and what it says
of itself."""

import os
import signal

import pytest
import torch

from common import checkpoint
from common.cli import parse
from common.config import load_yaml, to_dict
from common.errors import InputError
from common.signals import EXIT_REQUEUE, write_requeue_marker
from common.training.settings import LoopSettings
from tests.common.training.toy import Toy, points, run_toy, same_logs, same_weights
from tests.helpers import read_log


class Asked(Toy):
    """Gets a signal while it makes update `at`."""

    def __init__(self, at, number=signal.SIGTERM):
        super().__init__()
        self.at, self.number = at, number

    def after_step(self, step):
        if step == self.at:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    method, content = run_toy(folder, log_every=2)
    return folder, method, content


@pytest.mark.parametrize("at", range(12))
def test_stopped_after_any_update_and_resumed_is_the_same_run(tmp_path, whole, at):
    """12 updates in 4 epochs of 3, logged every 2: the stops fall within an epoch, within a log interval, and on the
    ends of both."""
    with pytest.raises(SystemExit) as stopped:
        run_toy(tmp_path, Asked(at), log_every=2)
    assert stopped.value.code == EXIT_REQUEUE == 75
    content = checkpoint.load(tmp_path / checkpoint.LAST)
    assert content["args"]["step"] == at + 1 and content["epoch"] == at // 3 and "progress" in content
    assert (tmp_path / "requeue").exists()
    method, content = run_toy(tmp_path, log_every=2)
    assert same_weights(method, whole[1]) and not (tmp_path / "requeue").exists()
    assert set(content) == set(whole[2]) and content["args"] == whole[2]["args"]
    for a, b in zip(content["optimizer"]["state"].values(), whole[2]["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    same_logs(tmp_path, whole[0])


@pytest.mark.parametrize(
    "settings", [{"workers": 2}, {"micro_batch_size": 2}, {"amp": "fp16", "epochs": 10}, {"spike_factor": 3.0}], ids=str
)
def test_also_with_workers_accumulation_fp16_and_spikes(tmp_path, settings):
    method, content = run_toy(tmp_path / "whole", **settings)
    for at in (3, 7):
        with pytest.raises(SystemExit):
            run_toy(tmp_path / "cut", Asked(at, signal.SIGUSR1), **settings)
    resumed, again = run_toy(tmp_path / "cut", **settings)
    assert same_weights(method, resumed) and content["args"] == again["args"]
    same_logs(tmp_path / "whole", tmp_path / "cut")


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run_toy(tmp_path, epochs=1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_settings_yaml_can_be_given_as_config(tmp_path):
    run_toy(tmp_path, epochs=1, clip_grad=None)
    settings = parse(LoopSettings, ["--config", str(tmp_path / "settings.yaml")])
    assert settings.out_dir == tmp_path and settings.epochs == 1 and settings.optim.clip_grad is None
    assert to_dict(settings) == load_yaml(tmp_path / "settings.yaml")


@pytest.mark.parametrize("change", [{"batch_size": 6}, {"samples_per_epoch": 8}, {"seed": 1}], ids=str)
def test_settings_that_change_the_data_order_are_refused(tmp_path, change):
    run_toy(tmp_path, epochs=1)
    with pytest.raises(InputError, match="checkpoint-last.pth.*found .*, expected"):
        run_toy(tmp_path, **change)


def test_other_data_of_the_same_size_is_refused(tmp_path):
    run_toy(tmp_path, epochs=1)
    with pytest.raises(InputError, match="data: found twelve numbers, expected twelve others"):
        run_toy(tmp_path, data="twelve others")


def test_the_same_command_resumes_a_run_started_from_a_file(tmp_path, whole):
    """From the file the first time; then from what it has saved, whether it was asked to stop or killed."""
    run_toy(tmp_path / "other", epochs=2)
    start = {"resume": str(tmp_path / "other/checkpoint-1.pth"), "log_every": 2}

    class Killed(Toy):
        def after_step(self, step):
            super().after_step(step)
            if step == 10:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        run_toy(tmp_path / "run", Asked(7), **start)
    killed = Killed()
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "run", killed, **start)
    assert killed.calls[0][1] == 8
    method, _ = run_toy(tmp_path / "run", **start)
    assert method.calls[0][1] == 9 and same_weights(method, whole[1])  # 9: the end of the epoch before the kill


def test_a_run_from_a_file_killed_early_keeps_its_start(tmp_path):
    """An older run lies in the folder: it is not what the second start goes on from."""
    run_toy(tmp_path, save_every=1)

    class Killed(Toy):
        def after_step(self, step):
            raise KeyboardInterrupt

    start = {"resume": str(tmp_path / "checkpoint-1.pth"), "save_every": 1}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_toy(tmp_path, Killed(), **start)
    assert checkpoint.load(tmp_path / checkpoint.LAST)["args"]["step"] == 6


def test_a_run_that_starts_anew_sets_the_old_one_aside(tmp_path):
    run_toy(tmp_path, epochs=1)
    pictures = {"health.png", "reconstruction-0.png"}
    for name in pictures | {"notes.txt"}:
        (tmp_path / name).touch()
    with pytest.raises(SystemExit):
        run_toy(tmp_path, Asked(1), resume="none", save_minutes=0)
    assert pictures <= {path.name for path in (tmp_path / "earlier-1").iterdir()} and (tmp_path / "notes.txt").exists()
    assert checkpoint.load(tmp_path / "earlier-1" / checkpoint.LAST)["args"]["step"] == 3
    assert len(read_log(tmp_path / "earlier-1")) == 1
    method, _ = run_toy(tmp_path, resume="none")  # it was asked to stop: the same command goes on
    assert method.calls[0][1] == 2 and [line["epoch"] for line in read_log(tmp_path)] == [0, 1, 2, 3]


def test_weight_decay_is_that_of_this_start(tmp_path):
    run_toy(tmp_path, epochs=1)
    _, content = run_toy(tmp_path, weight_decay=0.7)
    assert {group["weight_decay"] for group in content["optimizer"]["param_groups"]} == {0.0, 0.7}


def test_logs_past_the_checkpoint_of_a_killed_run_are_dropped(tmp_path, whole):
    """Killed between the epoch's log line and the end of writing its checkpoint: the line is there, the checkpoint
    is not."""

    class Killed(Toy):
        def checkpoint_state(self):
            if len(self.calls) == 12:  # the second epoch's
                raise KeyboardInterrupt
            return super().checkpoint_state()

    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path, Killed(), log_every=2)
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 2, "st')  # torn by the kill
    run_toy(tmp_path, log_every=2)
    same_logs(tmp_path, whole[0])


def test_every_update_is_a_point_once(tmp_path):
    with pytest.raises(SystemExit):
        run_toy(tmp_path, Asked(4), log_every=1)
    run_toy(tmp_path, log_every=1)
    shown = points(tmp_path)
    assert [step for step, _ in shown["train/fit"]] == list(range(12))
    assert [step for step, _ in shown["train/grad_norm/fit"]] == [
        0,
        3,
        6,
        9,
    ]  # once an epoch, not once more after a restart


def test_saved_every_so_often_within_an_epoch(tmp_path):
    """With no minutes between two writings, a process that dies in update 7 has lost that update alone."""

    class Dies(Toy):
        def after_step(self, step):
            if step == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path, Dies(), save_minutes=0.0)
    assert checkpoint.load(tmp_path / checkpoint.LAST)["args"]["step"] == 7


def test_a_stop_before_training_does_not_resume_an_older_run(tmp_path):
    """Started anew in the folder of a finished run, and asked to stop while the cache was filled."""
    run_toy(tmp_path, epochs=1)
    write_requeue_marker(tmp_path)
    method, _ = run_toy(tmp_path, resume="none", epochs=1)
    assert method.calls[0][1] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": "3"},
        {"epoch": {}},
        {"epoch": torch.zeros(2)},
        {"epoch": -1},
        {"args": None},
        {"optimizer": 1},
        {"model": {None: 1}},
    ],
)
def test_a_checkpoint_with_other_types_is_refused(tmp_path, change):
    run_toy(tmp_path, epochs=1)
    path = tmp_path / "checkpoint-last.pth"
    torch.save(checkpoint.load(path) | change, path)
    with pytest.raises(InputError, match="checkpoint-last.pth.*not a checkpoint of this run"):
        run_toy(tmp_path, epochs=2)
