"""The pretraining program as a user starts it: what it writes, what it refuses, and that processes change nothing."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.environment import code_version
from common.errors import InputError
from common.runlog import TIMES
from common.training import trainer
from common.training.speed import Speed
from Finetune.models_3dvit import VisionTransformer3D
from Pretrain import main_pretrain
from tests.common.report.made import page_of
from tests.helpers import ROOT, read_log, run_module, write_nifti

SMALL = """
  --model tiny --embed_dim 24 --depth 2 --num_heads 2 --patch_size 8 --decoder_embed_dim 24 --decoder_depth 1
  --decoder_num_heads 2
  --local_size 16 --local_views 2
  --batch_size 2 --samples_per_epoch 4 --epochs 2 --warmup_epochs 0 --workers 0 --save_every 1 --log_every 1 --lr 1e-3
""".split()
GLMAE = "--global_size 32 --global_views 2 --hidden_dim 32 --bottleneck_dim 8 --out_dim 16".split()


def flags(method):
    return [*SMALL, "--method", method, *(GLMAE if method == "glmae" else [])]


def pretrain(scans, out, *more, method="glmae"):
    argv = [
        *flags(method),
        "--datalist",
        str(scans),
        "--cache_dir",
        str(scans.parent / "cache"),
        "--out_dir",
        str(out),
        *more,
    ]
    sys_argv, sys.argv = sys.argv, ["main_pretrain", *argv]
    try:
        main_pretrain.main()
    finally:
        sys.argv = sys_argv


def test_a_run_leaves_checkpoints_log_and_pictures(scans, tmp_path, capsys):
    pretrain(scans, tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-last.pth", "log.jsonl", "reconstruction-1.png"} <= names
    content = torch.load(tmp_path / "run/checkpoint-1.pth", weights_only=True)
    assert set(content) == {"student", "teacher", "optimizer", "epoch", "args", "dino_loss"}
    assert content["epoch"] == 1 and content["args"]["grid_size"] == [2, 2, 2] and len(content["args"]["data"]) == 3
    assert content["args"]["code_version"] == code_version()
    said = capsys.readouterr().out
    assert "8 views per update" in said and "4: 2 epochs x 2" in said and "learning rate 0.001" in said
    encoder = VisionTransformer3D(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    missing, unexpected = encoder.load_pretrained_checkpoint(tmp_path / "run/checkpoint-last.pth")
    assert missing == [] and {k.split(".")[0] for k in unexpected} >= {"decoder_embed", "head"}
    terms = {"rec_global", "rec_local", "global_global", "global_local", "monitor/entropy", "grad_norm"}
    assert terms <= set(read_log(tmp_path / "run")[0])
    page = page_of(tmp_path / "run")
    assert all(
        words in page for words in ("GL-MAE pretraining", "2 of 2", "over_position", "data:image/png", "rec_local")
    )


@pytest.mark.parametrize("method", ["mae", "glmae"])
def test_the_loss_falls(scans, tmp_path, method):
    more = ["--epochs", "12", "--lr", "3e-3", "--save_every", "100"]
    if method == "glmae":
        more += ["--weight_global_global", "0", "--weight_global_local", "0"]
    pretrain(scans, tmp_path / "run", *more, method=method)
    curve = [entry["rec_local"] for entry in read_log(tmp_path / "run")]
    assert sum(curve[-3:]) / 3 < sum(curve[:3]) / 3 - 0.005


@pytest.mark.parametrize("method", ["mae", "glmae"])
def test_a_cheap_recipe_with_automatic_micro_batches(scans, tmp_path, capsys, method):
    cheap = "--decoder cross --decode_fraction 0.5 --micro_batch_size auto --epochs 1".split()
    pretrain(scans, tmp_path / "run", *cheap, method=method)
    assert "micro-batches of 2 volume(s) per process, 1 accumulated" in capsys.readouterr().out
    content = torch.load(tmp_path / "run/checkpoint-last.pth", weights_only=True)
    assert content["args"]["micro_batch"] == 2 and content["args"]["micro_batch_size"] == "auto"
    names = content["model"] if method == "mae" else content["student"]
    assert any(name.endswith("decoder_blocks.0.attn.kv.weight") for name in names)
    assert (tmp_path / "run/reconstruction-0.png").exists() and read_log(tmp_path / "run")[0]["rec_local"] > 0


def assert_divisions_agree(settings, folder, epochs, terms):
    """One process, two, two with FSDP2, and accumulated micro-batches log the same numbers in every epoch, to 1e-4.

    `terms` are the starts of their names.
    """
    run_module("Pretrain.main_pretrain", *settings, "--out_dir", folder / "one")
    run_module("Pretrain.main_pretrain", *settings, "--out_dir", folder / "two", nproc=2)
    run_module("Pretrain.main_pretrain", *settings, "--out_dir", folder / "sharded", "--fsdp", nproc=2)
    run_module("Pretrain.main_pretrain", *settings, "--out_dir", folder / "parts", "--micro_batch_size", 1)
    one = read_log(folder / "one")
    assert len(one) == epochs
    for other in ("two", "sharded", "parts"):
        for a, b in zip(one, read_log(folder / other), strict=True):
            for term in (name for name in a if name.startswith(terms)):
                assert abs(a[term] - b[term]) < 1e-4 * max(1, abs(a[term])), (other, a["epoch"], term)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mae", "glmae"])
def test_two_processes_give_the_loss_curve_of_one(scans, tmp_path, method):
    """Same global batch, no dropout: equal to 1e-4 through torchrun on two processes, DDP or FSDP2, and accumulated."""
    data = ["--datalist", scans, "--cache_dir", tmp_path / "cache"]
    settings = [*flags(method), *data, "--epochs", 6, "--samples_per_epoch", 2]
    assert_divisions_agree(settings, tmp_path, epochs=6, terms=("rec_", "global_", "grad_norm"))
    # Weights are not compared: Adam turns the rounding noise of gradients that are zero by symmetry (key biases) into
    # whole steps.
    if method == "glmae":
        centers = [
            torch.load(tmp_path / n / "checkpoint-last.pth", weights_only=True)["dino_loss"]["center"]
            for n in ("one", "two", "sharded")
        ]
        for other in centers[1:]:
            torch.testing.assert_close(other, centers[0], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one(scans, tmp_path):
    """Also where a loss's gradient is taken apart, once an epoch, and with weights that are shared out."""
    settings = [*flags("glmae"), "--datalist", scans, "--cache_dir", tmp_path / "cache"]
    run_module("Pretrain.main_pretrain", *settings, "--out_dir", tmp_path / "plain")
    run_module("Pretrain.main_pretrain", *settings, "--out_dir", tmp_path / "compiled", "--compile")
    run_module("Pretrain.main_pretrain", *settings, "--out_dir", tmp_path / "both", "--compile", "--fsdp", nproc=2)
    for other in ("compiled", "both"):
        for a, b in zip(read_log(tmp_path / "plain"), read_log(tmp_path / other), strict=True):
            for term in (k for k in a if k.startswith(("rec_", "global_", "grad_norm"))):
                assert abs(a[term] - b[term]) < 1e-3 * max(1, abs(a[term])), (other, a["epoch"], term)


