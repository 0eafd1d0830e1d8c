"""The ViT encoder: numerics against a plain reading of timm's blocks, positions against the closed form, loading
against every layout."""

import argparse
import math
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding

from Finetune.models_3dvit import (
    VisionTransformer3D,
    clean_keys,
    fit_pos_embed,
    get_3d_sincos_pos_embed,
    resample_pos_embed,
    vit_base_patch16_3d,
    vit_huge_patch16_3d,
    vit_large_patch16_3d,
    vit_small_patch16_3d,
    vit_tiny_patch16_3d,
)

ROOT = Path(__file__).resolve().parents[2]


def small(**kwargs):
    return VisionTransformer3D(**(dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4) | kwargs))


def authors_file(path, grid=(10, 10, 10), decoder_width=48, prefix="module.backbone.", **model):
    """A file as we believe the authors' to be: DDP and wrapper prefixes, decoder, DINO head, teacher, a Namespace of
    arguments."""
    vit = small(
        img_size=tuple(8 * g for g in grid),
        encoder_only=False,
        decoder_embed_dim=decoder_width,
        decoder_depth=1,
        **model,
    )
    weights = {prefix + k: torch.randn_like(v) if k != "pos_embed" else v for k, v in vit.state_dict().items()}
    head = {"module.head.mlp.0.weight": torch.rand(4, 48), "module.head.last_layer.weight_g": torch.ones(4, 1)}
    teacher = {k.removeprefix("module."): v + 1 for k, v in weights.items() if "decoder" not in k}
    content = {
        "student": weights | head,
        "teacher": teacher,
        "optimizer": {"state": {}},
        "epoch": 1599,
        "args": argparse.Namespace(lr=0.1, output_dir="x"),
        "dino_loss": OrderedDict(center=torch.zeros(1, 4)),
    }
    torch.save(content, path)
    return {k.removeprefix(prefix): v for k, v in weights.items()}


# ---------------------------------------------------------------- architecture


def test_base_has_the_released_names_and_shapes():
    with torch.device("meta"):
        model = vit_base_patch16_3d()
        full = vit_base_patch16_3d(encoder_only=False)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    expected = {
        "cls_token": (1, 1, 768),
        "pos_embed": (1, 217, 768),
        "patch_embed.proj.weight": (768, 1, 16, 16, 16),
        "patch_embed.proj.bias": (768,),
        "norm.weight": (768,),
        "norm.bias": (768,),
    }
    for i in range(12):
        block = {
            "norm1.weight": (768,), "norm1.bias": (768,), "attn.qkv.weight": (2304, 768), "attn.qkv.bias": (2304,),
            "attn.proj.weight": (768, 768), "attn.proj.bias": (768,), "norm2.weight": (768,), "norm2.bias": (768,),
            "mlp.fc1.weight": (3072, 768), "mlp.fc1.bias": (3072,),
            "mlp.fc2.weight": (768, 3072), "mlp.fc2.bias": (768,),
        }  # fmt: skip
        expected |= {f"blocks.{i}.{k}": v for k, v in block.items()}
    assert len(expected) == 150 and shapes == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 88_203_264
    assert len(full.state_dict()) == 254
    assert full.decoder_pred.weight.shape == (4096, 576)


@pytest.mark.parametrize(
    "factory, width, depth, heads",
    [
        (vit_tiny_patch16_3d, 192, 12, 3),
        (vit_small_patch16_3d, 384, 12, 6),
        (vit_base_patch16_3d, 768, 12, 12),
        (vit_large_patch16_3d, 1024, 24, 16),
        (vit_huge_patch16_3d, 1280, 32, 16),
    ],
)
def test_factories(factory, width, depth, heads):
    with torch.device("meta"):
        model = factory(img_size=(96, 96, 32), patch_size=(16, 16, 8))
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (width, depth, heads)
    assert model.grid_size == (6, 6, 4)


