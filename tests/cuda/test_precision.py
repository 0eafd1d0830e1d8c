"""Half precision on the GPU: 20 updates of every method, and the two operations whose kernels are special."""

import pytest
import torch

from common.data.loader import to_device
from common.distributed import Run
from common.training.loop import UpdateRule, train_one_epoch
from common.training.optim import build_optimizer
from common.training.parallel import autocast_dtype
from common.training.state import TrainingState
from Finetune.depthwise3d import margin_rows, neighbour_cubes
from Finetune.models_convvit3d import MARGIN, ConvBlock, RelativeBlock
from tests.Pretrain.test_cuda_fake import METHODS, build, views, volumes

pytestmark = pytest.mark.cuda
UPDATES = 20


def avoid_wrong_gradient(device, monkeypatch):
    """On a CPU, compute convolutions without oneDNN.

    With torch 2.14.1 and AVX-512, the weight gradient of a 5^3 depthwise convolution in bf16, of channels-last maps
    whose first axis has 2 to 4 voxels, had a relative error of about 1. Equal runs differed, and at times it was
    infinite. With 1 or at least 5 voxels, in fp16, for contiguous maps and without oneDNN it was right. Stage 3 of the
    toy has 4.
    """
    if device.type == "cpu":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_updates_are_finite_and_lower_the_loss(device, monkeypatch, name, amp):
    if amp == "bf16":
        avoid_wrong_gradient(device, monkeypatch)
    method = build(name).to(device)
    state = TrainingState(method, build_optimizer(method, 0.05), Run(device), autocast_dtype(amp, device))
    reconstruction = {term: 1.0 for term in METHODS[name] if term.startswith("rec_")}
    others = {term: 0.1 for term in METHODS[name] if not term.startswith(("rec_", "monitor/"))}
    batch = to_device(volumes() if name.startswith("mim") else views(), device)
    curve = []
    method.register_forward_hook(lambda module, args, values: curve.append(dict(values)))
    rule = UpdateRule(lambda step: 3e-3, lambda step: reconstruction | others, clip_grad=3.0)
    train_one_epoch(state, [batch] * UPDATES, UPDATES, rule)
    # fp16 finds its scale by overflowing
    assert state.epoch_means.read()["skipped"] <= (0.3 if amp == "fp16" else 0.0)
    assert all(torch.isfinite(p).all() for p in method.parameters())
    # MiM has several passes in an update, each with some of the losses
    values = [[losses[term].item() for losses in curve if term in losses] for term in reconstruction]
    assert sum(column[-1] for column in values) < sum(column[0] for column in values)


def gradients(module, x, dtype, *args):
    """The output and the gradients of the input and of all parameters, as float32 on the CPU."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        y = module(x, *args)
    y.float().square().sum().backward()
    found = {"output": y, "input": x.grad} | {name: p.grad for name, p in module.named_parameters()}
    return {name: value.detach().float().cpu() for name, value in found.items()}


def assert_close(found, wanted, tolerance):
    scale = max(value.norm().item() for value in wanted.values())
    for name, value in wanted.items():
        assert (found[name] - value).norm() < tolerance * (value.norm() + 1e-2 * scale), name


TOLERANCES = {None: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_attention_trains_its_position_bias(device, dtype):
    """The mask of torch's attention has a gradient, which not every kernel computes."""
    block = RelativeBlock(32, 2, (3, 3, 3))
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x, kept = torch.randn(2, 10, 32), torch.stack([torch.randperm(27)[:10] for _ in range(2)])
    wanted = gradients(block, x, None, (3, 3, 3), kept)
    assert wanted["attn.relative_position_bias_table"].norm() > 0
    found = gradients(block.to(device), x.to(device), dtype, (3, 3, 3), kept.to(device))
    assert_close(found, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("shape", [(12, 10, 8), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_depthwise_convolutions(device, monkeypatch, dtype, shape):
    """Also on a map smaller than the kernel."""
    if dtype is torch.bfloat16:
        avoid_wrong_gradient(device, monkeypatch)
    block, x = ConvBlock(16), torch.randn(2, *shape, 16)
    wanted = gradients(block, x, None)
    assert_close(gradients(block.to(device), x.to(device), dtype), wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_depthwise_convolutions_of_visible_voxels(device, monkeypatch, dtype):
    if dtype is torch.bfloat16:
        avoid_wrong_gradient(device, monkeypatch)
    block, x = ConvBlock(16), torch.randn(2, 10, 4, 4, 4, 16)
    kept = torch.stack([torch.randperm(27)[:10] for _ in range(2)])
    rows = margin_rows(neighbour_cubes(kept, (3, 3, 3)), 4, MARGIN)
    wanted = gradients(block, x, None, rows)
    assert_close(gradients(block.to(device), x.to(device), dtype, rows.to(device)), wanted, TOLERANCES[dtype])