WHERE = {
    "loader": ["--views_on", "loader"],
    "device": ["--views_on", "device"],
    "resident": ["--resident", "on"],
}


@pytest.mark.parametrize(
    "where", ["loader", *(pytest.param(name, marks=pytest.mark.slow) for name in ("device", "resident"))]
)
def test_a_resumed_run_equals_an_undisturbed_one(scans, tmp_path, monkeypatch, where):
    """Teacher, centre, schedules and data go on where they stopped: bit for bit, wherever views are made."""
    more = ["--epochs", "3", *WHERE[where]]
    pretrain(scans, tmp_path / "whole", *more)

    class Stop(Exception):
        pass

    def stop(self, epoch, log, method):
        if epoch == 1:
            raise Stop
        return {}

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(main_pretrain.Reconstructions, "__call__", stop)
        pretrain(scans, tmp_path / "cut", *more)
    pretrain(scans, tmp_path / "cut", *more)
    a, b = (torch.load(tmp_path / n / "checkpoint-last.pth", weights_only=True) for n in ("whole", "cut"))
    assert all(torch.equal(v, b["student"][k]) for k, v in a["student"].items())
    assert all(torch.equal(v, b["teacher"][k]) for k, v in a["teacher"].items())
    assert torch.equal(a["dino_loss"]["center"], b["dino_loss"]["center"])


