"""What MAE and GL-MAE share: which patches are decoded, and the cheaper decoder with cross-attention."""

import pytest
import torch

from Finetune.models_3dvit import VisionTransformer3D
from Pretrain.losses import masked_mse, norm_pix, patchify
from Pretrain.models_glmae import GLMAE
from Pretrain.models_mae import MAE, complete_reconstruction, encode_visible, reconstruct


def small_vit(decoder="cross"):
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2, decoder=decoder)
    return VisionTransformer3D(**sizes, encoder_only=False, decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=2)


def batch(volumes=2, q=2):
    rng = torch.Generator().manual_seed(1)
    return {"local": torch.rand(volumes, q, 1, 16, 16, 16, generator=rng), "key": torch.arange(volumes) + 5}


def masked(vit, keys=(3, 4)):
    x = torch.rand(len(keys), 1, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    return x, encode_visible(vit, x, torch.tensor(keys), 0.6)


def test_each_patch_is_decoded_by_itself():
    """With cross-attention a prediction does not depend on which other patches are decoded; with self-attention it
    does."""
    for decoder, independent in (("cross", True), ("self", False)):
        vit = small_vit(decoder)
        x, visible = masked(vit)
        everything = vit.forward_decoder(visible.tokens, visible.ids_keep, visible.ids_removed)
        some = vit.forward_decoder(visible.tokens, visible.ids_keep, visible.ids_removed[:, :5])
        assert torch.allclose(some, everything[:, :5], atol=1e-5) == independent


def test_decoded_patches_are_a_random_part_of_the_removed_ones():
    """A function of the key alone, and every removed patch has its turn."""
    vit = small_vit()
    _, visible = masked(vit, keys=range(400))
    _, again = masked(vit, keys=range(200, 400))
    decoded = visible.ids_removed[:, :10]
    assert torch.equal(decoded[200:], again.ids_removed[:, :10])
    assert visible.mask.gather(1, decoded).all()
    counts = torch.bincount(decoded.flatten(), minlength=64).float()
    # 400 views x 10 of 64 patches; the standard deviation is about 7
    assert counts.min() > 30 and counts.max() < 95


@pytest.mark.parametrize("fraction, decoded", [(1.0, 39), (0.25, 10), (0.01, 1), (10 / 39, 10)])
def test_loss_of_a_fraction_is_that_of_its_patches(fraction, decoded):
    vit = small_vit()
    x, visible = masked(vit)
    loss, prediction = reconstruct(vit, x, visible, True, decode_fraction=fraction)
    assert prediction.shape == (2, decoded, 64)
    mask = torch.zeros(2, 64).scatter(1, visible.ids_removed[:, :decoded], 1.0)
    made = complete_reconstruction(vit, x, visible)
    torch.testing.assert_close(loss, masked_mse(made.prediction, norm_pix(patchify(x, vit.patch_size)), mask))


def test_all_patches_are_decoded_in_evaluation():
    vit = small_vit()
    some, everything = MAE(vit, 0.6, decode_fraction=0.25), MAE(vit, 0.6)
    assert not torch.equal(some(batch())["rec_local"], everything(batch())["rec_local"])
    assert torch.equal(some.eval()(batch())["rec_local"], everything(batch())["rec_local"])
    made = some.reconstructions(batch())["local"]
    assert (made.prediction.abs().sum(-1) > 0).equal(made.mask > 0)


def test_every_parameter_of_the_cross_decoder_gets_a_gradient():
    method = MAE(small_vit(), 0.6, decode_fraction=0.25)
    method(batch())["rec_local"].backward()
    assert not [n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_nothing_removed_has_a_loss_of_0():
    for decoder in ("self", "cross"):
        method = MAE(small_vit(decoder), mask_ratio=0.0)
        loss = method(batch())["rec_local"]
        loss.backward()
        assert loss == 0.0


@pytest.mark.parametrize("method", [MAE, GLMAE])
def test_a_fraction_needs_the_cross_decoder(method):
    with pytest.raises(ValueError, match="decode_fraction 0.5: must be 1 unless the decoder is `cross`"):
        method(small_vit("self"), decode_fraction=0.5)
    with pytest.raises(ValueError, match="decode_fraction 0.0"):
        method(small_vit(), decode_fraction=0.0)
