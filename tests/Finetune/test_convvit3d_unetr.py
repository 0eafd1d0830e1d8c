"""MiM's segmentation network: published names, wiring, other input sizes, loading."""

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock
from torch import nn

from common.errors import InputError
from Finetune.models_convvit3d import convvit3d_tiny_patch16
from Finetune.models_unetr import ConvViT3DUNETR, convvit3d_unetr

SMALL = dict(feature_size=4, out_channels=3, depths=(1, 1, 1, 1))


def published_table(classes=14):
    """Return every published tensor of the segmentation network: name -> shape."""
    table = {"backbone.pos_embed": (1, 216, 384), "out.conv.conv.weight": (classes, 48, 1, 1, 1)}
    table["out.conv.conv.bias"] = (classes,)

    def affine(name, *weight):
        table[f"backbone.{name}.weight"], table[f"backbone.{name}.bias"] = weight, weight[:1]

    widths = (1, 48, 96, 192, 384)
    for i in (1, 2, 3, 4):
        affine(f"patch_embed{i}.proj", widths[i], widths[i - 1], 2, 2, 2)
        affine(f"patch_embed{i}.norm", widths[i])
    affine("patch_embed5", 384, 384)
    for i in (1, 2, 3):
        c = widths[i]
        for j in (0, 1):
            shapes = dict(norm1=(c,), conv1=(c, c, 1, 1, 1), conv2=(c, c, 1, 1, 1), attn=(c, 1, 5, 5, 5), norm2=(c,))
            shapes |= {"mlp.fc1": (4 * c, c, 1, 1, 1), "mlp.fc2": (c, 4 * c, 1, 1, 1)}
            for name, shape in shapes.items():
                affine(f"blocks{i}.{j}.{name}", *shape)
    for j in range(11):
        shapes = {"norm1": (384,), "attn.qkv": (1152, 384), "attn.proj": (384, 384), "norm2": (384,)}
        shapes |= {"mlp.fc1": (1536, 384), "mlp.fc2": (384, 1536)}
        for name, shape in shapes.items():
            affine(f"blocks4.{j}.{name}", *shape)
        block = f"backbone.blocks4.{j}"
        table |= {f"{block}.gamma_1": (384,), f"{block}.gamma_2": (384,)}
        table[f"{block}.attn.relative_position_bias_table"] = (1331, 12)
        table[f"{block}.attn.relative_position_index"] = (216, 216)
    affine("fpn.0", 768, 384, 2, 2, 2)
    affine("fpn.1", 768)
    table |= {"backbone.fpn.1.running_mean": (768,), "backbone.fpn.1.running_var": (768,)}
    table["backbone.fpn.1.num_batches_tracked"] = ()

    for name, width, below in (("1", 48, 1), ("2", 48, 48), ("3", 96, 96), ("4", 192, 192), ("10", 768, 768)):
        table[f"encoder{name}.layer.conv1.conv.weight"] = (width, below, 3, 3, 3)
        table[f"encoder{name}.layer.conv2.conv.weight"] = (width, width, 3, 3, 3)
    table["encoder1.layer.conv3.conv.weight"] = (48, 1, 1, 1, 1)
    for level, below, width in ((5, 768, 384), (4, 384, 192), (3, 192, 96), (2, 96, 48), (1, 48, 48)):
        table[f"decoder{level}.transp_conv.conv.weight"] = (below, width, 2, 2, 2)
        table[f"decoder{level}.conv_block.conv1.conv.weight"] = (width, 2 * width, 3, 3, 3)
        table[f"decoder{level}.conv_block.conv2.conv.weight"] = (width, width, 3, 3, 3)
        table[f"decoder{level}.conv_block.conv3.conv.weight"] = (width, 2 * width, 1, 1, 1)
    return table


def test_names_and_shapes_are_as_published():
    table = published_table()
    with torch.device("meta"):
        model = convvit3d_unetr()
    assert len(table) == 319
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == table
    assert model.state_dict()["backbone.blocks4.0.attn.relative_position_index"].dtype == torch.int64
    assert sum(p.numel() for p in model.parameters()) == 78_257_354
    assert sum(p.numel() for p in model.backbone.parameters()) == 24_132_060


