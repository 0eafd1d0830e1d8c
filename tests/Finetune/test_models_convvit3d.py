"""The hybrid encoder of MiM: masking, position tables, feature maps, loading."""

import importlib
import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from timm.optim import param_groups_layer_decay
from torch import nn

from Finetune.depthwise3d import margin_rows, neighbour_cubes
from Finetune.encoder3d import cut_patches, take
from Finetune.models_convvit3d import (
    ConvBlock,
    convvit3d_base_patch16,
    convvit3d_tiny_patch16,
    relative_position_index,
    resample_bias_table,
)
from tests.helpers import ROOT

SMALL = dict(embed_dims=(6, 12, 12, 24), depths=(1, 1, 1, 2), num_heads=2)


def small(img_size=32, **kwargs):
    torch.manual_seed(0)
    model = convvit3d_base_patch16(img_size=img_size, **dict(SMALL, **kwargs)).eval()
    # parameters of zeros and ones hide mistakes
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "bias_table" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save(tmp_path, state, **extras):
    path = tmp_path / "weights.pth"
    torch.save({"model": state, **extras}, path)
    return path


# ---------------------------------------------------------------- masking


@pytest.mark.parametrize("pyramid", [False, True])
def test_removed_voxels_do_not_change_the_tokens(pyramid):
    model = small((48, 32, 32), pyramid=pyramid)
    x = torch.rand(2, 1, 48, 32, 32)
    ids_keep = torch.stack([torch.randperm(12)[:5] for _ in range(2)])
    visible = torch.zeros(2, 12).scatter_(1, ids_keep, 1.0).view(2, 1, 3, 2, 2)
    voxels = F.interpolate(visible, scale_factor=16)
    other = torch.where(voxels == 1, x, 100 * torch.randn_like(x))
    with torch.no_grad():
        a, b = model(x, ids_keep), model(other, ids_keep)
        seen = model(torch.where(voxels == 1, x + 0.1, x), ids_keep)
    assert (a - b).abs().max() == 0
    # visible voxels do change them
    assert (a - seen).abs().min(dim=-1).values.max() > 0


@pytest.mark.parametrize("pyramid", [False, True])
def test_tokens_follow_the_order_of_ids_keep(pyramid):
    model = small(pyramid=pyramid)
    x, order = torch.rand(2, 1, 32, 32, 32), torch.stack([torch.randperm(8), torch.randperm(8)])
    with torch.no_grad():
        torch.testing.assert_close(model(x, order), take(model(x), order), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_the_convolution_block_against_its_equations(masked):
    block, ids_keep = ConvBlock(4), torch.tensor([[5, 0, 4]])
    # a grid (2, 2, 2) of tokens of 16^3 voxels
    x = torch.randn(1, 4, 32, 32, 32)
    tokens = torch.zeros(1, 8).scatter_(1, ids_keep, 1.0).view(1, 1, 2, 2, 2)
    visible = F.interpolate(tokens, scale_factor=16) if masked else torch.ones(1, 1, 32, 32, 32)

    def conv(layer, x, **kwargs):
        return F.conv3d(x, layer.weight, layer.bias, **kwargs)

    # without scale and shift, as in fresh layers
    def norm(x):
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt()

    with torch.no_grad():
        seen = conv(block.conv1, norm(x)) * visible
        mixed = x + conv(block.conv2, conv(block.attn, seen, padding=2, groups=4))
        expected = mixed + conv(block.mlp.fc2, F.gelu(conv(block.mlp.fc1, norm(mixed))))
        if masked:
            rows = margin_rows(neighbour_cubes(ids_keep, (2, 2, 2)), 16, 2)
            x, expected = (cut_patches(v, (16, 16, 16), ids_keep).movedim(2, -1) for v in (x, expected))
            y = block(x, rows)
        else:
            y = block(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_tokens_are_fused_with_every_convolution_stage():
    model, x = small(), torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        tokens, maps = model.forward_stages(x)
        total = tokens
        for stage, m in enumerate(maps, 1):
            total = total + model.get_submodule(f"stage{stage}_output_decode")(m).flatten(2).transpose(1, 2)
        expected = F.layer_norm(total, total.shape[-1:], model.norm.weight, model.norm.bias, eps=1e-6)
        torch.testing.assert_close(model(x), expected)
    assert [m.shape[2] for m in maps] == [16, 8, 4]


def test_layer_norms_have_the_published_epsilons():
    model = convvit3d_tiny_patch16(img_size=32)
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    transformer = {name for name in eps if name.startswith("blocks4") or name == "norm"}
    assert {eps[name] for name in transformer} == {1e-6}
    assert {eps[name] for name in eps if name not in transformer} == {1e-5}
    assert all(b.attn.head_dim == 32 for b in model.blocks4) and len(model.blocks4) == 11


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("grid", [(6, 6, 6), (2, 3, 4), (1, 1, 1)])
def test_relative_index_against_a_plain_loop(grid):
    coords = [(i, j, k) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])]
    d, h, w = grid
    expected = torch.empty(len(coords), len(coords), dtype=torch.int64)
    for a, p in enumerate(coords):
        for b, q in enumerate(coords):
            z, y, x = (p[n] - q[n] + grid[n] - 1 for n in range(3))
            expected[a, b] = z * (2 * h - 1) * (2 * w - 1) + y * (2 * w - 1) + x
    index = relative_position_index(grid)
    assert torch.equal(index, expected)
    if grid == (6, 6, 6):
        assert (index[0, 0], index[215, 0], index[0, 215]) == (665, 1330, 0)


