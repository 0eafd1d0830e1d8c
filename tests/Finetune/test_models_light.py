"""Heads that see the tokens alone: MAE's decoder transferred, and a light decoder similar to Primus's."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from common.config import from_dict
from common.errors import InputError
from Finetune.architectures import ModelSettings, build_model, load_encoder, load_finetuned, resolve
from Finetune.engine_finetune import Finetuning, make_optimizer
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_light import LightDecoder, MAEDecoder, PatchExpand, upsampling_strides
from Finetune.models_unetr import UNETR, LinearProbe
from Finetune.presets import load_preset
from Pretrain.losses import unpatchify
from tests.Finetune.test_main_finetune import run, vit_file

DECODER = dict(encoder_only=False, decoder_embed_dim=12, decoder_depth=2, decoder_num_heads=2)


def vit(**kwargs):
    torch.manual_seed(0)
    defaults = dict(img_size=32, patch_size=(8, 8, 16), embed_dim=24, depth=2, num_heads=2)
    return VisionTransformer3D(**(defaults | kwargs)).eval()


def mae_file(path, seed=1):
    """Write a checkpoint as MAE's pretraining does and return its model, decoder included."""
    model = vit_file(path, seed, **DECODER).eval()
    args = {"grid_size": list(model.grid_size), "num_heads": 2, "decoder_num_heads": 2}
    torch.save({"model": model.state_dict(), "args": args}, path)
    return model


@pytest.mark.parametrize("roi", [32, (48, 32, 16)])
def test_mae_decoder_predicts_what_mae_predicts(tmp_path, roi):
    mae = mae_file(tmp_path / "mae.pth")
    settings = from_dict({"model": "mae_decoder", "roi": roi}, ModelSettings)
    architecture = resolve(settings, load_preset("BTCV"), tmp_path / "mae.pth")
    model = build_model(architecture).eval()
    load_encoder(model, tmp_path / "mae.pth", decoder=True)
    # one class and MAE's own last layer
    model.out = PatchExpand(12, 1, (16, 16, 16))
    model.out.proj.load_state_dict(mae.decoder_pred.state_dict())
    x = torch.rand(2, 1, *architecture.roi)
    grid = architecture.grid_size
    everything = torch.arange(math.prod(grid)).expand(2, -1)
    prediction = mae.forward_decoder(mae(x, ids_keep=everything), everything, grid=grid)
    torch.testing.assert_close(model(x), unpatchify(prediction, (16, 16, 16), grid))


@pytest.mark.parametrize("head", [MAEDecoder, LightDecoder])
def test_logits_depend_on_the_tokens_alone(head, monkeypatch):
    model = head(vit(**(DECODER if head is MAEDecoder else {})), 3)
    a, b = torch.rand(2, 1, 1, 32, 16, 32)
    assert model(a).shape == (1, 3, 32, 16, 32) and not torch.equal(model(a), model(b))
    tokens = torch.rand(1, 1 + 4 * 2 * 2, 24)
    monkeypatch.setattr(model.backbone, "forward_tokens", lambda *_: (tokens, []))
    assert torch.equal(model(a), model(b))


def test_unetr_goes_around_its_encoder(monkeypatch):
    model = UNETR(vit(patch_size=8, class_token=False), 1, 3, feature_size=4)
    a, b = torch.rand(2, 1, 1, 16, 16, 16)
    tokens = torch.rand(1, 8, 24)
    monkeypatch.setattr(model.backbone, "forward_tokens", lambda *_: (tokens, [tokens] * 2))
    assert not torch.equal(model(a), model(b))


@pytest.mark.parametrize("head", [MAEDecoder, LightDecoder])
def test_every_parameter_has_a_gradient(head):
    model = head(vit(**(DECODER if head is MAEDecoder else {})), 3)
    model(torch.rand(1, 1, 32, 32, 32)).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_patch_expand_is_a_transposed_convolution():
    expand, conv = PatchExpand(5, 3, (2, 1, 4)), nn.ConvTranspose3d(5, 3, (2, 1, 4), (2, 1, 4), bias=False)
    with torch.no_grad():
        conv.weight.copy_(expand.proj.weight.unflatten(0, (2, 1, 4, 3)).permute(4, 3, 0, 1, 2))
    x = torch.rand(2, 5, 3, 4, 2)
    torch.testing.assert_close(expand(x.movedim(1, -1)).movedim(-1, 1), conv(x))


@pytest.mark.parametrize("patch", [(16, 16, 16), (8, 8, 4), (12, 6, 2), (1, 1, 1), (5, 1, 1)])
def test_upsampling_strides_lead_from_patch_to_voxel(patch):
    strides = upsampling_strides(patch)
    assert tuple(np.prod(strides, axis=0)) == patch and len(strides) >= 1
    assert len(LightDecoder(vit(patch_size=patch, img_size=patch, depth=1), 3).decoder) == 3 * len(strides) - 2


