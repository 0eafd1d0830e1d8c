"""Batches on the GPU: views are those that the loader would make, complete when they are used, and nothing waits."""

import pytest
import torch
from torch.utils.data import default_collate

from common.data.loader import Loading, build_loader, device_batches, micro_batches, to_device
from common.data.sampler import StreamSampler
from common.distributed import Run
from common.training.loop import UpdateRule, train_one_epoch
from common.training.optim import build_optimizer
from common.training.parallel import autocast_dtype
from common.training.state import TrainingState
from Pretrain.blocks import ViewMaker, collate_blocks
from Pretrain.data import BlockDataset, ViewDataset
from Pretrain.loading import load_resident
from tests.Pretrain.test_blocks import SPECS, assert_close, make_volumes
from tests.Pretrain.test_cuda_fake import METHODS, build, views, volumes

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return make_volumes(tmp_path_factory.mktemp("volumes"))["int16"]


@pytest.mark.parametrize("resident", [False, True], ids=["blocks", "resident"])
@pytest.mark.parametrize("mode", SPECS)
def test_views_made_on_the_device(device, cached, mode, resident):
    """From loading processes through pinned memory and the side stream; all batches are kept before they are read."""
    samples, sampler = ViewDataset(cached, SPECS[mode], seed=5), StreamSampler(2, 2, 1)
    sampler.stop = 6
    maker = ViewMaker(samples.specs, load_resident(samples.volumes, device) if resident else None)
    how = Loading(BlockDataset(samples, resident), collate_blocks, maker, by_sample=True)
    loader = build_loader(how, sampler, 2, device)
    made = list(device_batches(micro_batches(loader, how, 2), how.prepare, device))
    for batch, items in zip(made, sampler, strict=True):
        assert all(value.device.type == device.type for value in batch.values())
        assert_close({k: v.cpu() for k, v in batch.items()}, default_collate([samples[item] for item in items]))


def test_batches_are_complete_when_they_are_used(device):
    def prepare(batch, device):
        x = batch.to(device, non_blocking=True)
        for _ in range(200):
            x = x * 1.0
        return {"x": x + 1}

    size = 1 << 22 if device.type == "cuda" else 1 << 10
    hosts = [torch.full((size,), float(i)) for i in range(20)]
    if device.type == "cuda":
        hosts = [x.pin_memory() for x in hosts]
    sums = [batch["x"].mean() for batch in device_batches(hosts, prepare, device)]
    assert torch.stack(sums).tolist() == [i + 1.0 for i in range(20)]


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("name", METHODS)
def test_an_update_never_waits_for_the_device(device, name, amp):
    if device.type != "cuda":
        pytest.skip("a CPU does not work ahead")
    method = build(name).to(device)
    state = TrainingState(method, build_optimizer(method, 0.05), Run(device), autocast_dtype(amp, device))
    weights = {term: 1.0 for term in METHODS[name] if not term.startswith("monitor/")}
    rule = UpdateRule(lambda step: 1e-3, lambda step: weights, clip_grad=3.0)
    batch = to_device(volumes() if name.startswith("mim") else views(), device)
    # the first updates allocate and choose algorithms
    train_one_epoch(state, [batch] * 2, 2, rule)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_one_epoch(state, [batch] * 3, 5, rule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
