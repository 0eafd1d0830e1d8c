"""Ensembles: means of logits, common cases, and which checkpoint a run reports."""

import json

import pytest
import torch

from common.errors import InputError
from Finetune.architectures import load_finetuned
from Finetune.inference.ensemble import mean_logits
from Finetune.presets import load_preset
from tests.Finetune.predicting import AFFINES, run, save_checkpoint, write_ct


@pytest.fixture(scope="module")
def preset():
    return load_preset("sample_abdomen")


def test_flips_and_ensembles_are_means_of_logits(tmp_path, preset):
    file = save_checkpoint(tmp_path / "c.pth", preset)
    other = save_checkpoint(tmp_path / "other.pth", preset, seed=1)
    a, b = load_finetuned(file)[0], load_finetuned(other)[0]
    x, cpu = torch.rand(2, 1, 32, 32, 32), torch.device("cpu")
    with torch.no_grad():
        expected = (a(x) + b(x)) / 2
        mirrors = [], [2], [3], [4], [2, 3], [2, 4], [3, 4], [2, 3, 4]
        mirrored = sum(a(x.flip(axes)).flip(axes) for axes in mirrors) / 8
    torch.testing.assert_close(mean_logits([a, b], cpu, None)(x), expected)
    torch.testing.assert_close(mean_logits([a], cpu, None, (0, 1, 2))(x), mirrored)
    with torch.no_grad():
        left_right = (a(x) + a(x.flip(2)).flip(2)) / 2
    torch.testing.assert_close(mean_logits([a], cpu, None, (0,))(x), left_right)
    with pytest.raises(InputError, match="differ from those of"):
        small = save_checkpoint(tmp_path / "small.pth", preset, roi=(48, 48, 48))
        run([file, small], tmp_path, tmp_path / "out")


def test_ensemble_validates_on_cases_common_to_all_members(tmp_path, preset):
    for name in ("a", "b", "c"):
        write_ct(tmp_path / f"in/{name}.nii.gz", preset, AFFINES["flipped"])
    one = save_checkpoint(tmp_path / "one.pth", preset, validation=("a", "b"))
    two = save_checkpoint(tmp_path / "two.pth", preset, seed=1, validation=("b", "c"))
    other = save_checkpoint(tmp_path / "other.pth", preset, seed=2, validation=("c",))
    run([one, two], tmp_path / "in", tmp_path / "out", "--cases", "validation", "--no-overlays")
    assert [p.name for p in (tmp_path / "out").glob("*.nii.gz")] == ["b.nii.gz"]
    with pytest.raises(InputError, match="--cases validation"):
        run([one, other], tmp_path / "in", tmp_path / "out", "--cases", "validation")


def test_folder_of_a_run_gives_the_reported_checkpoint(tmp_path, preset):
    write_ct(tmp_path / "in/scan.nii.gz", preset, AFFINES["flipped"])

    def used(*flags):
        run(tmp_path / "run", tmp_path / "in", tmp_path / "out", "--no-overlays", *flags)
        protocol = json.loads((tmp_path / "out/predictions.json").read_text())
        return protocol["checkpoints"][0]["checkpoint"].split("/")[-1], protocol["overlap"], protocol["blending"]

    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match=r"run: found no checkpoint-last.pth"):
        used()
    last = tmp_path / "run/checkpoint-last.pth"
    save_checkpoint(last, preset)
    # left by an earlier run with --select best
    save_checkpoint(tmp_path / "run/checkpoint-best.pth", preset, seed=1)
    assert used() == ("checkpoint-last.pth", 0.5, "gaussian")
    save_checkpoint(last, preset, config={"select": "best", "overlap": 0.25, "blending": "constant"})
    assert used() == ("checkpoint-best.pth", 0.5, "gaussian")
    (tmp_path / "run/checkpoint-best.pth").unlink()
    with pytest.raises(InputError, match="run: found no checkpoint-best.pth"):
        used()
    save_checkpoint(last, preset, config={"overlap": 0.25, "blending": "constant"})
    # the sliding window of the run's validation
    assert used() == ("checkpoint-last.pth", 0.25, "constant")
    assert used("--overlap", 0, "--blending", "gaussian") == ("checkpoint-last.pth", 0.0, "gaussian")