def test_light_decoder_moves_nothing_between_patches():
    model = LightDecoder(vit(), 3)
    tokens = torch.rand(1, 4, 4, 2, 24)
    changed = tokens.clone()
    changed[0, 1, 2, 0] += 1
    difference = (model.decoder(changed) - model.decoder(tokens)).abs().sum(-1)[0] > 0
    inside = difference[8:16, 16:24, :16]
    assert inside.any() and difference.sum() == inside.sum()


def test_layer_decay_is_that_of_an_encoder_without_decoder():
    scales = []
    for model in (LinearProbe(vit(), 3), MAEDecoder(vit(**DECODER), 3)):
        groups = make_optimizer(Finetuning(model, None), weight_decay=0.1, layer_decay=0.5).param_groups
        of = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
        scales.append({name: of[id(p)] for name, p in model.named_parameters() if p.requires_grad})
    encoder = [name for name in scales[0] if name.startswith("backbone.")]
    assert all(scales[0][name] == scales[1][name] for name in encoder)
    assert {scale for name, scale in scales[1].items() if name not in encoder} == {1.0}


@pytest.mark.parametrize("model", ["mae_decoder", "primus"])
def test_light_heads_are_trained_and_rebuilt(tmp_path, spleen, model):
    pretrained = mae_file(tmp_path / "mae.pth").state_dict()
    flags = ("--model", model, "--init", tmp_path / "mae.pth", "--freeze", "--lr")
    before, *_ = load_finetuned(run(tmp_path, "MSD09_Spleen", spleen, *flags, 0, out="before"))
    after, architecture, *_ = load_finetuned(run(tmp_path, "MSD09_Spleen", spleen, *flags, 0.01, out="after"))
    loaded = {n: v for n, v in before.backbone.state_dict().items() if not n.endswith("pos_embed")}
    assert all(torch.equal(value, pretrained[name]) for name, value in loaded.items())
    assert ("decoder_blocks.1.mlp.fc1.weight" in loaded) == (model == "mae_decoder")
    changed = {n for n, v in after.state_dict().items() if not torch.equal(v, before.state_dict()[n])}
    assert changed and not changed & {f"backbone.{name}" for name in after.backbone.encoder_names}
    assert architecture.class_token and after(torch.zeros(1, 1, 32, 32, 32)).shape == (1, 2, 32, 32, 32)
    if model == "mae_decoder":
        assert "backbone.decoder_blocks.1.mlp.fc1.weight" in changed and architecture.decoder_num_heads == 2


def test_scratch_twin_of_mae_decoder_has_its_sizes_only(tmp_path, spleen):
    pretrained = mae_file(tmp_path / "mae.pth")
    flags = ("--model", "mae_decoder", "--init", tmp_path / "mae.pth", "--scratch_twin", "--lr", 0)
    model, *_ = load_finetuned(run(tmp_path, "MSD09_Spleen", spleen, *flags))
    found, expected = model.backbone.decoder_blocks[0].mlp.fc1.weight, pretrained.decoder_blocks[0].mlp.fc1.weight
    assert found.shape == expected.shape and not torch.equal(found, expected)


def test_impossible_decoders_are_refused(tmp_path):
    preset, path = load_preset("BTCV"), tmp_path / "mae.pth"
    mae_file(path)
    with pytest.raises(InputError, match="--decoder_depth 2.*--model unetr"):
        resolve(ModelSettings(decoder_depth=2), preset, path)
    with pytest.raises(InputError, match="--decoder_num_heads 5.*576"):
        resolve(ModelSettings(model="mae_decoder", decoder_num_heads=5), preset, None)
    with pytest.raises(InputError, match="mae.pth.*decoder_embed_dim 12.*48"):
        resolve(ModelSettings(model="mae_decoder", decoder_embed_dim=48), preset, path)
    content = torch.load(path, weights_only=True)
    no_decoder = {name: value for name, value in content["model"].items() if not name.startswith("decoder_")}
    torch.save(content | {"student": content["model"], "teacher": no_decoder}, path)
    resolve(ModelSettings(model="mae_decoder"), preset, path)
    with pytest.raises(InputError, match="mae.pth.*no decoder.*--model mae_decoder"):
        resolve(ModelSettings(model="mae_decoder"), preset, path, "teacher")
    torn = copy.copy(content["model"])
    del torn["decoder_blocks.1.norm2.bias"]
    torch.save(content | {"model": torn}, path)
    model = build_model(resolve(ModelSettings(model="mae_decoder", roi=(32, 32, 32)), preset, path))
    with pytest.raises(InputError, match="mae.pth.*decoder_blocks.1.norm2.bias"):
        load_encoder(model, path, decoder=True)
