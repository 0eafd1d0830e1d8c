"""MiM from settings: the recipe's numbers, the weights over time, and what contradicts itself."""

import re
import shlex

import pytest
import torch

from common.cli import parse
from common.errors import InputError
from common.training.settings import plan_updates
from Finetune.models_convvit3d import ConvViT3D
from Pretrain import main_pretrain
from Pretrain.build import build_task, settings_class
from Pretrain.data import ViewDataset
from tests.helpers import ROOT, read_log, run_module

TOY = """--method mim --datalist x --out_dir x --batch_size 2 --epochs 10 --local_size 32 --model tiny --num_heads 2
 --embed_dims 6 6 12 24 --depths 1 1 1 1 --decoder_embed_dim 24 --decoder_depth 1 --decoder_num_heads 2"""


def build(arguments, volumes=4):
    settings = parse(settings_class(), arguments.split())
    plan = plan_updates(settings, volumes, 1)
    return build_task(settings, plan), plan, settings


class Noise:
    """A cached volume of noise."""

    levels = [(80, 72, 96)]

    def read(self, start, size, level=0, out_size=None):
        return torch.rand(1, *(out_size or size), generator=torch.Generator().manual_seed(sum(start)))


def test_the_recipe_is_the_published_run():
    text = (ROOT / "scripts/pretrain_mim.sh").read_text()
    recipe = re.search(r"launch Pretrain.main_pretrain (.*) \"\$@\"", text.replace("\\\n", " "), re.S).group(1)
    flags = [word for word in shlex.split(recipe) if "${" not in word]  # without what the shell fills in
    settings = parse(settings_class(), [*flags, "--datalist", "x"])
    plan = plan_updates(settings, 746, 2)
    assert (plan.batch, plan.micro_batch, plan.accum) == (128, 1, 64)
    assert settings.optim.blr * plan.batch / 256 == pytest.approx(2e-4)
    with torch.device("meta"):
        task = build_task(settings, plan)
    assert task.specs["image"].size == (192, 192, 192) and task.views == 1
    assert task.method.keep == {"up": 4, "mid": 86, "down": 108}
    expected = {"rec_up": 1, "rec_mid": 1, "rec_down": 1, "align_up_mid": 0.1, "align_mid_down": 0.1}
    assert task.loss_weights(0) == task.loss_weights(plan.total_steps) == expected


def test_batches_of_the_loader_are_what_the_method_takes():
    task, _, _ = build(TOY + " --num_mid 2 --num_down 1")
    batch = torch.utils.data.default_collate([ViewDataset([Noise()], task.specs)[(0, 0)]])
    assert batch["image"].shape == (1, 1, 1, 64, 64, 64)
    with torch.no_grad():
        losses = task.method(batch)
        flat = task.method(batch | {"image": batch["image"][0]})
    assert losses == flat and losses.keys() == task.loss_weights(0).keys()


