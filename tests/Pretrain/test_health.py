"""The volumes that learning is measured on, and the warnings of runs that learn and that do not."""

import json
import math
import sys
from dataclasses import dataclass

import pytest
import torch

from common.runlog import TIMES
from common.training.settings import BatchPlan
from Pretrain import health, main_pretrain
from tests.helpers import ct, read_log, write_nifti
from tests.Pretrain.test_main_pretrain import pretrain


@dataclass(frozen=True)
class Volume:
    content_hash: str


def volumes(count):
    return [Volume(f"{7919 * i % 1000:03}") for i in range(count)]


# ---------------------------------------------------------------- held-out volumes


def test_held_out_volumes_do_not_depend_on_the_order():
    listed = volumes(60)
    training, held_out = health.hold_out(listed, 0.05)
    assert len(held_out) == 3 and training == [v for v in listed if v not in held_out]
    other, again = health.hold_out(listed[::-1], 0.05)
    assert again == held_out and set(other) == set(training)


@pytest.mark.parametrize("count, share, expected", [(19, 0.05, 0), (20, 0.01, 1), (20, 0.0, 0), (40, 0.1, 4)])
def test_number_of_held_out_volumes(count, share, expected):
    training, held_out = health.hold_out(volumes(count), share)
    assert len(held_out) == expected and len(training) == count - expected


def test_a_volume_listed_twice_is_on_one_side():
    training, held_out = health.hold_out(volumes(40) + volumes(40), 0.05)
    assert len(held_out) == 4 and not set(training) & set(held_out)


# ---------------------------------------------------------------- warnings

# a run on the hippocampus that learns: ViT 192x6, patch 8, --standardize, lr 3e-4
HEALTHY = {
    "norm/content": 0.13,
    "norm/participation_ratio": 9.6,
    "patches/participation_ratio": 5.0,
    "growth": 5.0,
    "local/over_mean": 1.1,
    "local/over_position": 1.2,
    "monitor/entropy": 0.967,
    "monitor/kl": 0.01,
    "monitor/entropy_of_mean": 0.98,
    "align_up_mid": 0.4,
    "chance_up_mid": 0.5,
}


def test_a_healthy_run_has_no_warnings():
    assert health.warnings(HEALTHY) == {} and health.warnings({}) == {}


@pytest.mark.parametrize(
    "changes, kind, words",
    [
        ({"norm/content": 0.013}, "content", ("0.013", "--standardize")),
        ({"norm/participation_ratio": 2.6}, "directions", ("2.6", "5.0", "--lr")),
        ({"growth": 96.0}, "growth", ("96", "--lr")),
        ({"local/over_mean": -0.2}, "mean", ("local", "-0.20", "--norm_pix_eps")),
        ({"local/over_position": 0.001}, "position", ("local", "0.001", "--lr")),
        ({"monitor/entropy": 0.99998, "monitor/kl": 2e-5}, "uniform", ("0.99998", "2.0e-05", "--standardize")),
        ({"monitor/entropy_of_mean": 0.001}, "one prototype", ("0.001", "--teacher_temp")),
        ({"align_up_mid": 0.4999}, "alignment", ("up_mid", "0.500", "--align")),
    ],
)
def test_each_range_that_is_left_is_named(changes, kind, words):
    found = health.warnings(HEALTHY | changes)
    assert list(found) == [kind] and all(word in found[kind] for word in words) and "\n" not in found[kind]


def test_without_normalised_targets_the_mean_is_no_range():
    assert health.warnings(HEALTHY | {"local/over_mean": -3.0}, norm_pix_loss=False) == {}
    # limits that were measured on ViTs are not applied to MiM's hybrid
    assert set(health.warnings(HEALTHY | {"norm/content": 0.0})) == {"content"}
    assert health.warnings(HEALTHY | {"norm/content": 0.0, "up/psnr": 9.0}) == {}


def test_values_are_checked_when_training_is_on_its_way():
    def plan(steps, epochs):
        return BatchPlan(1, 1, 1, steps, steps * epochs)

    assert health.first_check(plan(20, 8), 1) == 100
    assert health.first_check(plan(20, 30), 1) == 300
    assert health.first_check(plan(30, 1600), 10) == 1000
    assert health.first_check(plan(30, 1600), 40) == 1200


# ---------------------------------------------------------------- runs