def test_where_views_are_made_changes_no_number(scans, tmp_path, capsys):
    """Losses, and the measures on the fixed batch, with padding that is ignored."""
    more = ["--crop_mode", "fixed", "--ignore_padding", "--placement", "random", "--epochs", "1", "--workers", "1"]
    logs, printed = {}, {}
    for where, flags in WHERE.items():
        pretrain(scans, tmp_path / where, *more, *flags)
        (logs[where],), printed[where] = read_log(tmp_path / where), capsys.readouterr().out
        assert (tmp_path / where / "reconstruction-0.png").exists()
    assert "views: made in the loading processes" in printed["loader"]
    assert "views: made on cpu, of blocks from" in printed["device"]
    assert "views: made on cpu, where all 3 volumes are kept in 0.0 of the" in printed["resident"]
    for where in ("device", "resident"):
        for name, value in logs["loader"].items():
            if name not in TIMES:
                # rounding errors can be larger than what is nearly zero
                assert logs[where][name] == pytest.approx(value, rel=1e-3, abs=1e-3), (where, name)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--local_size", "20"], r"volume \(20, 20, 20\) is not divisible by the patch size \(8, 8, 8\)"),
        (["--global_size", "36"], r"\(36, 36, 36\)"),
        (["--num_heads", "5"], "--method glmae: .*num_heads"),
        (["--mask_ratio_local", "1.0"], r"--mask_ratio_local 1.0: must be less than 1"),
        (["--local_size", "8"], "--local_size 8 8 8, --mask_ratio_local 0.6: no patch of 1 is removed"),
        (["--mask_ratio_global", "0"], "--global_size 32 32 32, --mask_ratio_global 0: no patch of 64 is removed"),
        (["--global_views", "0"], "--global_views 0"),
        (["--batch_size", "3", "--micro_batch_size", "2"], "multiple of 2"),
        (["--micro_batch_size", "most"], "--micro_batch_size: found .most., expected one of auto"),
        (["--decode_fraction", "0.5"], "decode_fraction 0.5: must be 1 unless the decoder is `cross`"),
        (["--datalist", "nowhere"], "nowhere"),
        (["--datasets", "2k", "--data_root", "."], "did you mean"),
        (["--methot", "mae"], "--method"),
        (["--num_mid", "2"], "--num_mid: is a setting of --method mim"),
    ],
)
def test_bad_settings_are_named(scans, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        pretrain(scans, tmp_path / "run", *more)
    assert not list(tmp_path.rglob("checkpoint*"))


def test_an_empty_folder_is_named(scans, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        pretrain(scans, tmp_path / "run", "--datalist", str(tmp_path / "empty"))
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_named(scans, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        pretrain(scans, tmp_path / "file" / "run")


def test_the_loader_alone_is_measured(scans, tmp_path, capsys):
    pretrain(scans, tmp_path / "run", "--loader_only", "--samples_per_epoch", "8")
    assert "crops/s" in capsys.readouterr().out and not list(tmp_path.rglob("checkpoint*"))


def test_volumes_that_cannot_be_used_stop_a_run_unless_asked(scans, tmp_path, capsys):
    write_nifti(tmp_path / "more/flat.nii.gz", np.zeros((20, 20), np.int16))
    lists = ["--datalist", str(scans), str(tmp_path / "more"), "--cache_dir", str(tmp_path / "cache"), "--epochs", "1"]
    with pytest.raises(InputError, match="flat.nii.gz.*2D"):
        pretrain(scans, tmp_path / "run", *lists)
    pretrain(scans, tmp_path / "run", *lists, "--allow_failures")
    assert "data     3 volumes" in capsys.readouterr().out


def shown_by_the_recipe(*flags):
    """Return what `--help` of the recipe of GL-MAE shows."""
    done = subprocess.run(
        ["bash", "scripts/pretrain_glmae.sh", *flags, "--help"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_recipe_shows_every_setting_with_its_value():
    shown = shown_by_the_recipe()
    for line in (
        "--global_size",
        "--momentum",
        "this call 160 160 160",
        "this call 0.996 1.0",
        "this call 1600",
        "this call 1k",
    ):
        assert line in shown


@pytest.mark.slow
def test_the_settings_of_an_earlier_run_win_over_the_recipe(tmp_path):
    (tmp_path / "settings.yaml").write_text("epochs: 5\ndatalist: [/data/my_ct]\nout_dir: runs/mine")
    shown = shown_by_the_recipe("--config", str(tmp_path / "settings.yaml"), "--out_dir", "runs/other")
    for line in ("this call 5;", "this call /data/my_ct", "this call runs/other", "this call 160 160 160"):
        assert line in shown
    assert "this call 1k" not in shown


def test_the_time_left_is_printed_once_when_it_is_known(scans, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Speed, "_seconds", lambda self, step: 100.0)
    pretrain(scans, tmp_path / "run", "--epochs", "3")
    output = capsys.readouterr()
    assert output.out.count("100 s per update: the other 4 updates in about 7 min") == 1
    assert output.out.count("the other") == 1 and "volumes/s=0.02" in output.err


@pytest.mark.parametrize("method", ["glmae", "mae"])
def test_a_dry_run_writes_nothing(scans, tmp_path, capsys, method):
    pretrain(scans, tmp_path / "new", "--dry_run", method=method)
    printed = capsys.readouterr().out
    assert "dry run: rec_" in printed and "first pass of 2 volume(s)" in printed and "peak memory" in printed
    assert not (tmp_path / "new").exists()


def test_a_dry_run_estimates_the_time_of_the_run(scans, tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 5000.0, 5000.0, 5100.0])
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    pretrain(scans, tmp_path / "run", "--dry_run", "--micro_batch_size", "1", method="mae")
    printed = capsys.readouterr().out
    # 4 updates of 2 passes of 100 s
    assert "second pass: 100.00 s; about 13 min for 4 updates at this pace, without validation" in printed


def test_a_dry_run_of_a_run_of_one_pass_makes_one(scans, tmp_path, capsys):
    pretrain(scans, tmp_path / "run", "--dry_run", "--samples_per_epoch", "2", "--epochs", "1", method="mae")
    printed = capsys.readouterr().out
    assert "first pass of 2 volume(s)" in printed and "second pass" not in printed


def test_a_dry_run_leaves_a_run_as_it_is(scans, tmp_path):
    pretrain(scans, tmp_path / "run", "--epochs", "1")
    before = {path: path.stat().st_mtime_ns for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]}
    pretrain(scans, tmp_path / "run", "--dry_run", "--epochs", "3")
    assert {path: path.stat().st_mtime_ns for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]} == before


def test_a_dry_run_reports_a_folder_that_cannot_be_made(scans, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/run: cannot be written"):
        pretrain(scans, tmp_path / "file/run", "--dry_run")


def test_a_dry_run_reports_a_loss_that_is_not_finite(scans, tmp_path):
    with pytest.raises(InputError, match="loss that is not finite .*rec_local nan"):
        pretrain(scans, tmp_path / "run", "--dry_run", "--norm_pix_eps", "1e-300", "--local_scale", "0.01", "0.01")
