"""UNETR against MONAI's, with other patches, grids and depths; the linear probe against its definition."""

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
        # MONAI builds this norm and never uses it
        if "norm_cross_attn" in name:
            continue
        if not name.startswith("vit."):
            state[name] = value
            continue
        name = name.replace("vit.", "backbone.").replace("mlp.linear", "mlp.fc").replace("attn.out_proj", "attn.proj")
        name = name.replace("patch_embedding.position_embeddings", "pos_embed").replace(
            "patch_embedding.patch_embeddings.1", "patch_embed.proj"
        )
        # a linear layer on 'b c (h p1) (w p2) (d p3) -> b (h w d) (p1 p2 p3 c)'
        if name == "backbone.patch_embed.proj.weight":
            value = value.reshape(24, 16, 16, 16, 2).permute(0, 4, 1, 2, 3)
        state[name] = value
    ours.load_state_dict(state)
    for module in ours.backbone.modules():
        if isinstance(module, torch.nn.LayerNorm):
            # MONAI's; that of the authors and of this repository is 1e-6
            module.eps = 1e-5
    x = torch.randn(1, 2, *size)
    with torch.no_grad():
        expected, found = reference(x), ours(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("patch, levels", [(8, 3), (16, 4)])
def test_levels_follow_the_patch_and_all_parameters_train(patch, levels):
    backbone = small_vit(img_size=32, patch_size=patch, depth=4)
    model = UNETR(backbone, in_chans=1, out_channels=3, feature_size=4)
    # another size than img_size
    logits = model(torch.randn(1, 1, 32, 32, 64 if patch == 16 else 40))
    assert logits.shape[1:] == (3, 32, 32, 64 if patch == 16 else 40)
    assert sum(name.startswith("decoder") and "." not in name for name, _ in model.named_modules()) == levels
    logits.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # DDP with find_unused_parameters=False would fail on them
    assert without == []


def test_default_skips_and_impossible_ones():
    assert default_skips(12, (16, 16, 16)) == (3, 6, 9)
    assert default_skips(12, (8, 8, 8)) == (4, 8)
    for skips in ((3, 6), (6, 3, 9), (3, 6, 12)):
        with pytest.raises(InputError, match="skips"):
            UNETR(small_vit(), 1, 2, skips=skips)
    with pytest.raises(InputError, match="patch_size"):
        UNETR(small_vit(img_size=36, patch_size=12), 1, 2)


def test_tokens_return_to_their_place_without_the_cls_row():
    grid = (2, 3, 4)
    index = torch.arange(24.0).reshape(1, 24, 1)
    assert torch.equal(to_volume(index, grid)[0, 0], torch.arange(24.0).reshape(grid))
    assert torch.equal(to_volume(torch.cat([-torch.ones(1, 1, 1), index], dim=1), grid), to_volume(index, grid))


@pytest.mark.parametrize("class_token", [False, True])
def test_linear_probe_is_a_linear_map_of_its_patch_tokens(class_token):
    probe = LinearProbe(small_vit(depth=2, class_token=class_token), out_channels=3)
    x = torch.randn(2, 1, 32, 32, 48)
    tokens = probe.backbone(x, return_features=True)["patch_features"]
    logits = tokens @ probe.head.weight.flatten(1).T + probe.head.bias
    maps = logits.transpose(1, 2).reshape(2, 3, 2, 2, 3)
    expected = torch.nn.functional.interpolate(maps, size=(32, 32, 48), mode="trilinear", align_corners=False)
    torch.testing.assert_close(probe(x), expected)
    assert sum(p.numel() for p in probe.head.parameters()) == 24 * 3 + 3


class FixedTokens(torch.nn.Module):
    """Encoder whose patch tokens do not depend on the image, while all else that it returns does."""

    patch_size, embed_dim, blocks = (16, 16, 16), 24, [None] * 2

    def forward(self, x, return_layers=(), return_features=False):
        patches, other = torch.arange(2 * 8 * 24.0).reshape(2, 8, 24).sin(), x.mean().expand(2, 1, 24)
        everything = torch.cat([other, patches], dim=1)
        if return_features:
            return {"cls_token": other[:, 0], "patch_features": patches, "all_features": everything}
        return everything, [everything + other for _ in return_layers]

    def patch_features(self, x):
        return self(x, return_features=True)["patch_features"]


def test_linear_probe_sees_neither_image_nor_cls_nor_hidden():
    """The image enters through the patch tokens only: with these fixed, any image has the same logits."""
    probe = LinearProbe(FixedTokens(), out_channels=3)
    one, other = torch.zeros(2, 1, 32, 32, 32), torch.randn(2, 1, 32, 32, 32)
    assert torch.equal(probe(one), probe(other))