def test_names_with_synchronised_and_with_instance_norm():
    with torch.device("meta"):
        plain, instance = convvit3d_unetr(64, **SMALL), convvit3d_unetr(64, stride32_norm="instance", **SMALL)
        names = set(plain.state_dict())
        assert set(nn.SyncBatchNorm.convert_sync_batchnorm(plain).state_dict()) == names
    statistics = {f"backbone.fpn.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert names - set(instance.state_dict()) == statistics


def test_the_wiring_against_its_equations():
    model = convvit3d_unetr(64, **SMALL).eval()
    x = torch.rand(1, 1, 64, 64, 64)

    def res(block, x):
        y = block.conv2(F.leaky_relu(F.instance_norm(block.conv1(x)), 0.01))
        skip = F.instance_norm(block.conv3(x)) if hasattr(block, "conv3") else x
        return F.leaky_relu(F.instance_norm(y) + skip, 0.01)

    def up(block, x, skip):
        return res(block.conv_block, torch.cat([block.transp_conv(x), skip], dim=1))

    with torch.no_grad():
        _, (h0, h1, h2, h3, h4) = model.backbone(x, return_layers=(0, 1, 2, 3, 4))
        y = up(model.decoder5, res(model.encoder10.layer, h4), h3)
        y = up(model.decoder4, y, res(model.encoder4.layer, h2))
        y = up(model.decoder3, y, res(model.encoder3.layer, h1))
        y = up(model.decoder2, y, res(model.encoder2.layer, h0))
        y = up(model.decoder1, y, res(model.encoder1.layer, x))
        torch.testing.assert_close(model(x), model.out(y), atol=1e-4, rtol=1e-4)


def test_the_blocks_are_monais_with_plain_instance_norm():
    model = convvit3d_unetr(32, **SMALL)
    kinds = {name: type(module) for name, module in model.named_children() if name not in ("backbone", "out")}
    assert all(kind is (UnetrBasicBlock if "encoder" in name else UnetrUpBlock) for name, kind in kinds.items())
    norms = [m for name in kinds for m in model.get_submodule(name).modules() if isinstance(m, nn.InstanceNorm3d)]
    assert norms and not any(m.affine for m in norms)


@pytest.mark.parametrize("size, chans", [((64, 64, 32), 1), ((32, 64, 96), 4)])
def test_any_multiple_of_32_is_an_input_size(size, chans):
    model = convvit3d_unetr(size, chans, **SMALL)
    x = torch.rand(2, chans, *size)
    out = model(x)
    assert out.shape == (2, 3, *size)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    # another size than img_size
    with torch.no_grad():
        assert model.eval()(torch.rand(1, chans, 64, 32, 64)).shape == (1, 3, 64, 32, 64)


def test_pretrained_weights_reach_the_backbone(tmp_path, capsys):
    torch.manual_seed(1)
    pretrained = convvit3d_tiny_patch16(img_size=32)
    torch.save({"model": pretrained.state_dict()}, tmp_path / "mim.pth")
    model = convvit3d_unetr(64, feature_size=12)
    missing, _ = model.backbone.load_pretrained_checkpoint(tmp_path / "mim.pth")
    assert "235 of 235 encoder tensors" in capsys.readouterr().out
    assert len(missing) == 51 and model.backbone.load_report.resampled == ["pos_embed"]
    assert torch.equal(model.backbone.blocks4[3].mlp.fc1.weight, pretrained.blocks4[3].mlp.fc1.weight)


def test_a_fine_tuned_network_initialises_another_one(tmp_path):
    model = convvit3d_unetr(32, **SMALL)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tuned.pth")
    twin = convvit3d_unetr(32, feature_size=4, out_channels=5, depths=(1, 1, 1, 1))
    missing, _ = twin.backbone.load_pretrained_checkpoint(tmp_path / "tuned.pth")
    assert missing == []
    assert all(torch.equal(v, model.backbone.state_dict()[k]) for k, v in twin.backbone.state_dict().items())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: convvit3d_unetr(48), "roi 48 48 48.*multiples of 32"),
        (lambda: convvit3d_unetr(feature_size=10), "feature_size 10.*multiple of 4"),
    ],
)
def test_impossible_sizes_are_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_widths_need_not_double():
    backbone = convvit3d_tiny_patch16(img_size=32, pyramid=True, embed_dims=(4, 6, 10, 12), stride32_norm="instance")
    assert ConvViT3DUNETR(backbone.eval(), 2)(torch.rand(1, 1, 64, 32, 32)).shape == (1, 2, 64, 32, 32)