def test_bias_is_added_to_the_attention_logits():
    model = small(pyramid=True)
    block, tokens = model.blocks4[0], torch.randn(2, 8, 24)
    plain = Block(24, 2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)).eval()
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if k in plain.state_dict()})
    with torch.no_grad():
        q, k, v = plain.attn.qkv(plain.norm1(tokens)).view(2, 8, 3, 2, 12).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / math.sqrt(12)
        for i in range(8):
            for j in range(8):
                logits[:, :, i, j] += block.attn.relative_position_bias_table[relative_position_index((2, 2, 2))[i, j]]
        mixed = plain.attn.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 8, 24))
        expected = tokens + block.gamma_1 * mixed
        expected = expected + block.gamma_2 * plain.mlp(plain.norm2(expected))
        torch.testing.assert_close(block(tokens, (2, 2, 2)), expected, atol=1e-5, rtol=1e-5)


def test_resampled_bias_keeps_the_zero_offset_and_a_slope():
    source, target = (6, 6, 6), (12, 12, 2)
    offsets = torch.arange(-5.0, 6)
    # grows along the first axis alone
    table = (offsets.view(-1, 1, 1) * torch.ones(11, 11, 11)).reshape(-1, 1)
    resampled = resample_bias_table(table, source, target).view(23, 23, 3)
    assert resampled[11].abs().max() < 1e-5
    assert (resampled.diff(dim=0) >= 0).all() and resampled.diff(dim=1).abs().max() < 1e-5
    assert resample_bias_table(table, source, source) is table


def test_the_position_table_is_trained_in_the_pyramid_only():
    assert not small().pos_embed.requires_grad and small(pyramid=True).pos_embed.requires_grad


