"""From settings to an architecture, the table of heads, and what is refused before any data is read."""

import numpy as np
import pytest
import torch
from torch import nn

from common.cli import parse
from common.config import from_dict
from common.errors import InputError
from Finetune.architectures import ModelSettings, build_model, load_encoder, load_finetuned, resolve
from Finetune.heads import HEADS, Head, dynunet_strides
from Finetune.main_finetune import main
from Finetune.presets import load_preset
from tests.Finetune.made import make_dataset
from tests.Finetune.test_main_finetune import QUICK, SMALL, vit_file
from tests.helpers import read_log


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--depth -2", "--depth -2.*at least 1"),
        ("--embed_dim 0", "--embed_dim 0.*at least 1"),
        ("--num_heads 0", "--num_heads 0.*at least 1"),
        ("--patch_size 0", "--patch_size 0.*at least 1"),
        ("--patch_size 16 16 -8", "--patch_size 16 16 -8.*at least 1"),
        ("--roi 0", "--roi 0.*at least 1"),
        ("--embed_dims 12 24 0 96", "--embed_dims 12 24 0 96.*at least 1"),
        ("--feature_size -4", "--feature_size -4.*at least 1"),
        ("--drop_path 2", "--drop_path 2.*less than 1"),
        ("--model unter", "--model unter.*'unetr'"),
        ("--model resnet", "--model resnet.*unetr, mim, linear"),
    ],
)
def test_settings_out_of_bounds_are_refused(flags, words):
    with pytest.raises(InputError, match=words):
        parse(ModelSettings, flags.split())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model": "dynunet", "roi": (30, 30, 30)}, "--roi 30 30 30.*--model dynunet"),
        ({"model": "dynunet", "roi": (7, 7, 7)}, "--roi 7 7 7.*--model dynunet"),
        ({"model": "swinunetr"}, "--feature_size 16.*multiple of 12.*--model swinunetr"),
        ({"model": "swinunetr", "feature_size": 12, "roi": (32, 32, 32)}, "--roi 32 32 32.*--model swinunetr"),
        ({"patch_size": (12, 12, 12), "roi": (24, 24, 24)}, "--patch_size 12 12 12"),
        ({"num_heads": 7}, "--num_heads 7.*768"),
        ({"roi": (40, 40, 40)}, "--roi 40 40 40.*16 16 16"),
    ],
)
def test_impossible_architectures_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        resolve(ModelSettings(**settings), load_preset("BTCV"), None)


class MeanHead(nn.Module):
    """One linear layer on the mean of the patch tokens, the same logits for all voxels."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone, self.out = backbone, nn.Linear(backbone.embed_dim, classes)

    def forward(self, x):
        logits = self.out(self.backbone(x, return_features=True)["patch_features"].mean(1))
        return logits[..., None, None, None].expand(-1, -1, *x.shape[2:])


def test_a_registered_head_is_trained_and_loaded(tmp_path, monkeypatch):
    data = make_dataset(load_preset("MSD09_Spleen"), tmp_path / "data")
    pretrained = vit_file(tmp_path / "vit.pth").state_dict()
    monkeypatch.setitem(HEADS, "mean", Head(lambda backbone, a: MeanHead(backbone, a.out_channels), "mean of tokens"))
    flags = ["--preset", "MSD09_Spleen", "--data", data, "--out_dir", tmp_path / "run", "--cache_dir", tmp_path / "c"]
    flags += ["--model", "mean", "--init", tmp_path / "vit.pth", "--freeze", *SMALL, *QUICK]
    model, architecture, *_ = load_finetuned(path := main([*map(str, flags)]))
    assert architecture.model == "mean" and isinstance(model, MeanHead)
    assert torch.equal(model.backbone.norm.weight, pretrained["norm.weight"])
    assert read_log(tmp_path / "run")[0]["dice"] > 0
    monkeypatch.delitem(HEADS, "mean")
    with pytest.raises(InputError, match=f"{path}: model mean"):
        load_finetuned(path)


@pytest.mark.parametrize(
    "args", [["not a mapping"], {"num_heads": 2}, {"num_heads": "two"}, {"architecture": {"num_heads": 2}}]
)
def test_sizes_are_read_from_the_checkpoint(tmp_path, args):
    vit_file(tmp_path / "vit.pth", num_heads=2)
    content = torch.load(tmp_path / "vit.pth", weights_only=True)
    torch.save(content | {"args": args}, tmp_path / "vit.pth")
    settings = from_dict({"model": "linear", "roi": 32, "num_heads": 2}, ModelSettings)
    architecture = resolve(settings, load_preset("BTCV"), tmp_path / "vit.pth")
    assert (architecture.embed_dim, architecture.depth, architecture.patch_size) == (24, 4, (16, 16, 16))
    load_encoder(build_model(architecture), tmp_path / "vit.pth")


@pytest.mark.parametrize(
    "roi, levels", [((96, 96, 96), 5), ((128, 128, 128), 6), ((192, 192, 32), 6), ((48, 40, 36), 4), ((30, 30, 30), 2)]
)
def test_dynunet_halves_even_axes_down_to_four_voxels(roi, levels):
    strides = dynunet_strides(roi)
    smallest = np.array(roi) / np.prod(strides, axis=0)
    assert len(strides) == levels and strides[0] == (1, 1, 1)
    assert (smallest >= 4).all() and (smallest == smallest.round()).all()
    assert len(strides) == 6 or ((smallest < 8) | (smallest % 2 == 1)).all()