def measured(out):
    return [{k: v for k, v in line.items() if k.startswith("health/")} for line in read_log(out)]


def test_measures_change_no_number_of_training(scans, tmp_path):
    pretrain(scans, tmp_path / "with")
    pretrain(scans, tmp_path / "without", "--health_every", "0")
    for a, b in zip(read_log(tmp_path / "with"), read_log(tmp_path / "without"), strict=True):
        assert all(a[name] == value for name, value in b.items() if name not in TIMES)
    assert measured(tmp_path / "without") == [{}, {}] and not (tmp_path / "without/health.png").exists()


def test_a_small_set_is_measured_on_training_volumes(scans, tmp_path, capsys):
    pretrain(scans, tmp_path / "run", "--epochs", "3", "--health_every", "2")
    assert "3 training volume(s)" in capsys.readouterr().out
    first, second, third = measured(tmp_path / "run")
    assert not first and second.keys() == third.keys() and all(map(math.isfinite, third.values()))
    expected = {"rec_local", "rec_global", "global_local", "monitor/kl", "local/psnr", "global/over_position", "growth"}
    assert {f"health/{name}" for name in expected | {"norm/content", "block01/participation_ratio"}} <= third.keys()
    assert (tmp_path / "run/health.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_volumes_are_recorded_and_not_trained_on(tmp_path, capsys):
    for i in range(21):
        write_nifti(tmp_path / f"many/{i}.nii.gz", ct((16, 16, 16), seed=i))
    pretrain(tmp_path / "many", tmp_path / "run", "--epochs", "1", "--holdout", "0.1", method="mae")
    args = torch.load(tmp_path / "run/checkpoint-last.pth", weights_only=True)["args"]
    assert len(args["held_out"]) == 2 and len(args["data"]) == 19 and not set(args["held_out"]) & set(args["data"])
    printed = capsys.readouterr().out
    assert "19 volumes, 2 held out for measures" in printed and "2 held-out volume(s)" in printed
    assert "warning" not in printed


MIM = """--method mim --model tiny --num_heads 2 --embed_dims 6 6 12 24 --depths 1 1 1 1 --decoder_embed_dim 24
 --decoder_depth 1 --decoder_num_heads 2 --local_size 32 --batch_size 2 --samples_per_epoch 2 --epochs 1 --workers 0
 --warmup_epochs 0 --num_mid 2 --num_down 2""".split()


@pytest.mark.parametrize("align", ["cosine", "infonce"])
def test_alignment_of_mim_is_logged_beside_chance(scans, tmp_path, monkeypatch, align):
    where = ["--datalist", str(scans), "--cache_dir", str(scans.parent / "cache"), "--out_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["main_pretrain", *MIM, "--align", align, *where])
    main_pretrain.main()
    (values,) = measured(tmp_path / "run")
    for levels in ("up_mid", "mid_down"):
        assert values[f"health/chance_{levels}"] == pytest.approx(values[f"health/align_{levels}"], rel=0.5)
    assert {f"health/{level}/psnr" for level in ("up", "mid", "down")} <= values.keys()


def test_logged_lines_are_json(scans, tmp_path):
    pretrain(scans, tmp_path / "run", "--epochs", "1", method="mae")
    for line in (tmp_path / "run/log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


LEARNS = """--embed_dim 48 --depth 3 --num_heads 3 --decoder_embed_dim 48 --decoder_num_heads 3 --local_size 24
 --local_scale 0.5 0.8 --hidden_dim 64 --bottleneck_dim 16 --out_dim 64 --teacher_temp_epochs 3 --momentum 0.99 1.0
 --batch_size 4 --samples_per_epoch 80 --epochs 8 --warmup_epochs 1 --save_every 100""".split()


@pytest.mark.slow
def test_runs_that_learn_and_do_not_are_told_apart(tmp_path, capsys):
    """GL-MAE on 24 volumes warns at ten times the learning rate and without --standardize only."""
    for i in range(24):
        write_nifti(tmp_path / f"scans/{i}.nii.gz", ct(seed=i))
    pretrain(tmp_path / "scans", tmp_path / "good", *LEARNS)
    assert "warning" not in capsys.readouterr().out
    pretrain(tmp_path / "scans", tmp_path / "bad", *LEARNS, "--lr", "1e-2", "--no-standardize")
    printed = capsys.readouterr().out
    assert printed.count("the teacher is uniform") == 1 and "fewer than the patches" in printed