@pytest.mark.parametrize("size, flag, down_size", [(32, "", 32), (64, "--half_down", 32)])
def test_pictures_show_each_level_as_it_was_trained(size, flag, down_size):
    task, _, _ = build(f"{TOY} --num_mid 2 --num_down 2 --local_size {size} {flag}")
    batch = {"image": torch.rand(1, 1, *(2 * size,) * 3), "key": torch.tensor([5])}
    rows = task.method.reconstructions(batch)
    assert list(rows) == ["up", "mid", "down"]
    assert [len(row.mask) for row in rows.values()] == [1, 2, 2]
    for row, side in zip(rows.values(), (size, size, down_size)):
        assert row.view.shape[2:] == (side,) * 3
        assert row.prediction.shape == (len(row.mask), (side // 16) ** 3, 4096) and not row.prediction.requires_grad
    assert task.method.encoder is not None and task.method._seen is None


def test_weights_follow_the_mode_and_none_has_no_alignment():
    task, plan, _ = build(TOY + " --level_mode coarse_to_fine --weight_rec_up 3")
    assert task.loss_weights(0) | {"rec_up": 6.0, "rec_mid": 1.0, "rec_down": 0.0} == task.loss_weights(0)
    last = task.loss_weights(plan.total_steps)
    assert (last["rec_up"], last["rec_down"]) == pytest.approx((3.0, 1.0))
    task, _, _ = build(TOY + " --align none")
    assert set(task.loss_weights(0)) == {"rec_up", "rec_mid", "rec_down"}


def test_heads_follow_given_widths():
    toy = TOY.replace("--num_heads 2", "").replace("6 6 12 24", "8 16 32 64")
    task, _, _ = build(toy)
    assert task.method.encoder.blocks4[0].attn.num_heads == 2


@pytest.mark.parametrize(
    "extra, words",
    [
        ("--model small", "--model small.*tiny and base"),
        ("--patch_size 8", r"--patch_size \(8, 8, 8\)"),
        ("--embed_dim 96", "--embed_dim: is a setting of --method mae or glmae"),
        ("--local_size 40", "not divisible by the patch size"),
        ("--group 3", "group 3 does not divide"),
        ("--num_heads 5", "24.*num_heads 5"),
    ],
)
def test_contradictions_are_named(extra, words):
    with pytest.raises(InputError, match=words):
        build(f"{TOY} {extra}")


# ---------------------------------------------------------------- the program


def arguments(scans, out, *more):
    more = (
        "--num_mid",
        2,
        "--num_down",
        1,
        "--down_parts",
        2,
        "--samples_per_epoch",
        4,
        "--warmup_epochs",
        0,
        "--workers",
        0,
        *more,
    )
    places = ("--datalist", scans, "--cache_dir", scans.parent / "cache", "--out_dir", out, "--lr", 1e-3)
    return [*TOY.split(), *map(str, places + more)]


def pretrain(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["main_pretrain", *arguments(*args)])
    main_pretrain.main()


def test_a_run_resumes_exactly_and_loads_into_the_network(scans, tmp_path, monkeypatch):
    pretrain(monkeypatch, scans, tmp_path / "whole", "--epochs", 2, "--save_every", 1, "--align", "published")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"checkpoint-1.pth", "checkpoint-last.pth", "reconstruction-1.png"} <= names
    content = torch.load(tmp_path / "whole/checkpoint-1.pth", weights_only=True)
    assert content["args"]["grid_size"] == [2, 2, 2] and content["epoch"] == 1
    for entry in read_log(tmp_path / "whole"):
        assert {"rec_up", "rec_mid", "rec_down", "align_up_mid", "align_mid_down"} <= set(entry)
        assert 0.5 < entry["rec_down"] < 2  # the whole of it, not the mean of its two pieces

    (tmp_path / "cut").mkdir()  # as if stopped after the first of two epochs
    (tmp_path / "whole/checkpoint-0.pth").rename(tmp_path / "cut/checkpoint-last.pth")
    pretrain(monkeypatch, scans, tmp_path / "cut", "--epochs", 2, "--save_every", 1, "--align", "published")
    again = torch.load(tmp_path / "cut/checkpoint-last.pth", weights_only=True)
    assert content["model"].keys() == again["model"].keys()
    assert all(torch.equal(value, again["model"][name]) for name, value in content["model"].items())

    encoder = ConvViT3D(32, embed_dims=(6, 6, 12, 24), depths=(1, 1, 1, 1), num_heads=2, pyramid=True)
    missing, _ = encoder.load_pretrained_checkpoint(tmp_path / "cut/checkpoint-last.pth")
    assert not [n for n in missing if not ("gamma_" in n or "relative_position" in n or n.startswith("fpn."))]


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(scans, tmp_path):
    """Equal to 1e-4 through torchrun on two CPU processes, DDP or FSDP2, and accumulated."""
    runs = {"one": (1, ()), "two": (2, ()), "sharded": (2, ("--fsdp",)), "parts": (1, ("--micro_batch_size", 1))}
    for name, (nproc, more) in runs.items():
        args = arguments(scans, tmp_path / name, "--epochs", 4, "--align", "infonce", *more)
        run_module("Pretrain.main_pretrain", *args, nproc=nproc)
    one = read_log(tmp_path / "one")
    assert len(one) == 4
    for other in ("two", "sharded", "parts"):
        for a, b in zip(one, read_log(tmp_path / other)):
            for term in (key for key in a if key.startswith(("rec_", "align_", "grad_norm"))):
                assert a[term] == pytest.approx(b[term], rel=1e-4, abs=1e-4), (other, a["epoch"], term)