@pytest.mark.parametrize("size, chans", [((192, 192, 32), 1), ((128, 128, 128), 4)])
def test_input_sizes_other_than_img_size(size, chans):
    model = small(96, in_chans=chans, pyramid=True, depths=(1, 1, 1, 1))
    grid = tuple(s // 16 for s in size)
    own = small(size, in_chans=chans, pyramid=True, depths=(1, 1, 1, 1))
    state = model.state_dict()
    state["pos_embed"] = (
        F.interpolate(state["pos_embed"].transpose(1, 2).reshape(1, 24, 6, 6, 6), size=grid, mode="trilinear")
        .flatten(2)
        .transpose(1, 2)
    )
    table = "blocks4.0.attn.relative_position_bias_table"
    state[table] = resample_bias_table(state[table], (6, 6, 6), grid)
    state["blocks4.0.attn.relative_position_index"] = relative_position_index(grid)
    own.load_state_dict(state)
    x = torch.rand(1, chans, *size)
    # one model was built for this size, the other resamples its tables in every forward pass
    with torch.no_grad():
        tokens, maps = model(x, return_layers=(0, 3, 4))
        expected_tokens, expected_maps = own(x, return_layers=(0, 3, 4))
    torch.testing.assert_close(tokens, expected_tokens)
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(s // n for s in size) for n in (2, 16, 32)]
    for a, b in zip(maps, expected_maps):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- pyramid


def test_the_pyramid_is_normed_copies_of_the_stages():
    model, x = small(64, pyramid=True), torch.rand(2, 1, 64, 64, 64)
    with torch.no_grad():
        tokens, maps = model(x, return_layers=(0, 1, 2, 3, 4))
        raw, stages = model.forward_stages(x)
        coarse = raw.transpose(1, 2).reshape(2, 24, 4, 4, 4)
        for m, r in zip(maps, [*stages, coarse, model.fpn(coarse)]):
            mean, std = r.mean(1, keepdim=True), r.var(1, keepdim=True, unbiased=False).add(1e-5).sqrt()
            torch.testing.assert_close(m, (r - mean) / std, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens, raw)
    assert [tuple(m.shape[1:3]) for m in maps] == [(6, 32), (12, 16), (12, 8), (24, 4), (48, 2)]
    # in the order asked for
    with torch.no_grad():
        assert torch.equal(model(x, return_layers=(3, 1))[1][1], maps[1])


def test_instance_norm_does_not_depend_on_the_batch():
    a, b = torch.rand(1, 1, 64, 64, 64), torch.rand(1, 1, 64, 64, 64)
    for norm, equal in (("instance", True), ("batch", False)):
        model = small(64, pyramid=True, stride32_norm=norm).train()
        with torch.no_grad():
            together = model(torch.cat([a, b]), return_layers=(4,))[1][0][:1]
            assert torch.allclose(model(a, return_layers=(4,))[1][0], together, atol=1e-4) == equal


def test_stochastic_depth_grows_linearly_over_all_blocks():
    model = convvit3d_tiny_patch16(img_size=32, pyramid=True, drop_path_rate=0.2)
    blocks = [b for stage in (1, 2, 3) for b in model.get_submodule(f"blocks{stage}")] + list(model.blocks4)
    drops = [b.drop_path if hasattr(b, "drop_path") else b.drop_path1 for b in blocks]
    rates = [getattr(d, "drop_prob", 0.0) for d in drops]
    assert rates == pytest.approx([0.2 * i / 16 for i in range(17)])


def test_checkpointed_blocks_give_the_same_gradients():
    x, grads = torch.rand(1, 1, 32, 32, 32), []
    for recompute in (False, True):
        model = small().train()
        model.set_grad_checkpointing(recompute)
        model(x, torch.tensor([[1, 4, 6]])).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(g is not None for g in grads[0])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: small(40), r"\(40, 40, 40\).*not divisible"),
        (lambda: small()(torch.rand(1, 2, 32, 32, 32)), r"\(1, 2, 32, 32, 32\).*\(B, 1"),
        (lambda: small()(torch.rand(1, 1, 32, 32, 40)), r"\(32, 32, 40\).*not divisible"),
        (lambda: small()(torch.rand(1, 1, 32, 32, 32), return_layers=(4,)), r"return_layers \(4,\).*0 to 3"),
        (lambda: small(48, pyramid=True)(torch.rand(1, 1, 48, 48, 48), return_layers=(4,)), "divisible by 32"),
        (lambda: small()(torch.rand(1, 1, 32, 32, 32), torch.tensor([[0]]), (1,)), "ids_keep"),
        (lambda: small(depths=(1, 1, 0, 2)), r"depths \(1, 1, 0, 2\)"),
        (lambda: small(embed_dims=(6, 12, 24)), r"embed_dims \(6, 12, 24\)"),
        (lambda: small(num_heads=5), "embed_dim.*24.*num_heads 5"),
    ],
)
def test_impossible_sizes_and_calls_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---------------------------------------------------------------- loading


def test_the_pretrained_body_works_the_same_in_the_pyramid(tmp_path):
    source, target = small(64), convvit3d_base_patch16(img_size=64, pyramid=True, **SMALL).eval()
    path = save(tmp_path, source.state_dict())
    missing, unexpected = target.load_pretrained_checkpoint(path, encoder_only=True, interpolate_pos_embed=True)
    added = ("gamma_", "relative_position_", "fpn.")
    assert all(any(word in name for word in added) for name in missing)
    assert sorted(unexpected) == sorted(n for n in source.state_dict() if n.startswith(("norm.", "stage")))
    x = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        (a, a_maps), (b, b_maps) = source.forward_stages(x), target.forward_stages(x)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(m, n) for m, n in zip(a_maps, b_maps))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.encoder."])
def test_prefixes_are_removed_and_the_count_is_printed(tmp_path, prefix, capsys):
    source, target = small(), small()
    state = {prefix + name: value + 1.0 for name, value in source.state_dict().items()}
    assert target.load_pretrained_checkpoint(save(tmp_path, state)) == ([], [])
    assert torch.equal(target.norm.weight, source.norm.weight + 1.0)
    total = len(source.state_dict())
    assert f"{total} of {total} encoder tensors" in capsys.readouterr().out


