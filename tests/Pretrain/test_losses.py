"""Patches and losses against loops and torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F

from Pretrain.losses import (
    align_cosine,
    align_infonce,
    collapse_monitors,
    cosine_pairs,
    entropy_of_mean,
    masked_mse,
    norm_pix,
    patchify,
    undo_norm_pix,
    unpatchify,
)


def test_patchify_is_the_plain_loop_and_unpatchify_its_inverse():
    x = torch.rand(2, 3, 4, 6, 8)
    patches = patchify(x, (2, 3, 4))
    assert patches.shape == (2, 8, 72)
    n = 0
    for d in range(0, 4, 2):
        for h in range(0, 6, 3):
            for w in range(0, 8, 4):
                block = x[:, :, d : d + 2, h : h + 3, w : w + 4]
                assert torch.equal(patches[:, n], block.permute(0, 2, 3, 4, 1).flatten(1))
                n += 1
    assert torch.equal(unpatchify(patches, (2, 3, 4), (2, 2, 2)), x)


def test_patchify_has_the_order_of_the_patch_embedding():
    """A convolution with kernel = stride equals a matrix product on the patches, channel by channel."""
    x, conv = torch.rand(1, 1, 8, 8, 8), torch.nn.Conv3d(1, 5, 4, 4)
    torch.testing.assert_close(
        patchify(x, (4, 4, 4)) @ conv.weight.flatten(1).T + conv.bias, conv(x).flatten(2).transpose(1, 2)
    )


def test_norm_pix_has_unit_unbiased_variance_and_silences_air():
    patches = torch.cat([torch.rand(1, 5, 64) * 3 + 1, torch.zeros(1, 1, 64)], 1)
    normed = norm_pix(patches)
    torch.testing.assert_close(normed[:, :5].var(-1, unbiased=True), torch.ones(1, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(normed[:, :5].mean(-1), torch.zeros(1, 5), atol=1e-6, rtol=0)
    assert normed[:, 5].abs().max() == 0 and norm_pix(patches.bfloat16()).dtype == torch.float32


def test_epsilon_silences_noise_and_is_undone():
    """A patch of variance v is scaled to variance v / (v + eps)."""
    patches = torch.randn(1, 2, 512) * torch.tensor([1e-2, 1.0]).view(1, 2, 1) + 0.3
    variance = patches.var(-1)
    for eps in (1e-6, 1e-4, 1e-2):
        normed = norm_pix(patches, eps)
        torch.testing.assert_close(normed.var(-1), variance / (variance + eps))
        torch.testing.assert_close(undo_norm_pix(normed, patches, eps), patches)


def test_masked_mse_is_the_mean_over_removed_patches():
    prediction, target = torch.rand(2, 4, 3), torch.rand(2, 4, 3)
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]])
    removed = [(0, 0), (0, 3), (1, 1), (1, 2)]
    expected = sum(F.mse_loss(prediction[b, n], target[b, n]) for b, n in removed) / 4
    torch.testing.assert_close(masked_mse(prediction, target, mask), expected)


def test_masked_mse_of_rows_with_equal_counts_is_unweighted():
    prediction, target = torch.rand(7, 30, 3), torch.rand(7, 30, 3)
    mask = (torch.rand(7, 30).argsort(dim=1) < 11).float()
    error = (prediction - target).square().mean(dim=-1)
    assert torch.equal(masked_mse(prediction, target, mask), (error * mask).sum() / mask.sum())


def test_masked_mse_is_the_mean_over_micro_batches():
    """Whatever the number of removed patches in a row; a row without any counts as 0."""
    prediction, target = torch.rand(4, 5, 3, requires_grad=True), torch.rand(4, 5, 3)
    mask = torch.tensor([[1.0, 0, 0, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    loss = masked_mse(prediction, target, mask)
    for count in (1, 2):
        parts = [masked_mse(*rows) for rows in zip(*(t.split(count) for t in (prediction, target, mask)))]
        torch.testing.assert_close(torch.stack(parts).mean(), loss)
    loss.backward()
    assert prediction.grad.isfinite().all() and torch.equal(prediction.grad.abs().sum(dim=-1) > 0, mask > 0)


def test_masked_mse_without_any_removed_patch_is_zero():
    prediction = torch.rand(2, 4, 3, requires_grad=True)
    loss = masked_mse(prediction, torch.rand(2, 4, 3), torch.zeros(2, 4))
    loss.backward()
    assert loss == 0 and prediction.grad.abs().max() == 0


def test_cosine_pairs():
    a = F.normalize(torch.randn(2, 3, 8), dim=-1)
    matrix = cosine_pairs(a, torch.cat([a, -a]))
    torch.testing.assert_close(matrix.diagonal(), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix[:, 2:].diagonal(), torch.full((2,), 4.0))


def test_monitors_tell_the_two_collapses_apart():
    k = 32
    uniform = torch.full((2, 8, k), 1 / k)
    flat = collapse_monitors(uniform, uniform.log())
    assert abs(flat["entropy"] - 1) < 1e-5 and abs(flat["kl"]) < 1e-5
    one = F.one_hot(torch.zeros(2, 8, dtype=torch.long), k).float()
    assert entropy_of_mean(one.mean(dim=(0, 1))) < 1e-5
    spread = F.one_hot(torch.arange(16).reshape(2, 8), k).float()
    healthy = collapse_monitors(spread, uniform.log())
    assert healthy["entropy"] < 1e-5
    assert abs(entropy_of_mean(spread.mean(dim=(0, 1))) - math.log(16) / math.log(k)) < 1e-5


def test_cosine_alignment_is_with_the_own_place_and_no_other():
    child, keys, labels = torch.randn(4, 8), torch.randn(4, 5, 8, requires_grad=True), torch.tensor([2, 0, 4, 2])
    align_cosine(child, keys, labels).backward()
    touched = keys.grad.abs().sum(-1) > 0
    assert torch.equal(touched, F.one_hot(labels, 5).bool())
    keys = keys.detach()
    own = keys[torch.arange(4), labels]
    assert align_cosine(3 * own, keys, labels) == pytest.approx(0, abs=1e-5)
    assert align_cosine(-own, keys, labels) == pytest.approx(4, abs=1e-5)


def test_infonce_against_a_loop():
    child, keys, labels = torch.randn(4, 8), torch.randn(4, 5, 8), torch.tensor([2, 0, 4, 2])
    total = 0.0
    for q, ks, label in zip(child, keys, labels):
        logits = [float(q @ k / q.norm() / k.norm()) / 0.1 for k in ks]
        total += math.log(sum(math.exp(v) for v in logits)) - logits[label]
    assert align_infonce(child, keys, labels, 0.1).item() == pytest.approx(total / 4, rel=1e-4)
