"""FSDP2 changes who holds what, not what comes out: two processes on a CPU, against the same two under DDP."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from common import checkpoint
from common.distributed import Run
from common.training.fsdp import full_copy, meta_copy, shard
from common.training.parallel import transformer_blocks
from Finetune.models_3dvit import VisionTransformer3D
from tests.common.training.test_nonfinite import Poisoned
from tests.common.training.test_resume import Asked
from tests.common.training.toy import lines, run_toy

SHARDED = {"fsdp": True}


def toy_runs(rank, folder):
    run = Run(torch.device("cpu"), rank, 2)
    run_toy(folder / "plain", run=run)
    method, _ = run_toy(folder / "sharded", run=run, **SHARDED)
    held = sum(p.to_local().numel() for p in method.parameters())
    torch.save({"held": held, "all": sum(p.numel() for p in method.parameters())}, folder / f"held-{rank}.pt")
    for first, then in (("plain", "sharded"), ("sharded", "plain")):
        settings = {"plain": {}, "sharded": SHARDED}
        with pytest.raises(SystemExit):
            run_toy(folder / f"{first} first", Asked(4), run=run, **settings[first])
        run_toy(folder / f"{first} first", run=run, **settings[then])
    for name, settings in (("plain", {}), ("sharded", SHARDED)):
        back = {"on_nan": "rollback", "nan_row": 2, "log_every": 1}
        run_toy(folder / f"{name} back", Poisoned(*range(16, 24)), run=run, **back, **settings)
    too_many = {"amp": "fp16", "clip_grad": 0.1, "micro_batch_size": 1, "epochs": 10}
    run_toy(folder / "plain fp16", run=run, **too_many)
    run_toy(folder / "sharded fp16", run=run, **too_many, **SHARDED)


def vit():
    torch.manual_seed(0)
    return VisionTransformer3D(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2)


def copies(rank, folder):
    """Rank 1 alone uses its copy; then both go on with the sharded one."""
    plain, method = vit(), vit()
    x = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(rank))
    plan = meta_copy(method)
    assert all(p.is_meta for p in plan.parameters())
    shard(method, transformer_blocks(method), Run(torch.device("cpu"), rank, 2))
    for _ in range(2):
        twin = full_copy(method, plan)
        assert list(twin.state_dict()) == list(plain.state_dict())
        if rank == 1:
            torch.testing.assert_close(twin(x), plain(x))
        method(x).square().sum().backward()
        for model in (plain, method):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.1)
    method.load_state_dict(vit().state_dict())  # whole tensors into shares
    for ours, theirs in zip(full_copy(method, plan).parameters(), vit().parameters()):
        assert torch.equal(ours, theirs)


def worker(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    copies(rank, folder)
    toy_runs(rank, folder)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    torch.multiprocessing.start_processes(worker, args=(folder,), nprocs=2, start_method="spawn")
    return folder


def assert_same(a, b, where="checkpoint"):
    """The same keys, types, shapes and numbers, but for the settings in `args` that differ."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{number}]")
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=lambda text: f"{where}: {text}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-5), where
    else:
        assert a == b, where


@pytest.mark.slow
@pytest.mark.parametrize(
    "plain, other",
    [
        ("plain", "sharded"),
        ("plain", "plain first"),
        ("plain", "sharded first"),
        ("plain back", "sharded back"),
        ("plain fp16", "sharded fp16"),
    ],
)
def test_a_sharded_run_writes_the_checkpoint_of_a_plain_one(folder, plain, other):
    """From the start, taken up by the other in the middle of an epoch, after a rollback, and with a scaler."""
    assert_same(*(checkpoint.load(folder / name / checkpoint.LAST) for name in (plain, other)))
    for a, b in zip(lines(folder / plain), lines(folder / other), strict=True):
        for name in ("fit", "grad_norm", "skipped"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, nan_ok=True), name


@pytest.mark.slow
def test_each_process_holds_its_share(folder):
    first, second = (torch.load(folder / f"held-{rank}.pt", weights_only=True) for rank in range(2))
    assert first["held"] + second["held"] == first["all"] == second["all"]
    assert 0 < second["held"] <= first["held"] < first["all"]


def test_one_process_is_not_sharded(tmp_path, capsys):
    method, content = run_toy(tmp_path / "one", **SHARDED, epochs=1)
    plain, same = run_toy(tmp_path / "plain", epochs=1)
    assert all(type(p) is nn.Parameter for p in method.parameters())
    assert_same(content["model"], same["model"])
    assert "--fsdp: has no effect on one process" in capsys.readouterr().out
