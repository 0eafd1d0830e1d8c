"""The network of MiM from settings and checkpoints: `main_finetune --model mim`."""

import dataclasses
import re
import shlex

import pytest
import torch

from common.cli import parse
from common.config import from_dict, to_dict
from common.errors import InputError
from Finetune.architectures import Architecture, ModelSettings, build_model, load_encoder, load_finetuned, resolve
from Finetune.main_finetune import main
from Finetune.models_convvit3d import convvit3d_tiny_patch16
from Finetune.models_unetr import convvit3d_unetr
from Finetune.presets import load_preset
from Finetune.settings import FinetuneSettings
from tests.helpers import ROOT

PRESET = load_preset("sample_abdomen")


def pretrained(tmp_path, args=None, **kwargs):
    encoder = convvit3d_tiny_patch16(img_size=32, **kwargs)
    path = tmp_path / "pretrained.pth"
    torch.save({"model": encoder.state_dict(), "args": args or {}}, path)
    return path, encoder


def test_network_from_scratch_is_the_published_one():
    architecture = resolve(ModelSettings(model="mim", roi=(96, 96, 96)), PRESET, None)
    with torch.device("meta"):
        models = build_model(architecture), convvit3d_unetr(96, 1, PRESET.out_channels)
    built, published = ({k: v.shape for k, v in model.state_dict().items()} for model in models)
    assert built == published
    assert architecture.drop_path == 0.2
    assert resolve(ModelSettings(model="mim", size="tiny"), PRESET, None).embed_dims == (12, 24, 48, 96)


def test_widths_depths_and_weights_come_from_the_checkpoint(tmp_path):
    path, encoder = pretrained(tmp_path, embed_dims=(6, 12, 12, 24), depths=(1, 2, 1, 2), num_heads=2)
    settings = ModelSettings(model="mim", num_heads=2)
    architecture = resolve(settings, PRESET, path)
    assert architecture.embed_dims == (6, 12, 12, 24)
    assert architecture.depths == (1, 2, 1, 2) and architecture.grid_size == (4, 4, 4)
    model = build_model(architecture)
    load_encoder(model, path)
    assert torch.equal(model.backbone.blocks4[1].attn.qkv.weight, encoder.blocks4[1].attn.qkv.weight)


def test_light_network_reads_the_features_of_pretraining_alone(tmp_path, monkeypatch):
    path, encoder = pretrained(tmp_path, depths=(1, 1, 1, 1))
    architecture = resolve(ModelSettings(model="mim_light", roi=(48, 32, 16)), PRESET, path)
    model = build_model(architecture).eval()
    load_encoder(model, path)
    a, b = torch.rand(2, 1, 1, 48, 32, 16)
    everything = torch.arange(6)[None]
    with torch.no_grad():
        features = encoder.eval()(a, ids_keep=everything)
        torch.testing.assert_close(model.backbone.patch_features(a), features, rtol=1e-4, atol=1e-4)
        assert model(a).shape == (1, PRESET.out_channels, 48, 32, 16) and not torch.equal(model(a), model(b))
        monkeypatch.setattr(model.backbone, "forward_stages", lambda *_: (features, []))
        monkeypatch.setattr(model.backbone, "_fuse", lambda *_: torch.zeros(()))
        assert torch.equal(model(a), model(b))


def test_light_network_is_trained_and_rebuilt(tmp_path, spleen):
    sizes = dict(embed_dims=(6, 6, 12, 24), depths=(1, 1, 1, 1), num_heads=2)
    path, encoder = pretrained(tmp_path, {"num_heads": 2}, **sizes)
    flags = ["--preset", "MSD09_Spleen", "--data", spleen, "--cache_dir", tmp_path / "cache", "--model", "mim_light"]
    flags += "--roi 32 --freeze --lr 0.01 --crops 1 --epochs 1 --warmup_epochs 0 --workers 0 --device cpu".split()
    tuned = main([*map(str, flags), "--init", str(path), "--out_dir", str(tmp_path / "run")])
    model, architecture, *_ = load_finetuned(tuned)
    assert architecture.model == "mim_light" and architecture.drop_path == 0
    for name in model.backbone.encoder_names:
        if name != "pos_embed":
            assert torch.equal(model.backbone.state_dict()[name], encoder.state_dict()[name]), name
    assert model.decoder[-1].proj.bias.abs().max() > 0


@pytest.mark.parametrize(
    "args, heads", [({"num_heads": 2, "model": "base"}, 2), ({"num_heads": None, "model": "tiny"}, 3), ({}, 3)]
)
def test_heads_come_from_the_pretraining_settings(tmp_path, args, heads):
    path, _ = pretrained(tmp_path, args, depths=(1, 1, 1, 1))
    assert resolve(ModelSettings(model="mim"), PRESET, path).num_heads == heads


def test_a_fine_tuned_file_is_enough_to_build_the_network(tmp_path):
    settings = ModelSettings(model="mim", size="tiny", roi=(64, 32, 32))
    architecture = dataclasses.replace(resolve(settings, PRESET, None), depths=(1, 1, 1, 1))
    assert from_dict(to_dict(architecture), Architecture) == architecture
    model = build_model(architecture).eval()
    args = {"architecture": to_dict(architecture), "preset": to_dict(PRESET)}
    torch.save({"state_dict": model.state_dict(), "args": args}, tmp_path / "tuned.pth")
    twin, found, _, _ = load_finetuned(tmp_path / "tuned.pth")
    x = torch.rand(1, 1, 64, 32, 32)
    with torch.no_grad():
        assert found == architecture and torch.equal(twin(x), model(x))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(roi=(48, 48, 48)), "roi.*48.* 32"),
        (dict(roi=(32, 32, 32)), "roi.*32.* 64"),
        (dict(patch_size=(8, 8, 8)), "patch_size.*8.* 16"),
        (dict(size="large"), "size large.* tiny or base"),
        (dict(embed_dim=96), "embed_dim.* 96.*--embed_dims"),
        (dict(num_heads=7), "num_heads.* 7.* 384"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        resolve(ModelSettings(model="mim", **settings), PRESET, None)


def test_btcv_recipe_accepts_mim():
    """`scripts/BTCV/run.sh --model mim`: the flags of the recipe, then the user's."""
    text = (ROOT / "scripts/BTCV/run.sh").read_text().replace("\\\n", " ")
    recipe = re.search(r"finetune BTCV (.*) \"\$@\"", text).group(1)
    # set by scripts/finetune.sh
    given = ["--preset", "BTCV", "--data", "data", "--out_dir", "out"]
    settings = parse(FinetuneSettings, [*given, *shlex.split(recipe), "--model", "mim"])
    architecture = resolve(settings.network, load_preset("BTCV"), None)
    with torch.device("meta"):
        names = {name: value.shape for name, value in build_model(architecture).state_dict().items()}
        assert names == {name: value.shape for name, value in convvit3d_unetr().state_dict().items()}
    assert len(names) == 319


def test_checkpoint_of_another_encoder_is_refused(tmp_path):
    path, _ = pretrained(tmp_path, depths=(1, 1, 1, 1))
    with pytest.raises(InputError, match="embed_dims 12 24 48 96.* 48"):
        resolve(ModelSettings(model="mim", size="base"), PRESET, path)
    with pytest.raises(InputError, match="pretrained.pth.* ViT"):
        resolve(ModelSettings(model="unetr"), PRESET, path)
    torch.save({"model": {"patch_embed.proj.weight": torch.zeros(8, 1, 16, 16, 16)}}, path)
    with pytest.raises(InputError, match="pretrained.pth.* MiM"):
        resolve(ModelSettings(model="mim"), PRESET, path)
