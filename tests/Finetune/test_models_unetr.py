"""UNETR's head against MONAI's UNETR, and what it does for other patches, grids and depths."""

import pytest
import torch
from monai.networks.nets import UNETR as MonaiUNETR

from common.errors import InputError
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_unetr import UNETR, LinearProbe, default_skips, to_volume


def small_vit(**kwargs):
    defaults = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 12, "num_heads": 2, "class_token": False}
    return VisionTransformer3D(**(defaults | kwargs))


def test_equals_monai_unetr_after_renaming():
    torch.manual_seed(0)
    size = (48, 32, 32)
    reference = MonaiUNETR(
        in_channels=2,
        out_channels=5,
        img_size=size,
        feature_size=4,
        hidden_size=24,
        mlp_dim=96,
        num_heads=2,
        proj_type="perceptron",
        norm_name="instance",
        qkv_bias=True,
    ).eval()
    ours = UNETR(small_vit(img_size=size, in_chans=2), in_chans=2, out_channels=5, feature_size=4).eval()
    state = {}
    for name, value in reference.state_dict().items():
        if "norm_cross_attn" in name:
            continue  # MONAI builds it and never uses it
        if not name.startswith("vit."):
            state[name] = value
            continue
        name = name.replace("vit.", "backbone.").replace("mlp.linear", "mlp.fc").replace("attn.out_proj", "attn.proj")
        name = name.replace("patch_embedding.position_embeddings", "pos_embed").replace(
            "patch_embedding.patch_embeddings.1", "patch_embed.proj"
        )
        if (
            name == "backbone.patch_embed.proj.weight"
        ):  # a linear on 'b c (h p1) (w p2) (d p3) -> b (h w d) (p1 p2 p3 c)'
            value = value.reshape(24, 16, 16, 16, 2).permute(0, 4, 1, 2, 3)
        state[name] = value
    ours.load_state_dict(state)
    for module in ours.backbone.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5  # MONAI's; ours and the authors' is 1e-6
    x = torch.randn(1, 2, *size)
    with torch.no_grad():
        expected, found = reference(x), ours(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("patch, levels", [(8, 3), (16, 4)])
def test_levels_follow_the_patch_and_every_parameter_gets_a_gradient(patch, levels):
    backbone = small_vit(img_size=32, patch_size=patch, depth=4)
    model = UNETR(backbone, in_chans=1, out_channels=3, feature_size=4)
    logits = model(torch.randn(1, 1, 32, 32, 64 if patch == 16 else 40))  # not the size the table was made for
    assert logits.shape[1:] == (3, 32, 32, 64 if patch == 16 else 40)
    assert sum(name.startswith("decoder") and "." not in name for name, _ in model.named_modules()) == levels
    logits.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # DDP with find_unused_parameters=False would die on them


def test_skips_of_the_authors_and_bad_ones():
    assert default_skips(12, (16, 16, 16)) == (3, 6, 9)
    assert default_skips(12, (8, 8, 8)) == (4, 8)
    for skips in ((3, 6), (6, 3, 9), (3, 6, 12)):
        with pytest.raises(InputError, match="skips"):
            UNETR(small_vit(), 1, 2, skips=skips)
    with pytest.raises(InputError, match="patch_size"):
        UNETR(small_vit(img_size=36, patch_size=12), 1, 2)


def test_tokens_return_to_their_place_with_and_without_cls():
    grid = (2, 3, 4)
    index = torch.arange(24.0).reshape(1, 24, 1)
    assert torch.equal(to_volume(index, grid)[0, 0], torch.arange(24.0).reshape(grid))
    assert torch.equal(to_volume(torch.cat([-torch.ones(1, 1, 1), index], dim=1), grid), to_volume(index, grid))


def test_linear_probe_sees_nothing_but_its_patch_tokens():
    probe = LinearProbe(small_vit(depth=2), out_channels=3)
    assert sum(p.numel() for p in probe.head.parameters()) == 24 * 3 + 3
    assert probe(torch.randn(2, 1, 32, 32, 32)).shape == (2, 3, 32, 32, 32)