def test_more_channels_of_one_image_give_the_same_tokens(tmp_path):
    source, target = small(), small(in_chans=4)
    target.load_pretrained_checkpoint(save(tmp_path, source.state_dict()))
    x = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(target(x.repeat(1, 4, 1, 1, 1)), source(x), atol=1e-5, rtol=1e-5)


def test_tables_of_another_grid_are_resampled_or_dropped(tmp_path):
    source, size = small(96, pyramid=True), (192, 192, 32)
    path = save(tmp_path, source.state_dict())
    table = "blocks4.1.attn.relative_position_bias_table"
    resampled = small(size, pyramid=True)
    missing, _ = resampled.load_pretrained_checkpoint(path)
    expected = resample_bias_table(source.get_parameter(table), (6, 6, 6), (12, 12, 2))
    assert torch.equal(resampled.get_parameter(table), expected)
    assert {"pos_embed", table} <= set(resampled.load_report.resampled)
    assert all(name.endswith("relative_position_index") for name in missing)
    dropped = convvit3d_base_patch16(img_size=size, pyramid=True, **SMALL)
    missing, _ = dropped.load_pretrained_checkpoint(path, bias_table="drop")
    assert table in missing and dropped.get_parameter(table).abs().max() == 0
    assert torch.equal(dropped.pos_embed, resampled.pos_embed)


def test_anisotropic_tables_are_loaded_with_their_grid_only(tmp_path):
    source, target = small((96, 96, 64), pyramid=True), small(64, pyramid=True)
    path = save(tmp_path, source.state_dict())
    with pytest.raises(ValueError, match="source_grid"):
        target.load_pretrained_checkpoint(path)
    target.load_pretrained_checkpoint(path, source_grid=(6, 6, 4))
    target.load_pretrained_checkpoint(save(tmp_path, source.state_dict(), args={"grid_size": [6, 6, 4]}))
    volume = source.pos_embed.transpose(1, 2).reshape(1, 24, 6, 6, 4)
    expected = F.interpolate(volume, size=(4, 4, 4), mode="trilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(target.pos_embed, expected)


def test_other_architectures_are_refused_and_change_nothing(tmp_path):
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = {"patch_embed.proj.weight": torch.zeros(8, 1, 16, 16, 16), "pos_embed": torch.zeros(1, 9, 24)}
    with pytest.raises(ValueError, match="only 1 of .* encoder tensors fit"):
        model.load_pretrained_checkpoint(save(tmp_path, wrong))
    wider = small(embed_dims=(6, 12, 24, 24)).state_dict()
    with pytest.raises(ValueError, match=r"patch_embed3.proj.weight .*\(24, 12, 2, 2, 2\).*\(12"):
        model.load_pretrained_checkpoint(save(tmp_path, wider))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_importable_with_its_folder_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "Finetune"))
    # monkeypatch removes the second import of these modules afterwards
    for name in ("models_convvit3d", "encoder3d", "pretrained"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("models_convvit3d")
    assert module.convvit3d_tiny_patch16(img_size=32).grid_size == (2, 2, 2)
    assert module.encoder3d.__name__ == "encoder3d"


def test_freezing_leaves_what_only_the_pyramid_has():
    model = small(pyramid=True)
    model.freeze_encoder()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    block = ("gamma_1", "gamma_2", "attn.relative_position_bias_table")
    expected = {f"blocks4.{i}.{name}" for i in range(2) for name in block}
    assert trained == expected | {f"fpn.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}


def test_layer_decay_follows_the_depth():
    """The learning rate falls by one step per layer from the last block to the first patch embedding."""
    model = small(depths=(1, 2, 1, 3))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    order = [
        "patch_embed1.proj",
        "blocks1.0",
        "patch_embed2.proj",
        "blocks2.0",
        "blocks2.1",
        "patch_embed3.proj",
        "blocks3.0",
    ]
    order += ["patch_embed4.proj", "blocks4.0", "blocks4.1", "blocks4.2", "norm"]
    found = [next(value for name, value in scale.items() if name.startswith(f"{part}.")) for part in order]
    assert found == [0.5 ** (len(order) - 1 - depth) for depth in range(len(order))]
    assert scale["patch_embed5.weight"] == scale["patch_embed4.proj.weight"]
