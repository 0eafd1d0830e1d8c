"""The measures of features and reconstructions on tensors whose answer is known."""

import math

import pytest
import torch

from common.training.method import Reconstruction
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_convvit3d import ConvViT3D
from Pretrain import measures
from Pretrain.losses import norm_pix, patchify

PATCH = (8, 8, 8)


def test_psnr_is_that_of_the_definition():
    a, b = torch.rand(1000), torch.rand(1000)
    mse = (a - b).square().mean()
    assert float(measures.psnr(mse)) == pytest.approx(10 * math.log10(1 / float(mse)))


def test_participation_ratio_counts_equal_directions():
    basis = torch.linalg.qr(torch.randn(64, 4))[0].T
    assert float(measures.participation_ratio(torch.randn(4000, 4) @ basis + 3)) == pytest.approx(4, rel=0.01)
    # the corners of a simplex, fewer rows than columns
    assert float(measures.participation_ratio(torch.eye(5, 64) * 2 + 3)) == pytest.approx(4, rel=1e-4)


def test_participation_ratio_of_a_known_covariance():
    values = torch.tensor([9.0, 4.0, 1.0, 1.0])
    x = torch.randn(200_000, 4) * values.sqrt()
    assert float(measures.participation_ratio(x)) == pytest.approx(15**2 / (81 + 16 + 1 + 1), rel=0.02)


@pytest.mark.parametrize("parts", [(3.0, 1.0, 1.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.5, 2.0, 0.1)])
def test_shares_of_variance_are_those_of_the_parts(parts):
    views, patches, width = 40, 50, 200
    position, volume, content = (value**0.5 for value in parts)
    x = position * torch.randn(1, patches, width) + volume * torch.randn(views, 1, width) + 2
    found = measures.feature_measures(x + content * torch.randn(views, patches, width))
    names = ("constant", "position", "volume", "content")
    for name, value in zip(names, (4.0, *parts)):
        assert float(found[name]) == pytest.approx(value / (4 + sum(parts)), abs=0.02)
    assert float(found["power"]) == pytest.approx(4 + sum(parts), rel=0.05)
    assert float(sum(found[name] for name in names)) == pytest.approx(1)


def test_shares_of_few_views_are_unbiased():
    """Noise of two views is not taken for a dependence on the position, which its mean over views would be."""
    found = [measures.feature_measures(torch.randn(2, 200, 100)) for _ in range(5)]
    assert all(float(f["content"]) > 0.95 for f in found)


def views(count=6, size=16):
    return torch.rand(count, 1, size, size, size)


def reconstruction(view, prediction):
    mask = (torch.rand(prediction.shape[:2]) < 0.5).float()
    return Reconstruction(view, mask, prediction)


@pytest.mark.parametrize("eps", [None, 1e-6, 1e-2])
def test_psnr_of_a_known_error(eps):
    """A prediction that is off by 0.1 has 20 dB, whatever the normalisation of the targets."""
    view = views()
    patches = patchify(view, PATCH)
    wrong = patches + 0.1 * torch.randn_like(patches).sign()
    if eps is not None:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        wrong = (wrong - mean) / (variance + eps).sqrt()
    found = measures.reconstruction_measures(reconstruction(view, wrong), PATCH, eps)
    assert float(found["psnr"]) == pytest.approx(20, abs=1e-3)
    # uniform voxels have a variance of 1/12
    assert float(found["over_mean"]) == pytest.approx(20 + 10 * math.log10(1 / 12), abs=0.1)
    assert float(found["over_position"]) > 5


def test_baselines_are_0_dB_for_what_they_predict():
    view = views()
    patches = patchify(view, PATCH)
    mean = patches.mean(-1, keepdim=True).expand_as(patches)
    assert abs(float(measures.reconstruction_measures(reconstruction(view, mean), PATCH, None)["over_mean"])) < 1e-3
    zero = torch.zeros_like(patches)
    assert abs(float(measures.reconstruction_measures(reconstruction(view, zero), PATCH, 1e-6)["over_mean"])) < 1e-3
    by_position = torch.rand(1, *patches.shape[1:]).expand_as(patches)
    for eps in (None, 1e-6):
        found = measures.reconstruction_measures(reconstruction(view, by_position), PATCH, eps)
        assert abs(float(found["over_position"])) < 1e-3


def test_perfect_predictions_are_above_both_baselines():
    view = views()
    target = norm_pix(patchify(view, PATCH)) + 0.01 * torch.randn(6, 8, 512)
    found = measures.reconstruction_measures(reconstruction(view, target), PATCH, 1e-6)
    assert float(found["over_mean"]) == pytest.approx(40, abs=0.5) and float(found["over_position"]) > 40


def vit():
    return VisionTransformer3D(
        img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=2, encoder_only=False, decoder_embed_dim=24,
        decoder_depth=2, decoder_num_heads=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "make, size", [(vit, 16), (lambda: ConvViT3D(32, embed_dims=(6, 6, 12, 24), depths=(1, 1, 1, 3), num_heads=2), 32)]
)
def test_every_block_is_measured(make, size):
    encoder = make().eval()
    with torch.no_grad():
        found = measures.encoder_measures(encoder, views(10, size))
    stages = ["patches", "embed", "block00", "block01", "block02", "norm"]
    assert list(dict.fromkeys(name.split("/")[0] for name in found)) == [*stages, "growth"]
    assert found["growth"] == found["block02/power"] / found["embed/power"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


def test_hidden_states_are_those_of_the_encoder():
    encoder, x = vit().eval(), views(4)
    with torch.no_grad(), measures.captured(encoder) as found:
        tokens, hidden = encoder(x, return_layers=(0, 1, 2))
    assert all(torch.equal(found[f"block0{i}"][0], hidden[i]) for i in range(3)) and torch.equal(
        found["norm"][0], tokens
    )