def test_forward_is_a_plain_pre_norm_transformer():
    """Against the same equations written out with torch.nn.functional on the model's own tensors."""
    model, x = small().eval(), torch.rand(2, 1, 32, 32, 32)
    w, f = model.state_dict(), torch.nn.functional
    t = f.conv3d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    t = torch.cat([w["cls_token"].expand(2, -1, -1), t], 1) + w["pos_embed"]
    for i in range(3):
        p = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        y = f.layer_norm(t, (48,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        q, k, v = (y @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).reshape(2, -1, 3, 4, 12).permute(2, 0, 3, 1, 4)
        a = ((q @ k.transpose(-1, -2)) / math.sqrt(12)).softmax(-1) @ v
        t = t + a.transpose(1, 2).reshape(2, -1, 48) @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        y = f.layer_norm(t, (48,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        y = f.gelu(y @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"])
        t = t + y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
    t = f.layer_norm(t, (48,), w["norm.weight"], w["norm.bias"], 1e-6)
    features = model(x, return_features=True)
    torch.testing.assert_close(features["all_features"], t)
    torch.testing.assert_close(model(x), t[:, 0])
    torch.testing.assert_close(features["patch_features"], t[:, 1:])


def test_each_caller_gets_its_own():
    model, x = small().eval(), torch.rand(2, 1, 32, 32, 32)
    tokens, hidden = model(x, return_layers=(0, 2))
    everything = model(x, return_features=True)["all_features"]
    torch.testing.assert_close(tokens, everything)
    torch.testing.assert_close(model.norm(hidden[1]), tokens)  # the last block's state, before the final norm
    keep_all = torch.arange(64).expand(2, -1)
    torch.testing.assert_close(model(x, ids_keep=keep_all), everything)
    order = torch.randperm(64).expand(2, -1)
    torch.testing.assert_close(model(x, ids_keep=order)[:, 1:], everything[:, 1:][:, order[0]], atol=1e-5, rtol=1e-5)


def test_removed_patches_change_nothing():
    model, x = small().eval(), torch.rand(1, 1, 32, 32, 32)
    ids = torch.arange(32).unsqueeze(0)  # the first half along D
    other = x.clone()
    other[:, :, 16:] = 9.0
    assert torch.equal(model(x, ids_keep=ids), model(other, ids_keep=ids))


def test_checkpointed_blocks_give_the_same_gradients():
    model, x = small(), torch.rand(1, 1, 32, 32, 32)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    for a, b in zip(plain, (p.grad for p in model.parameters() if p.requires_grad)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32, 30), (2, 2, 32, 32, 32), (1, 32, 32, 32)])
def test_an_input_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match="32"):
        small()(torch.rand(shape))


def test_a_volume_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"\(120, 96, 96\).*\(16, 16, 16\)"):
        vit_base_patch16_3d(img_size=(120, 96, 96))


def test_decoder_puts_patches_back_in_raster_order():
    """With all patches kept in any order, the decoder gives the same as with all kept in raster order."""
    model = small(encoder_only=False, decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=4).eval()
    tokens = model(torch.rand(1, 1, 32, 32, 32), return_features=True)["all_features"]
    raster = model.forward_decoder(tokens, torch.arange(64).unsqueeze(0))
    shuffle = torch.randperm(64).unsqueeze(0)
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, shuffle[0]]], 1)
    torch.testing.assert_close(model.forward_decoder(shuffled, shuffle.argsort(1)), raster)
    assert raster.shape == (1, 64, 512)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("width", [48, 576, 768, 512, 1024])
def test_sincos_is_the_closed_form(width):
    table, n = get_3d_sincos_pos_embed(width, (2, 3, 4), cls_token=True), width // 6
    assert table.shape == (1, 25, width) and table[0, 0].abs().max() == 0
    for d, h, w in [(0, 0, 0), (1, 2, 3), (1, 0, 2)]:
        row = table[0, 1 + d * 12 + h * 4 + w]
        for axis, p in enumerate((d, h, w)):
            for k in (0, 1, n - 1):
                angle = p / 10000 ** (k / n)
                assert abs(row[2 * n * axis + k] - math.sin(angle)) < 1e-6
                assert abs(row[2 * n * axis + n + k] - math.cos(angle)) < 1e-6
    assert table[0, :, 6 * n :].abs().sum() == 0


