"""MiM: what is masked, which pieces of the volume become the next level, who is aligned with whom, and the names."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F

from Finetune.models_convvit3d import ConvViT3D
from Pretrain.losses import cosine_distance, patchify
from Pretrain.models_mim import (
    HEADS,
    cut_blocks,
    level_factors,
    mim_convvit3d_base_patch16,
    mim_convvit3d_tiny_patch16,
    pool_units,
)
from tests.Pretrain.toy_mim import batch_of, toy


def calls_of(method, batch):
    """What the encoder was given, level by level: (x, ids_keep), and the raster mask (M, T) with 1 = removed."""
    seen = []

    def record(module, args, kwargs):
        mask = torch.ones(len(args[0]), math.prod(module.grid_size)).scatter_(1, kwargs["ids_keep"], 0.0)
        seen.append((args[0], mask))

    handle = method.encoder.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        method(batch)
    handle.remove()
    up, mid, *down = seen
    return up, mid, tuple(torch.cat(parts) for parts in zip(*down))


# ---------------------------------------------------------------- octants, blocks


def test_octants_are_octants():
    values = torch.arange(8.0)
    volume = F.interpolate(values.view(1, 1, 2, 2, 2), size=(96, 96, 96))
    blocks = cut_blocks(volume, (48, 48, 48), torch.randperm(8).unsqueeze(0))
    assert blocks.flatten(1).std(dim=1).max() == 0
    ids = torch.tensor([[5, 0, 3]])
    assert cut_blocks(volume, (48, 48, 48), ids)[:, 0, 0, 0, 0].tolist() == [5.0, 0.0, 3.0]
    tokens = F.interpolate(values.view(1, 1, 2, 2, 2), size=(6, 6, 6)).flatten(2).transpose(1, 2)
    assert pool_units(tokens, (6, 6, 6), 2).flatten().tolist() == values.tolist()


def test_blocks_are_cut_in_the_order_of_patches():
    x = torch.rand(2, 3, 32, 48, 64)
    ids = torch.stack([torch.randperm(24)[:7] for _ in range(2)])
    patches = patchify(x, (16, 16, 16))  # (2, 24, 16*16*16*3), channels last
    expected = patches[torch.arange(2)[:, None], ids].view(14, 16, 16, 16, 3).movedim(-1, 1)
    assert torch.equal(cut_blocks(x, (16, 16, 16), ids), expected)


# ---------------------------------------------------------------- the three levels


@pytest.mark.parametrize("group, size", [(1, 48), (2, 32), (3, 48)])
def test_levels_are_nested_in_what_was_removed(group, size):
    """Up: averages of the whole. Mid: pieces of the whole that up did not see. Down: tokens that mid did not see."""
    method = toy(group=group, img_size=size, num_mid=min(3, group**3))
    batch, grid = batch_of(group * size), (size // 16,) * 3
    (x1, m1), (x2, m2), (x3, m3) = calls_of(method, batch)
    torch.testing.assert_close(x1, F.interpolate(batch["image"], size=(size,) * 3, mode="area"))
    tokens = math.prod(grid)
    for mask, ratio in ((m2, 0.6), (m3, 0.5)):
        assert (mask.sum(1) == tokens - int(tokens * (1 - ratio))).all()

    all_ids = torch.arange(group**3).expand(2, -1)
    pieces = cut_blocks(batch["image"], (size,) * 3, all_ids).unflatten(0, (2, group**3))
    units = pool_units(m1.unsqueeze(-1), grid, group).squeeze(-1)  # (2, g^3), 1 = wholly removed
    for row, x in enumerate(x2):
        sample = row // method.num_mid
        found = [unit for unit in range(group**3) if torch.equal(pieces[sample, unit], x)]
        assert len(found) == 1
        assert group == 1 or units[sample, found[0]] == 1.0
    patches = cut_blocks(x2, (16,) * 3, torch.arange(tokens).expand(len(x2), -1)).unflatten(0, (len(x2), tokens))
    chosen = set()
    for row, x in enumerate(x3):
        parent = row // method.num_down
        grown = F.interpolate(patches[parent], size=(size,) * 3, mode="trilinear", align_corners=False)
        found = [token for token in range(tokens) if torch.allclose(grown[token], x)]
        assert len(found) == 1 and m2[parent, found[0]] == 1.0
        chosen.add((parent, found[0]))
    assert len(x2) == 2 * method.num_mid and len(chosen) == len(x3) == len(x2) * method.num_down


def test_average_is_the_authors_trilinear_resize_for_two():
    x = torch.rand(1, 1, 64, 64, 64)
    resized = F.interpolate(x, size=(32, 32, 32), mode="trilinear", align_corners=False)
    torch.testing.assert_close(F.avg_pool3d(x, 2), resized)


def test_counts_of_the_published_setting():
    with torch.device("meta"):
        method = mim_convvit3d_base_patch16()
    assert method.keep == {"up": 4, "mid": 86, "down": 108}
    assert (method.num_mid, method.num_down, method.group) == (4, 4, 2)


def test_reconstruction_is_the_mean_over_removed_tokens():
    method, batch = toy(align="none"), batch_of(64)
    levels = calls_of(method, batch)
    with torch.no_grad():
        losses = method(batch)
        for name, (x, mask) in zip(("rec_up", "rec_mid", "rec_down"), levels):
            order = mask.argsort(dim=1, stable=True)
            kept = int((mask[0] == 0).sum())
            feature = method.decoder(method.encoder(x, ids_keep=order[:, :kept]), order.argsort(dim=1))
            voxels = method.decoder.decoder_pred(feature)
            target = patchify(x, (16, 16, 16))
            target = (target - target.mean(-1, keepdim=True)) / (
                target.var(-1, keepdim=True, unbiased=True) + 1e-6
            ).sqrt()
            errors = (voxels - target).square().mean(-1)[mask == 1]
            torch.testing.assert_close(losses[name], errors.mean(), atol=1e-5, rtol=1e-4)


def test_draws_follow_the_key_alone():
    method = toy()
    batch = batch_of(64)
    swapped = {name: value.flip(0) for name, value in batch.items()}
    other = batch | {"key": batch["key"] + 1}
    with torch.no_grad():
        a, b, c, d = (method(x) for x in (batch, batch, swapped, other))
    for name in a:
        assert torch.equal(a[name], b[name])
        torch.testing.assert_close(a[name], c[name], atol=1e-5, rtol=1e-5)
    assert a["rec_mid"] != d["rec_mid"]


# ---------------------------------------------------------------- alignment


@pytest.mark.parametrize("align", ["cosine", "infonce"])
def test_children_meet_the_decoded_token_they_were_cut_from(align):
    """From the encoder's calls alone: find the place of each child in its parent and rebuild both alignment losses."""
    method, batch = toy(align=align, group=2), batch_of(64)
    (x1, m1), (x2, m2), (x3, m3) = calls_of(method, batch)

    def feature(x, mask):
        order = mask.argsort(dim=1, stable=True)
        kept = int((mask[0] == 0).sum())
        return method.decoder(method.encoder(x, ids_keep=order[:, :kept]), order.argsort(dim=1))

    def term(child, keys, label):
        cosines = F.cosine_similarity(child.unsqueeze(0), keys, dim=-1)
        return 2 - 2 * cosines[label] if align == "cosine" else F.cross_entropy(cosines / 0.2, torch.tensor(label))

    with torch.no_grad():
        losses, f1, f2, f3 = method(batch), feature(x1, m1), feature(x2, m2), feature(x3, m3)
        octants = f1.view(2, 2, 1, 2, 1, 2, 1, 24).mean(dim=(2, 4, 6)).view(2, 8, 24)
        pieces = cut_blocks(batch["image"], (32,) * 3, torch.arange(8).expand(2, -1)).unflatten(0, (2, 8))
        terms = []
        for row, x in enumerate(x2):
            label = next(u for u in range(8) if torch.equal(pieces[row // 3, u], x))
            terms.append(term(method.aggregate_mid(f2[row].mean(0)), octants[row // 3], label))
        torch.testing.assert_close(losses["align_up_mid"], torch.stack(terms).mean(), atol=1e-4, rtol=1e-4)
        patches = cut_blocks(x2, (16,) * 3, torch.arange(8).expand(6, -1)).unflatten(0, (6, 8))
        terms = []
        for row, x in enumerate(x3):
            grown = F.interpolate(patches[row // 2], size=(32,) * 3, mode="trilinear")
            label = next(t for t in range(8) if torch.allclose(grown[t], x))
            terms.append(term(method.aggregate_down(f3[row].mean(0)), f2[row // 2], label))
        torch.testing.assert_close(losses["align_mid_down"], torch.stack(terms).mean(), atol=1e-4, rtol=1e-4)


def test_published_alignment_against_its_loops():
    method, batch = toy(align="published"), batch_of(64)
    features = []
    handle = method.decoder.register_forward_hook(lambda module, args, out: features.append(out))
    with torch.no_grad():
        losses = method(batch)
        handle.remove()
        mid, down = features[1].mean(1), torch.cat(features[2:]).mean(1)
        projected, target, child = (
            method.aggregate_mid(mid),
            method.aggregate_pred_mid_feature(mid),
            method.aggregate_down(down),
        )
        up_mid = [cosine_distance(mid[i], projected[i * 3 + j]) for i in range(2) for j in range(3)]
        mid_down = [cosine_distance(target[i], child[i * 2 + j]) for i in range(6) for j in range(2)]
    torch.testing.assert_close(losses["align_up_mid"], torch.stack(up_mid).mean())
    torch.testing.assert_close(losses["align_mid_down"], torch.stack(mid_down).mean())


def test_parents_receive_no_gradient_from_alignment():
    method, batch = toy(align="cosine"), batch_of(64)
    method(batch, 0, 0)
    assert not any(value.requires_grad for value in method._carry.values())
    method(batch, 0, 1)["rec_mid"].backward()
    assert not any(value.requires_grad for value in method._carry.values())


# ---------------------------------------------------------------- settings


def test_level_schedules():
    for progress in (0.0, 0.3, 1.0):
        assert level_factors("concurrent", progress) == {"up": 1.0, "mid": 1.0, "down": 1.0}
        coarse, fine = level_factors("coarse_to_fine", progress), level_factors("fine_to_coarse", progress)
        assert (coarse["up"], coarse["down"]) == (fine["down"], fine["up"])
    assert level_factors("coarse_to_fine", 0.0) == {"up": 2.0, "mid": 1.0, "down": 0.0}
    assert level_factors("coarse_to_fine", 1.0) == pytest.approx({"up": 1.0, "mid": 1.0, "down": 1.0})
    with pytest.raises(ValueError, match="level_mode: found 'fast'"):
        level_factors("fast", 0.0)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(img_size=48, group=2), r"group 2 does not divide the token grid \(3, 3, 3\)"),
        (dict(num_mid=9), r"num_mid 9 must be in 1..8"),
        (dict(down_parts=7), r"down_parts 7 must be in 1..6"),
        (dict(mask_ratio_up=0.0), "mask_ratio_up 0.0 removes none of 8"),
        (dict(align="byol"), "align: found 'byol'"),
        (dict(img_size=48, group=3, half_down=True), r"half_down: found the token grid \(3, 3, 3\)"),
    ],
)
def test_what_cannot_work_is_refused_with_the_numbers(kwargs, words):
    with pytest.raises(ValueError, match=words):
        toy(**kwargs)


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 1, 48, 48, 48\), expected \(B, 1, 64, 64, 64\)"):
        toy()(batch_of(48))


# ---------------------------------------------------------------- names


def published_table(base=48, e=576):
    """Section 13 of the description: every name of the pretraining model with its shape, for any width of stage 1 and
    decoder.
    """
    widths = (1, base, 2 * base, 4 * base, 8 * base)
    c4 = widths[4]
    table = {"pos_embed": (1, 216, c4), "mask_token": (1, 1, e), "decoder_pos_embed": (1, 216, e)}

    def affine(name, *weight):
        table[f"{name}.weight"], table[f"{name}.bias"] = weight, weight[:1]

    def transformer(name, width):
        affine(f"{name}.norm1", width)
        affine(f"{name}.attn.qkv", 3 * width, width)
        affine(f"{name}.attn.proj", width, width)
        affine(f"{name}.norm2", width)
        affine(f"{name}.mlp.fc1", 4 * width, width)
        affine(f"{name}.mlp.fc2", width, 4 * width)

    for i in (1, 2, 3, 4):
        affine(f"patch_embed{i}.proj", widths[i], widths[i - 1], 2, 2, 2)
        affine(f"patch_embed{i}.norm", widths[i])
    affine("patch_embed5", c4, c4)
    for i, side in ((1, 8), (2, 4), (3, 2)):
        c = widths[i]
        affine(f"stage{i}_output_decode", c4, c, side, side, side)
        for j in (0, 1):
            block = f"blocks{i}.{j}"
            affine(f"{block}.norm1", c)
            affine(f"{block}.conv1", c, c, 1, 1, 1)
            affine(f"{block}.conv2", c, c, 1, 1, 1)
            affine(f"{block}.attn", c, 1, 5, 5, 5)
            affine(f"{block}.norm2", c)
            affine(f"{block}.mlp.fc1", 4 * c, c, 1, 1, 1)
            affine(f"{block}.mlp.fc2", c, 4 * c, 1, 1, 1)
    for j in range(11):
        transformer(f"blocks4.{j}", c4)
    affine("norm", c4)
    affine("decoder_embed", e, c4)
    for j in range(8):
        transformer(f"decoder_blocks.{j}", e)
    affine("decoder_norm", e)
    affine("decoder_pred", 4096, e)
    for head in ("mid", "down", "pred_up_feature", "pred_mid_feature"):
        for layer in ("fc1", "fc2"):
            affine(f"aggregate_{head}.{layer}", e, e)
    return table


def test_written_names_and_shapes_are_the_published_ones():
    table = published_table()
    assert len(table) == 363
    with torch.device("meta"):
        for align, count in (("published", 363), ("cosine", 355), ("none", 347)):
            method = mim_convvit3d_base_patch16(align=align)
            shapes = {name: tuple(value.shape) for name, value in method.checkpoint_state()["model"].items()}
            unused = {n for n in table if n.startswith("aggregate_") and n.split(".")[0] not in HEADS[align]}
            assert len(shapes) == count
            assert shapes == {name: shape for name, shape in table.items() if name not in unused}
    published = mim_convvit3d_tiny_patch16(align="published", decoder_embed_dim=24)
    assert published.checkpoint_state()["model"].keys() == table.keys()
    with torch.device("meta"):
        counts = mim_convvit3d_base_patch16(align="published").parameters()
        assert sum(p.numel() for p in counts) == 71_255_056


@pytest.mark.parametrize("base, width", [(12, 24), pytest.param(48, 576, marks=pytest.mark.slow)])
def test_a_published_file_loads_completely(tmp_path, capsys, base, width):
    state = {name: torch.randn(shape) * 0.02 for name, shape in published_table(base, width).items()}
    torch.save({"model": state, "epoch": 799, "args": argparse.Namespace(mask_ratio=0.6)}, tmp_path / "published.pth")
    sizes = dict(embed_dims=(base, 2 * base, 4 * base, 8 * base), num_heads=base // 4)
    method = mim_convvit3d_base_patch16(align="published", decoder_embed_dim=width, decoder_num_heads=4, **sizes)
    assert method.load_pretrained_checkpoint(tmp_path / "published.pth") == ([], [])
    assert len(method.load_report.matched) == 363
    assert torch.equal(method.encoder.blocks4[10].mlp.fc2.weight, state["blocks4.10.mlp.fc2.weight"])
    assert torch.equal(method.decoder.decoder_pos_embed, state["decoder_pos_embed"])
    encoder = ConvViT3D(pyramid=True, **sizes)
    missing, dropped = encoder.load_pretrained_checkpoint(tmp_path / "published.pth")
    assert "235 of 235 encoder tensors" in capsys.readouterr().out
    assert (len(encoder.load_report.matched), len(dropped)) == (235, 128)
    assert len(missing) == 51 and all(("gamma_" in n) or ("relative_" in n) or n.startswith("fpn.") for n in missing)


def test_a_checkpoint_round_trip_with_another_alignment(tmp_path):
    source = toy(align="published")
    torch.save(source.checkpoint_state(), tmp_path / "own.pth")
    twin = toy(seed=1, align="published")
    twin.load_checkpoint_state(torch.load(tmp_path / "own.pth", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), twin.state_dict().values()))
    missing, dropped = toy(seed=1, align="none").load_pretrained_checkpoint(tmp_path / "own.pth")
    assert missing == [] and len(dropped) == 16 and all(name.startswith("aggregate_") for name in dropped)
    with pytest.raises(ValueError, match="encoder tensors fit"):
        toy(embed_dims=(6, 6, 12, 48)).load_pretrained_checkpoint(tmp_path / "own.pth")
