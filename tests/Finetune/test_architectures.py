"""From settings to an architecture, the table of heads, and what is refused before any data is read."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from common.cli import parse
from common.config import from_dict
from common.errors import InputError
from Finetune.architectures import ModelSettings, build_model, load_encoder, load_finetuned, resolve
from Finetune.heads import HEADS, Architecture, Head, dynunet_strides
from Finetune.losses import start_at_prior
from Finetune.main_finetune import main
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_convvit3d import ConvViT3D
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


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if not head.classifies])
def test_the_last_layer_of_every_head_starts_at_the_prior(name):
    torch.manual_seed(0)
    small = {"vit": dict(embed_dim=24, depth=4, num_heads=2), "hybrid": dict(embed_dims=(6, 6, 12, 24), num_heads=2)}
    sizes = small.get(HEADS[name].encoder, {}) | dict(in_chans=1, out_channels=3, feature_size=12)
    decoder = dict(decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
    sizes |= decoder if HEADS[name].decoder else {}
    sizes |= dict(depths=(1, 1, 1, 1)) if HEADS[name].encoder == "hybrid" else {}
    roi = (64, 64, 64) if name == "swinunetr" else (64, 32, 32)
    model = build_model(Architecture(name, roi=roi, patch_size=(16, 16, 16), **sizes)).eval()
    x, bias, counts = torch.rand(1, 1, *roi), HEADS[name].output_bias(model), torch.tensor([90, 9, 1])
    with torch.no_grad():
        bias.zero_()
        before = model(x)
        start_at_prior(bias, counts)
        shift = (model(x) - before).flatten(2)
    expected = (counts / 100).log().view(1, 3, 1).expand_as(shift)
    torch.testing.assert_close(shift, expected, rtol=0, atol=1e-4)


def test_fine_tuning_starts_at_the_shares_of_the_training_voxels(tmp_path):
    made = make_dataset(load_preset("MSD09_Spleen"), tmp_path / "data")
    flags = ["--preset", "MSD09_Spleen", "--data", made, "--cache_dir", tmp_path / "cache", *SMALL, *QUICK]
    biases = []
    for value in ("on", "off"):
        path = main([*map(str, flags), "--lr", "1e-12", "--prior_bias", value, "--out_dir", str(tmp_path / value)])
        biases.append(load_finetuned(path)[0].out.conv.conv.bias.detach())
    assert biases[0].softmax(0)[0] > 0.5 and biases[0].exp().sum() == pytest.approx(1, abs=1e-3)
    assert biases[1].exp().sum() != pytest.approx(1, abs=1e-3)


def test_a_prior_is_refused_where_there_is_none(tmp_path):
    flags = [
        "--preset",
        "MSD01_BrainTumour",
        "--data",
        str(tmp_path),
        "--out_dir",
        str(tmp_path / "run"),
        "--prior_bias",
        "on",
    ]
    with pytest.raises(InputError, match="--prior_bias on: found --model unetr and MSD01_BrainTumour"):
        main(flags)
    assert not (tmp_path / "run").exists()


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


def test_the_heads_are_those_that_the_checkpoint_records(tmp_path):
    """No tensor of a ViT shows them. `--size` does not change them, and other ones are refused."""
    path = tmp_path / "vit.pth"
    vit_file(path, embed_dim=768, depth=1, num_heads=6)
    given = {"model": "linear", "roi": 32, "size": "base", "depth": 1}
    architecture = resolve(from_dict(given, ModelSettings), load_preset("BTCV"), path)
    assert architecture.num_heads == 6
    load_encoder(build_model(architecture), path)
    refusal = "vit.pth: found an encoder with num_heads 6, expected 12"
    with pytest.raises(InputError, match=refusal):
        resolve(from_dict(given | {"num_heads": 12}, ModelSettings), load_preset("BTCV"), path)
    with pytest.raises(InputError, match=refusal):
        load_encoder(build_model(replace(architecture, num_heads=12)), path)


def test_heads_that_nothing_records_must_be_given(tmp_path):
    state = VisionTransformer3D(img_size=32, embed_dim=48, depth=1, num_heads=4).state_dict()
    torch.save(state, tmp_path / "bare.pth")
    choose = partial(resolve, preset=load_preset("BTCV"), init=tmp_path / "bare.pth")
    with pytest.raises(InputError, match="--num_heads none: must divide the width 48"):
        choose(from_dict({"model": "linear", "roi": 32}, ModelSettings))
    assert choose(from_dict({"model": "linear", "roi": 32, "num_heads": 4}, ModelSettings)).num_heads == 4


def test_a_size_does_not_change_the_heads_of_the_hybrid(tmp_path):
    model = ConvViT3D(img_size=32, num_heads=6, pyramid=False, depths=(1, 1, 1, 1))
    torch.save({"student": model.state_dict(), "args": {"num_heads": 6}}, tmp_path / "mim.pth")
    settings = from_dict({"model": "mim_light", "roi": 32, "size": "base", "depths": [1, 1, 1, 1]}, ModelSettings)
    assert resolve(settings, load_preset("BTCV"), tmp_path / "mim.pth").num_heads == 6


@pytest.mark.parametrize(
    "roi, levels", [((96, 96, 96), 5), ((128, 128, 128), 6), ((192, 192, 32), 6), ((48, 40, 36), 4), ((30, 30, 30), 2)]
)
def test_dynunet_halves_even_axes_down_to_four_voxels(roi, levels):
    strides = dynunet_strides(roi)
    smallest = np.array(roi) / np.prod(strides, axis=0)
    assert len(strides) == levels and strides[0] == (1, 1, 1)
    assert (smallest >= 4).all() and (smallest == smallest.round()).all()
    assert len(strides) == 6 or ((smallest < 8) | (smallest % 2 == 1)).all()
