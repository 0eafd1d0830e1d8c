"""MiM's backward pass in parts, its training on one process and on two, and its devices."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from Pretrain.models_mim import HEADS
from tests.Pretrain.toy_mim import batch_of, toy

WEIGHTS = dict(rec_up=1.0, rec_mid=1.0, rec_down=1.0, align_up_mid=0.1, align_mid_down=0.1)


def weighted(values):
    return sum(WEIGHTS[name] * value for name, value in values.items())


def gradients(method, batch, parts):
    method.zero_grad()
    totals = {}
    for part in parts:
        values = method(batch, 0, part)
        weighted(values).backward()
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value.detach()
    return totals, {name: p.grad.clone() for name, p in method.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("align", HEADS)
@pytest.mark.parametrize("down_parts", [1, 4])
def test_the_gradients_of_the_parts_add_up(align, down_parts):
    method, batch = toy(align=align, down_parts=down_parts), batch_of(64)
    whole, expected = gradients(method, batch, [None])
    values, grads = gradients(method, batch, range(method.num_parts))
    for name in whole:
        torch.testing.assert_close(values[name], whole[name], atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-5)
        # the published code never uses this head (its first alignment term leaves the up level out)
        dead = align == "published" and name.startswith("aggregate_pred_up_feature")
        assert (grad.abs().max() == 0) == dead, name
    assert not method._carry


def test_so_do_those_with_down_volumes_of_half_the_size():
    method, batch = toy(img_size=64, half_down=True, num_mid=2, num_down=1), batch_of(128, count=1)
    _, expected = gradients(method, batch, [None])
    _, grads = gradients(method, batch, range(method.num_parts))
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-5)
        assert grad.abs().max() > 0


def test_a_part_holds_one_level_or_a_share_of_down_volumes():
    method, batch = toy(down_parts=6), batch_of(64)
    sizes = []
    method.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for part in range(method.num_parts):
        method(batch, 0, part)
    assert sizes == [2, 6, 2, 2, 2, 2, 2, 2]


def train(model, batches, accum=1, optimizer=None):
    """Updates as the training loop makes them; returns the whole losses of each micro-batch."""
    method = getattr(model, "module", model)
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=3e-3)
    reported = []
    for index, batch in enumerate(batches):
        reported.append({})
        for part in range(method.num_parts):
            last = part == method.num_parts - 1 and (index + 1) % accum == 0
            with contextlib.nullcontext() if last or model is method else model.no_sync():
                values = model(batch, 0, part)
                (weighted(values) / accum).backward()
            for name, value in values.items():
                reported[-1][name] = reported[-1].get(name, 0.0) + value.detach()
        if (index + 1) % accum == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return reported


def descent(method):
    """Plain gradient descent: AdamW would blow up the rounding of gradients that are 0 by symmetry (key biases)."""
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def ddp_worker(rank, folder, align):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    method = toy(align=align)
    share = [{k: v[rank : rank + 1] for k, v in batch_of(64, seed=i).items()} for i in range(3)]
    model = DistributedDataParallel(method, find_unused_parameters=False)
    losses = train(model, share, optimizer=descent(method))
    torch.save({"state": method.state_dict(), "losses": losses}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("align", ["infonce", "published"])
def test_two_processes_equal_one(tmp_path, align):
    """Three updates: a parameter left without gradient would stop the second. The one process takes its batch in two
    micro-batches, as the first term of `published` mixes up the samples of a forward pass."""
    torch.multiprocessing.start_processes(ddp_worker, args=(tmp_path, align), nprocs=2, start_method="spawn")
    method = toy(align=align)
    micro = [{k: v[n : n + 1] for k, v in batch_of(64, seed=i).items()} for i in range(3) for n in range(2)]
    one = train(method, micro, accum=2, optimizer=descent(method))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in method.state_dict().items():
            torch.testing.assert_close(found["state"][name], value, atol=1e-5, rtol=1e-4)
        for ours, theirs in zip(one[rank::2], found["losses"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (method.encoder.norm.weight - 1).abs().max() > 1e-3  # it has gone somewhere


@pytest.mark.parametrize("align", HEADS)
def test_every_alignment_trains(align):
    method, batch = toy(align=align, num_mid=2, num_down=1), batch_of(64, count=1)
    with torch.no_grad():
        before = weighted(method(batch))
    train(method, [batch] * 8)
    with torch.no_grad():
        assert weighted(method(batch)) < before


def test_autocast_to_bfloat16_stays_close():
    method, batch = toy(align="infonce"), batch_of(64)
    with torch.no_grad():
        full = method(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = method(batch)
    for name in full:
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], full[name], atol=0.03, rtol=0.03)


@pytest.mark.parametrize("align", HEADS)
def test_losses_are_computed_on_the_device(align):
    """On CUDA fake tensors: a tensor made on the wrong device fails here, on a machine without a GPU."""
    method = toy(align=align)
    tensors = [*method.named_parameters(), *method.named_buffers()]
    with FakeTensorMode():
        on_cuda = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in tensors}
        batch = {
            "image": torch.rand(2, 1, 64, 64, 64, device="cuda"),
            "key": torch.zeros(2, dtype=torch.long, device="cuda"),
        }
        for part in range(method.num_parts):
            values = functional_call(method, on_cuda, (batch, 0, part))
            assert all(v.device.type == "cuda" and v.dtype == torch.float32 and v.ndim == 0 for v in values.values())
