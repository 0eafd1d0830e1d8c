"""The reference forms of the benchmarks compute what MAE and GL-MAE do: losses and gradients."""

import torch

from benchmarks.glmae_reference import ReferenceGLMAE
from benchmarks.mae_reference import MonaiMAE
from benchmarks.vit import step
from Finetune.models_3dvit import VisionTransformer3D
from Pretrain.models_glmae import GLMAE
from Pretrain.models_mae import MAE


def small_vit():
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2)
    return VisionTransformer3D(**sizes, encoder_only=False, decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=2)


def make_batch():
    return {"global": torch.rand(2, 2, 1, 24, 24, 24), "local": torch.rand(2, 3, 1, 16, 16, 16), "key": torch.arange(2)}


def test_glmae_equals_timms_blocks():
    """Also: gradients of a backward pass per kind of view are those of one for all."""
    ours, batch = GLMAE(small_vit(), hidden_dim=32, bottleneck_dim=8, out_dim=16), make_batch()
    theirs = ReferenceGLMAE(ours)
    losses, expected = step(ours, batch), theirs(batch)
    sum(expected.values()).backward()
    assert set(losses) == set(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss.detach())
    found = dict(ours.student.named_parameters())
    for name, parameter in theirs.student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_mae_equals_monai():
    ours, batch = MAE(small_vit(), mask_ratio=0.75), make_batch()
    theirs = MonaiMAE(ours)
    loss = theirs(batch)
    loss.backward()
    torch.testing.assert_close(step(ours, batch)["rec_local"], loss.detach())
    for mine, other in (("patch_embed.proj", "patch_embedding.patch_embeddings"), ("decoder_pred", "decoder_pred")):
        found, expected = ours.encoder.get_submodule(mine).weight.grad, theirs.net.get_submodule(other).weight.grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
