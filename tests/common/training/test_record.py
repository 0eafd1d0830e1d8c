"""What a run writes about itself: run.json, the wait for data, and warnings that a resumed run does not repeat."""

import json
import time
from dataclasses import dataclass
from importlib.metadata import version

import torch

from common.config import group, setting
from common.distributed import Run
from common.runlog import TIMES, RunLog
from common.training.record import described, write_record
from common.training.settings import BatchPlan
from common.training.waiting import Waiting
from tests.common.training.toy import run_toy
from tests.helpers import read_log


@dataclass
class Part:
    depth: int = setting(4)


@dataclass
class Settings:
    out_dir: str = setting()
    method: str = setting("a")
    first: Part = group(Part, "First", method="a")


def test_settings_stand_beside_their_defaults():
    rows = described(Settings("runs/x", first=Part(6)))
    assert rows == [
        {"name": "out_dir", "group": "Settings", "value": "runs/x"},
        {"name": "method", "group": "Settings", "value": "a", "default": "a"},
        {"name": "depth", "group": "First", "value": 6, "default": 4},
    ]
    assert [row["name"] for row in described(Settings("x", method="b"))] == ["out_dir", "method"]


def test_settings_stand_beside_those_of_the_recipe():
    rows = described(Settings("runs/x", first=Part(6)), {"depth": 5})
    assert [row.get("recipe") for row in rows] == [None, "a", 5]
    assert described(Settings("runs/x"), {"out_dir": "runs/y"})[0]["recipe"] == "runs/y"


def test_the_record_has_parameters_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["program", "--out_dir", "runs/x", "--recipe", "a.sh", "--depth", "6"])
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    write_record(Settings(str(tmp_path)), Run(torch.device("cpu")), BatchPlan(1, 1, 1, 2, 4), model, {"title": "T"})
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["about"] == {"title": "T"} and record["trained_parameters"] == 6
    assert record["recipe"] == "a.sh" and record["settings"][0]["recipe"] == "runs/x"
    assert record["plan"]["total_steps"] == 4 and record["environment"]["torch"] == version("torch")


def slow(count, seconds):
    for number in range(count):
        time.sleep(seconds)
        yield number


def test_the_wait_for_data_is_its_share_of_the_time():
    batches = Waiting(slow(4, 0.02))
    for _ in batches:
        time.sleep(0.02)
    speed = batches.speed(8)
    assert 0.3 < speed["data_wait"] < 0.7 and 20 < speed["volumes_per_second"] <= 8 / 0.16
    assert Waiting([]).speed(0) == {}


def test_every_epoch_logs_its_speed(tmp_path):
    run_toy(tmp_path)
    assert all(line[name] >= 0 for line in read_log(tmp_path) for name in TIMES)
    assert (tmp_path / "run.json").exists()


def test_warnings_of_repeated_epochs_are_removed(tmp_path):
    log = RunLog(tmp_path)
    for epoch in range(3):
        log.add_warning(epoch, "growth", "too large")
    log.close()
    RunLog(tmp_path, first_step=20, first_epoch=2).close()
    lines = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
