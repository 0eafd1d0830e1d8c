"""The pretraining program on the GPU: its options do not change the losses, and a stopped run goes on as it was."""

import math

import pytest
import torch

from Pretrain import main_pretrain
from tests.helpers import read_log, run_module, write_scans
from tests.Pretrain.test_main_pretrain import flags, pretrain

pytestmark = pytest.mark.cuda
MIM = """--method mim --batch_size 2 --local_size 32 --model tiny --num_heads 2 --embed_dims 6 6 12 24
 --depths 1 1 1 1 --decoder_embed_dim 24 --decoder_depth 1 --decoder_num_heads 2"""


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans"))


def curves(folder):
    """The losses, gradient norms and share of skipped updates of each epoch."""
    names = ("rec_", "global_", "grad_norm", "skipped")
    return [{k: v for k, v in line.items() if k.startswith(names)} for line in read_log(folder)]


def assert_same_curves(folder, other, tolerance):
    one, two = curves(folder), curves(other)
    assert len(one) == len(two) > 1 and all(map(math.isfinite, one[-1].values()))
    for a, b in zip(one, two):
        # an epoch in which fp16 skipped every update, to find its scale, has no means
        assert b == pytest.approx(a, rel=tolerance, abs=tolerance, nan_ok=True)


# relative to those of a run without an option; in bf16 by its precision
TOLERANCES = {"off": 1e-3, "bf16": 3e-2}


@pytest.mark.parametrize(
    "option, amp",
    [
        ("--grad_checkpointing", "off"),
        ("--grad_checkpointing", "bf16"),
        ("--channels_last", "off"),
        ("--cudnn_benchmark", "off"),
        pytest.param("--compile", "bf16", marks=pytest.mark.slow),
    ],
)
def test_options_do_not_change_the_losses(device, scans, tmp_path, option, amp):
    common = ["--device", device.type, "--amp", amp]
    pretrain(scans, tmp_path / "plain", *common)
    pretrain(scans, tmp_path / "other", *common, option)
    assert_same_curves(tmp_path / "plain", tmp_path / "other", TOLERANCES[amp])


WHERE = {
    "blocks": ["--views_on", "device", "--resident", "off", "--workers", "2"],
    "resident": ["--views_on", "device", "--resident", "on"],
}


@pytest.mark.parametrize("where", WHERE)
def test_where_views_are_made_changes_no_loss(device, scans, tmp_path, where):
    common = ["--device", device.type, "--amp", "off"]
    pretrain(scans, tmp_path / "loader", *common, "--views_on", "loader", "--workers", "2")
    pretrain(scans, tmp_path / "device", *common, *WHERE[where])
    assert_same_curves(tmp_path / "loader", tmp_path / "device", 1e-2)


@pytest.mark.parametrize(
    "method, options",
    [
        ("mae", ["--decoder", "cross", "--decode_fraction", "0.5"]),
        ("glmae", ["--decoder", "cross", "--decode_fraction", "0.5"]),
        ("glmae", ["--ignore_padding", "--crop_mode", "fixed"]),
    ],
    ids=["mae-cross", "glmae-cross", "glmae-padding"],
)
def test_other_recipes_train(device, scans, tmp_path, method, options):
    pretrain(scans, tmp_path / "run", "--device", device.type, "--micro_batch_size", "auto", *options, method=method)
    lines = curves(tmp_path / "run")
    assert len(lines) == 2 and all(map(math.isfinite, lines[-1].values()))


@pytest.mark.parametrize("options", [[], ["--half_down", "--local_size", "64"]], ids=["full", "half"])
def test_mim_trains(device, scans, tmp_path, options):
    sizes = "--num_mid 2 --num_down 1 --samples_per_epoch 4 --workers 2 --warmup_epochs 0 --epochs 2"
    data = ["--datalist", scans, "--cache_dir", tmp_path / "cache", "--out_dir", tmp_path / "run"]
    more = ["--device", device.type, "--micro_batch_size", "auto", *options]
    run_module("Pretrain.main_pretrain", *MIM.split(), *sizes.split(), *data, *more)
    lines = curves(tmp_path / "run")
    assert len(lines) == 2 and all(map(math.isfinite, lines[-1].values()))


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_several_processes_have_the_losses_of_one(device, scans, tmp_path, options):
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    data = ["--datalist", scans, "--cache_dir", tmp_path / "cache", "--device", device.type, "--amp", "off"]
    run_module("Pretrain.main_pretrain", *flags("glmae"), *data, "--out_dir", tmp_path / "one")
    run_module("Pretrain.main_pretrain", *flags("glmae"), *data, *options, "--out_dir", tmp_path / "two", nproc=2)
    assert_same_curves(tmp_path / "one", tmp_path / "two", 1e-3)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_resumed_run_equals_an_undisturbed_one(device, scans, tmp_path, monkeypatch, amp):
    """To rounding errors: some kernels of the GPU add in an order that varies."""
    common = ["--device", device.type, "--amp", amp, "--epochs", "3"]
    pretrain(scans, tmp_path / "undisturbed", *common)

    class Stop(Exception):
        pass

    def stop(self, epoch, log, method):
        if epoch == 1:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(main_pretrain.Reconstructions, "__call__", stop)
        pretrain(scans, tmp_path / "stopped", *common)
    pretrain(scans, tmp_path / "stopped", *common)
    tolerance = {"off": 1e-4, "bf16": 2e-2, "fp16": 5e-3}[amp] if device.type == "cuda" else 1e-7
    assert_same_curves(tmp_path / "undisturbed", tmp_path / "stopped", tolerance)