def test_sincos_equals_monai_with_its_axes_swapped():
    """MONAI numbers the axes (w, h, d) in the first two thirds; libraries differ, the authors' order is ours."""
    ours = get_3d_sincos_pos_embed(96, (3, 3, 3)).reshape(1, 27, 3, 32)
    theirs = build_sincos_position_embedding([3, 3, 3], 96, 3).reshape(1, 27, 3, 32)
    torch.testing.assert_close(ours, theirs[:, :, [1, 0, 2]])


def test_resampling_keeps_the_axes_of_an_anisotropic_grid():
    """A table that is linear along one axis stays linear along that axis, and constant along the others."""
    source, target = (4, 2, 3), (8, 2, 6)
    for axis in range(3):
        ramp = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in source), indexing="ij")[axis]
        table = torch.cat([torch.full((1, 1, 2), 7.0), ramp.reshape(1, -1, 1).expand(-1, -1, 2)], 1)
        out = resample_pos_embed(table, source, target)
        assert torch.equal(out[:, 0], table[:, 0])
        volume = out[0, 1:, 0].reshape(target)
        profile = volume.movedim(axis, 0).reshape(target[axis], -1)
        assert (profile - profile[:, :1]).abs().max() < 1e-6
        expected = torch.nn.functional.interpolate(
            torch.arange(source[axis], dtype=torch.float32).reshape(1, 1, -1), size=target[axis], mode="linear"
        )
        torch.testing.assert_close(profile[:, 0], expected.flatten())


def test_another_input_size_resamples_from_the_true_grid():
    model, x = small(img_size=(16, 32, 48)).eval(), torch.rand(1, 1, 32, 16, 24)
    twin = small(img_size=(32, 16, 24)).eval()
    state = model.state_dict()
    state["pos_embed"] = resample_pos_embed(model.pos_embed, (2, 4, 6), (4, 2, 3))
    twin.load_state_dict(state)
    torch.testing.assert_close(model(x), twin(x))


def test_fit_pos_embed_never_guesses_an_anisotropic_grid():
    table = get_3d_sincos_pos_embed(48, (6, 6, 4), cls_token=True)
    assert torch.equal(fit_pos_embed(table, (6, 6, 4)), table)
    with pytest.raises(ValueError, match="source_grid"):
        fit_pos_embed(table, (6, 6, 6))
    given = fit_pos_embed(table, (12, 6, 4), source_grid=(6, 6, 4))
    torch.testing.assert_close(given, resample_pos_embed(table, (6, 6, 4), (12, 6, 4)))
    assert fit_pos_embed(table[:, 1:], (6, 6, 4)).shape == table.shape  # no CLS row in the file
    assert fit_pos_embed(table, (6, 6, 4), num_prefix_tokens=0).shape == (1, 144, 48)
    cube = get_3d_sincos_pos_embed(48, (15, 15, 15), cls_token=True)  # int(15**3 ** (1/3)) is 14
    assert fit_pos_embed(cube, (6, 6, 6)).shape == (1, 217, 48)
    with pytest.raises(ValueError, match="resampling is off"):
        fit_pos_embed(cube, (6, 6, 6), resample=False)


# ---------------------------------------------------------------- loading


