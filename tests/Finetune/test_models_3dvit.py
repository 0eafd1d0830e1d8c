"""The ViT encoder: its numbers against the same equations written out, and the ways to call it."""

import copy
import math

import pytest
import torch

from Finetune import encoder3d
from Finetune.encoder3d import resample_pos_embed, take
from Finetune.models_3dvit import (
    PatchEmbed3D,
    VisionTransformer3D,
    vit_base_patch16_3d,
    vit_huge_patch16_3d,
    vit_large_patch16_3d,
    vit_small_patch16_3d,
    vit_tiny_patch16_3d,
)


def small(**kwargs):
    return VisionTransformer3D(**(dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4) | kwargs))


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
    """Compare with the same equations in torch.nn.functional on the model's own tensors."""
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


def test_all_ways_to_call_the_encoder_agree():
    model, x = small().eval(), torch.rand(2, 1, 32, 32, 32)
    tokens, hidden = model(x, return_layers=(0, 2))
    everything = model(x, return_features=True)["all_features"]
    torch.testing.assert_close(tokens, everything)
    # the state after the last block, before the final norm
    torch.testing.assert_close(model.norm(hidden[1]), tokens)
    keep_all = torch.arange(64).expand(2, -1)
    torch.testing.assert_close(model(x, ids_keep=keep_all), everything)
    order = torch.randperm(64).expand(2, -1)
    torch.testing.assert_close(model(x, ids_keep=order)[:, 1:], everything[:, 1:][:, order[0]], atol=1e-5, rtol=1e-5)


def test_removed_patches_do_not_change_the_tokens():
    model, x = small().eval(), torch.rand(1, 1, 32, 32, 32)
    # the first half along D
    ids = torch.arange(32).unsqueeze(0)
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
def test_inputs_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="32"):
        small()(torch.rand(shape))


def test_volumes_not_divisible_by_the_patch_are_refused():
    with pytest.raises(ValueError, match=r"\(120, 96, 96\).*\(16, 16, 16\)"):
        vit_base_patch16_3d(img_size=(120, 96, 96))


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"depth": -2}, "depth.*-2"),
        ({"depth": 0}, "depth.*0"),
        ({"patch_size": 0}, "patch_size.*0"),
        ({"patch_size": (8, 8, -8)}, r"patch_size.*\(8, 8, -8\)"),
        ({"img_size": -32}, "img_size.*-32"),
        ({"embed_dim": 0}, "embed_dim.*0"),
        ({"embed_dim": 4, "num_heads": 1}, "embed_dim.*4"),
        ({"num_heads": 0}, "num_heads.*0"),
        ({"num_heads": 5}, "embed_dim.*48.*num_heads 5"),
    ],
)
def test_impossible_sizes_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        small(**sizes)


def test_predictions_do_not_depend_on_the_order():
    model = small(encoder_only=False, decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=4).eval()
    tokens = model(torch.rand(1, 1, 32, 32, 32), return_features=True)["all_features"]
    raster = model.forward_decoder(tokens, torch.arange(64).unsqueeze(0))
    shuffle = torch.randperm(64).unsqueeze(0)
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, shuffle[0]]], 1)
    torch.testing.assert_close(model.forward_decoder(shuffled, shuffle), raster[:, shuffle[0]])
    assert raster.shape == (1, 64, 512)


def test_other_input_sizes_resample_from_the_stored_grid():
    model, x = small(img_size=(16, 32, 48)).eval(), torch.rand(1, 1, 32, 16, 24)
    twin = small(img_size=(32, 16, 24)).eval()
    state = model.state_dict()
    state["pos_embed"] = resample_pos_embed(model.pos_embed, (2, 4, 6), (4, 2, 3))
    twin.load_state_dict(state)
    torch.testing.assert_close(model(x), twin(x))


def test_patches_are_embedded_as_by_the_convolution():
    """All of them, and those that were chosen; two channels, patches and volume of unequal sides."""
    embed, x = PatchEmbed3D((4, 8, 2), 2, 12), torch.rand(2, 2, 8, 24, 4)
    expected = embed.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x), expected)
    ids = torch.tensor([[5, 0, 11], [3, 4, 2]])
    torch.testing.assert_close(embed(x, ids), take(expected, ids))


def test_positions_are_resampled_once_per_size(monkeypatch):
    model, calls = small().eval(), []
    plain = encoder3d.resample_pos_embed

    def counted(table, source, target, prefix):
        calls.append(target)
        return plain(table, source, target, prefix)

    monkeypatch.setattr(encoder3d, "resample_pos_embed", counted)
    a, b = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 1, 24, 16, 16)
    with torch.inference_mode():
        first = model(a)
    for x in (a, b, a, b):
        model(x)
    assert calls == [(2, 2, 2), (3, 2, 2)]
    # a table made in inference mode serves training too
    model(a).sum().backward()
    # copies start anew, and so do tables that were loaded, changed or moved
    copy.deepcopy(model)(a)
    copy.copy(model._tables).get("pos_embed", model.pos_embed, (4, 4, 4), (2, 2, 2), 1)
    assert len(calls) == 4
    model.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(a), first)
    with torch.no_grad():
        model.pos_embed.mul_(2.0)
    assert not torch.allclose(model(a), first, atol=1e-3)
    model.double()(a.double())
    assert len(calls) == 7
    # a trained table must have its gradient
    model.pos_embed.requires_grad_()
    # one feature, because the sum of all is constant after the final norm
    model(a.double())[:, 0].sum().backward()
    model(a.double())[:, 0].sum().backward()
    assert len(calls) == 9 and model.pos_embed.grad.any()


# ---------------------------------------------------------------- fine-tuning


def test_freezing_leaves_the_position_table_fixed():
    model = small(num_classes=2)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "pos_embed" not in trainable
    model.freeze_encoder()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    model.unfreeze_encoder()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