def test_the_users_example_runs_from_inside_finetune(tmp_path):
    """To the letter: `patch_size` and `embed_dim` go to a patch16 factory, `img_size` is a tuple, the folder is on the
    path."""
    code = f"""
from models_3dvit import vit_base_patch16_3d
import torch
with torch.device("meta"):
    shapes = {{k: v.shape for k, v in vit_base_patch16_3d(img_size=160).state_dict().items()}}
path = {str(tmp_path / "c.pth")!r}
torch.save({{"student": {{"module.backbone." + k: torch.zeros(s) for k, s in shapes.items()}}}}, path)
model = vit_base_patch16_3d(img_size=(96, 96, 96), patch_size=16, in_chans=1, embed_dim=768, encoder_only=True)
missing_keys, unexpected_keys = model.load_pretrained_checkpoint(path, encoder_only=True, interpolate_pos_embed=True)
assert missing_keys == [] and unexpected_keys == []
import sys
assert not [m for m in sys.modules if m.split(".")[0] in ("common", "Pretrain", "Finetune")]
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "Finetune", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "150 of 150 encoder tensors" in done.stdout and "resampled 1: pos_embed" in done.stdout


def test_an_authors_file_gives_the_same_features(tmp_path):
    weights = authors_file(tmp_path / "checkpoint-1599.pth", grid=(4, 4, 4))
    model = small()
    missing, unexpected = model.load_pretrained_checkpoint(tmp_path / "checkpoint-1599.pth")
    assert missing == []
    assert "head.mlp.0.weight" in unexpected and "decoder_pred.weight" in unexpected
    reference = small()
    reference.load_state_dict({k: v for k, v in weights.items() if k in reference.state_dict()})
    x = torch.rand(1, 1, 32, 32, 32)
    assert torch.equal(model.eval()(x), reference.eval()(x))
    assert model.load_report.encoder_matched == model.load_report.encoder_total == len(model.state_dict())


def test_a_table_of_another_grid_is_resampled_and_named(tmp_path):
    weights = authors_file(tmp_path / "c.pth", grid=(10, 10, 10))
    model = small()
    model.load_pretrained_checkpoint(tmp_path / "c.pth")
    assert model.load_report.resampled == ["pos_embed"]
    torch.testing.assert_close(model.pos_embed.data, resample_pos_embed(weights["pos_embed"], (10, 10, 10), (4, 4, 4)))
    with pytest.raises(ValueError, match="resampling is off"):
        small().load_pretrained_checkpoint(tmp_path / "c.pth", interpolate_pos_embed=False)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "backbone.", "encoder.", "module._orig_mod.backbone.", "vit."]
)
@pytest.mark.parametrize("key", ["student", "model", "state_dict", None])
def test_every_layout_loads(tmp_path, prefix, key):
    source, model = small(), small()
    weights = {prefix + k: v for k, v in source.state_dict().items()}
    torch.save({key: weights, "epoch": 3} if key else weights, tmp_path / "c.pth")
    assert model.load_pretrained_checkpoint(tmp_path / "c.pth") == ([], [])
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


def test_the_teacher_only_when_asked_for(tmp_path):
    weights = authors_file(tmp_path / "c.pth", grid=(4, 4, 4))
    model = small()
    model.load_pretrained_checkpoint(tmp_path / "c.pth", checkpoint_key="teacher")
    assert torch.equal(model.norm.weight.data, weights["norm.weight"] + 1)
    torch.save({"teacher": {"backbone.x": torch.ones(1)}}, tmp_path / "teacher_only.pth")
    with pytest.raises(ValueError, match="checkpoint_key='teacher'"):
        model.load_pretrained_checkpoint(tmp_path / "teacher_only.pth")


def test_decoder_and_head_are_taken_where_they_fit(tmp_path):
    weights = authors_file(tmp_path / "c.pth", grid=(4, 4, 4), decoder_num_heads=4)
    model = small(encoder_only=False, decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=4)
    missing, unexpected = model.load_pretrained_checkpoint(tmp_path / "c.pth", encoder_only=False)
    assert missing == [] and {k.split(".")[0] for k in unexpected} == {"head"}
    assert torch.equal(model.decoder_pred.weight.data, weights["decoder_pred.weight"])
    other = small(encoder_only=False, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=4)
    missing, unexpected = other.load_pretrained_checkpoint(tmp_path / "c.pth", encoder_only=False)
    assert "decoder_embed.weight" in missing and "decoder_embed.weight" in unexpected  # another width: never an error


def test_a_classifier_ignores_a_dino_head(tmp_path):
    authors_file(tmp_path / "c.pth", grid=(4, 4, 4))
    model = small(num_classes=3)
    head = model.head.weight.clone()
    model.load_pretrained_checkpoint(tmp_path / "c.pth", encoder_only=True)
    assert torch.equal(model.head.weight, head) and model(torch.rand(1, 1, 32, 32, 32)).shape == (1, 3)


def test_channels_are_inflated_and_divided(tmp_path):
    torch.save(small().state_dict(), tmp_path / "c.pth")
    one, four, raw = small(), small(in_chans=4), small(in_chans=4)
    one.load_pretrained_checkpoint(tmp_path / "c.pth")
    four.load_pretrained_checkpoint(tmp_path / "c.pth")
    raw.load_pretrained_checkpoint(tmp_path / "c.pth", rescale_channels=False)
    x = torch.rand(1, 1, 32, 32, 32)
    torch.testing.assert_close(one.eval()(x), four.eval()(x.expand(-1, 4, -1, -1, -1)))
    torch.testing.assert_close(raw.patch_embed.proj.weight, 4 * four.patch_embed.proj.weight)


def test_what_does_not_fit_is_an_error_and_changes_nothing(tmp_path):
    other = VisionTransformer3D(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=4)
    torch.save(other.state_dict(), tmp_path / "narrow.pth")
    partial = small().state_dict()
    del partial["blocks.1.attn.qkv.weight"]
    torch.save(partial, tmp_path / "partial.pth")
    torch.save({"student": {"module.other." + k: v for k, v in small().state_dict().items()}}, tmp_path / "prefix.pth")
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name, message in [("narrow", r"found \(24,\)"), ("partial", "qkv.weight is missing"), ("prefix", "only 0 of")]:
        with pytest.raises(ValueError, match=message):
            model.load_pretrained_checkpoint(tmp_path / f"{name}.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_in_a_file_is_ever_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": small().state_dict(), "args": Attack()}, tmp_path / "attack.pth")
    (tmp_path / "attack.pkl").write_bytes(pickle.dumps(Attack()))
    for name in ("attack.pth", "attack.pkl"):
        with pytest.raises(ValueError, match="read safely"):
            small().load_pretrained_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_torn_and_missing_files_are_named(tmp_path):
    torch.save(small().state_dict(), tmp_path / "c.pth")
    torn = tmp_path / "torn.pth"
    torn.write_bytes((tmp_path / "c.pth").read_bytes()[:5000])
    with pytest.raises(ValueError, match="torn.pth"):
        small().load_pretrained_checkpoint(torn)
    with pytest.raises(ValueError, match="no such checkpoint"):
        small().load_pretrained_checkpoint(tmp_path / "none.pth")


def test_a_flipped_bit_is_found(tmp_path):
    model, path = small(), tmp_path / "c.pth"
    torch.save({"student": model.state_dict()}, path)
    content = bytearray(path.read_bytes())
    where = content.find(model.pos_embed.numpy().tobytes()) + 1000
    content[where] ^= 1
    path.write_bytes(content)
    altered = torch.load(path, weights_only=True)["student"]["pos_embed"]
    assert not torch.equal(altered, model.pos_embed)  # torch reads it without a word
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="c.pth.*damaged: the checksum of record c/data/"):
        model.load_pretrained_checkpoint(path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_prefixes_are_stripped_at_the_start_only():
    assert list(clean_keys({"module.module.backbone.a": 0, "x.module.b": 0})) == ["a", "x.module.b"]
    with pytest.raises(ValueError, match="'a'"):
        clean_keys({"module.a": 0, "a": 1})


# ---------------------------------------------------------------- fine-tuning


def test_freezing_leaves_the_position_table_fixed():
    model = small(num_classes=2)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "pos_embed" not in trainable
    model.freeze_encoder()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    model.unfreeze_encoder()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


def test_without_class_token_the_rest_loads(tmp_path):
    torch.save(small().state_dict(), tmp_path / "c.pth")
    model = small(class_token=False)
    missing, unexpected = model.load_pretrained_checkpoint(tmp_path / "c.pth")
    assert missing == [] and unexpected == ["cls_token"]
    assert model(torch.rand(1, 1, 32, 32, 32), return_features=True)["all_features"].shape == (1, 64, 48)
