"""Weights under another library's names give the same outputs there, and come back the same."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import UNETR, MaskedAutoEncoderViT, ViT
from safetensors.torch import load_file

from common.data.preprocessing import Preprocessing
from common.data.volume_io import read_image
from common.errors import InputError
from Finetune import export
from Finetune.converters import (
    NotConvertible,
    from_monai_mae,
    from_monai_unetr,
    from_monai_vit,
    from_nnssl,
    from_plain_mae,
    match_norm_eps,
    to_monai_mae,
    to_monai_unetr,
    to_monai_vit,
    to_nnssl,
)
from Finetune.encoder3d import take
from Finetune.models_3dvit import VisionTransformer3D

OURS = dict(img_size=(16, 16, 32), patch_size=8, embed_dim=24, depth=3, num_heads=2)
MONAI = dict(in_channels=1, img_size=(16, 16, 32), hidden_size=24, mlp_dim=96, num_heads=2, qkv_bias=True)
DEEP = OURS | dict(img_size=(16, 16, 32), patch_size=16, depth=12)
DECODER = dict(encoder_only=False, decoder_embed_dim=12, decoder_depth=2, decoder_num_heads=3)
MONAI_DECODER = dict(decoder_hidden_size=12, decoder_mlp_dim=48, decoder_num_layers=2, decoder_num_heads=3)
# another order of sums: a few times the rounding of float32, for features of size 1 to 10
CLOSE = dict(atol=3e-5, rtol=1e-5)


def changed(model):
    """Return the model with all its tensors moved away from their initial values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(0.2 * torch.randn_like(value))
    return model.eval()


@pytest.fixture
def x():
    return torch.rand(2, 1, 16, 16, 32, generator=torch.Generator().manual_seed(2))


def ours(class_token=True, **kwargs):
    return changed(VisionTransformer3D(**(OURS | kwargs), class_token=class_token))


def autoencoder():
    model = ours(**DECODER)
    # fixed at zero in this repository and in MAE
    model.decoder_pos_embed.data[:, :1] = 0
    return model


def monai_vit(**kwargs):
    settings = MONAI | dict(patch_size=8, num_layers=3, pos_embed_type="learnable") | kwargs
    return match_norm_eps(changed(ViT(**settings)))


# ---------------------------------------------------------------- MONAI ViT


def test_a_monai_vit_computes_what_ours_does(x):
    model, other = ours(class_token=False), monai_vit()
    other.load_state_dict(to_monai_vit(model.state_dict()))
    tokens, hidden = model(x, return_layers=(0, 1, 2))
    found, all_hidden = other(x)
    torch.testing.assert_close(found, tokens, **CLOSE)
    for a, b in zip(all_hidden, hidden):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_monai_vit_with_a_cls_token_computes_what_ours_does(x):
    model, other = ours(), monai_vit(classification=True, num_classes=24, post_activation="none")
    state = to_monai_vit(model.state_dict(), class_token=True)
    state |= {"classification_head.weight": torch.eye(24), "classification_head.bias": torch.zeros(24)}
    other.load_state_dict(state)
    torch.testing.assert_close(other(x)[0], model(x), **CLOSE)
    with pytest.raises(NotConvertible, match="no CLS token"):
        to_monai_vit(ours(class_token=False).state_dict(), class_token=True)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("proj_type", ["conv", "perceptron"])
def test_ours_computes_what_a_monai_vit_does(x, qkv_bias, proj_type):
    other, model = monai_vit(qkv_bias=qkv_bias, proj_type=proj_type), ours(class_token=False)
    model.load_state_dict(from_monai_vit(other.state_dict()))
    torch.testing.assert_close(model(x, return_features=True)["all_features"], other(x)[0], **CLOSE)


def test_the_way_to_monai_and_back_changes_no_bit():
    state = ours(class_token=False).state_dict()
    back = from_monai_vit(to_monai_vit(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


# ---------------------------------------------------------------- MONAI UNETR


def test_the_encoder_of_a_monai_unetr_computes_what_ours_does(x):
    model = ours(class_token=False, patch_size=16, depth=12)
    other = match_norm_eps(changed(UNETR(out_channels=2, feature_size=4, **MONAI)))
    missing, unexpected = other.load_state_dict(to_monai_unetr(model.state_dict()), strict=False)
    assert unexpected == [] and not [name for name in missing if name.startswith("vit.")]
    torch.testing.assert_close(other.vit(x)[0], model(x, return_features=True)["all_features"], **CLOSE)
    with pytest.raises(NotConvertible, match=r"3 blocks and patches of \(8, 8, 8\)"):
        to_monai_unetr(ours().state_dict())


def test_ours_computes_what_the_encoder_of_a_monai_unetr_does(x):
    other, model = match_norm_eps(changed(UNETR(out_channels=2, feature_size=4, **MONAI))), ours(False, **DEEP)
    model.load_state_dict(from_monai_unetr(other.state_dict()))
    torch.testing.assert_close(model(x, return_features=True)["all_features"], other.vit(x)[0], **CLOSE)


# ---------------------------------------------------------------- MONAI MaskedAutoEncoderViT


def removed_from(x, ids_keep):
    """Return the patches of x (B, R) that are not kept."""
    count = x.shape[2] * x.shape[3] * x.shape[4] // 512
    return torch.tensor([[i for i in range(count) if i not in row] for row in ids_keep.tolist()])


def reconstructed(model, x, ids_keep):
    """Return what our autoencoder predicts for the removed patches from those that are kept."""
    return model.forward_decoder(model(x, ids_keep=ids_keep), ids_keep, removed_from(x, ids_keep))


def both_reconstruct(model, other, x, monkeypatch):
    """Return what both autoencoders predict for the patches that MONAI's removes."""
    drawn = []
    masking = other._masking
    monkeypatch.setattr(other, "_masking", lambda *a, **k: drawn.append(masking(*a, **k)) or drawn[-1])
    torch.manual_seed(3)
    theirs, _ = other(x)
    ids_keep = drawn[0][1]
    return reconstructed(model, x, ids_keep), take(theirs, removed_from(x, ids_keep))


def test_a_monai_autoencoder_reconstructs_what_ours_does(x, monkeypatch):
    model = autoencoder()
    other = MaskedAutoEncoderViT(**MONAI, **MONAI_DECODER, patch_size=8, num_layers=3, pos_embed_type="learnable")
    other = match_norm_eps(changed(other))
    other.load_state_dict(to_monai_mae(model.state_dict()))
    expected, found = both_reconstruct(model, other, x, monkeypatch)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_ours_reconstructs_what_a_monai_autoencoder_does(x, monkeypatch):
    other = MaskedAutoEncoderViT(**MONAI, **MONAI_DECODER, patch_size=8, num_layers=3, pos_embed_type="learnable")
    other, model = match_norm_eps(changed(other)), autoencoder()
    model.load_state_dict(from_monai_mae(other.state_dict()))
    found, expected = both_reconstruct(model, other, x, monkeypatch)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_what_a_monai_autoencoder_cannot_compute_is_refused():
    model = autoencoder()
    model.decoder_pos_embed.data[:, :1] = 1
    with pytest.raises(NotConvertible, match="position of the CLS token in the decoder"):
        to_monai_mae(model.state_dict())
    with pytest.raises(NotConvertible, match="no mask_token"):
        to_monai_mae(ours().state_dict())
    with pytest.raises(NotConvertible, match="a decoder with cross-attention"):
        to_monai_mae(ours(**DECODER, decoder="cross").state_dict())
    with pytest.raises(NotConvertible, match="MaskedAutoEncoderViT"):
        from_monai_mae(ours().state_dict())


# ---------------------------------------------------------------- MAE, nnssl


def test_forms_of_a_plain_mae_compute_the_same(x):
    model, loaded = autoencoder(), autoencoder()
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("qkv.bias"):
            q, k, v = value.chunk(3)
            # the key part changes no attention
            state |= {name.replace("qkv.bias", f"{part}_bias"): tensor for part, tensor in (("q", q), ("v", v))}
        elif name == "patch_embed.proj.weight":
            state[name] = value.flatten(1)
        else:
            state[name] = value
    names = {
        name: name.replace("decoder_", "decoder.", 1) if "decoder_" in name else f"encoder.{name}" for name in state
    }
    loaded.load_state_dict(from_plain_mae({f"module.{names[name]}": value for name, value in state.items()}))
    kept = torch.tensor([[3, 0, 6], [1, 2, 7]])
    torch.testing.assert_close(reconstructed(loaded, x, kept), reconstructed(model, x, kept), **CLOSE)
    with pytest.raises(NotConvertible, match="names of MAE"):
        from_plain_mae({"x": torch.ones(1)})


@pytest.mark.parametrize("class_token", [False, True])
def test_names_of_selfmedmae_compute_the_same(tmp_path, x, class_token):
    model = ours(class_token)
    # in these files the CLS token has no row of positions
    model.pos_embed.data[:, : int(class_token)] = 0
    state = {f"module.encoder.{name}": value for name, value in model.state_dict().items() if name != "pos_embed"}
    state["module.encoder_pos_embed"] = model.pos_embed[:, int(class_token) :]
    # a decoder of this model's width, whose tensors must not become the encoder's
    state |= {"module.encoder_to_decoder.weight": torch.ones(12, 24), "module.mask_token": torch.ones(1, 1, 12)}
    state |= {"module.decoder_pos_embed": torch.ones(1, 16, 12), "module.decoder.norm.weight": torch.ones(24)}
    state |= {f"module.decoder.blocks.{n}.norm1.weight": torch.ones(24) for n in range(4)}
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    words = ["--source", "plain_mae", "--num_heads", "2", "--grid", "2", "2", "4"]
    export.main([str(tmp_path / "c.pth"), "--to", str(tmp_path / "out"), *words])
    loaded = VisionTransformer3D.from_pretrained(tmp_path / "out")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(x), model(x))


def test_an_adaptation_plan_names_the_parts_of_the_weights(tmp_path, x):
    model = ours()
    torch.save({"model": model.state_dict(), "args": {"grid_size": [2, 2, 4], "num_heads": 2}}, tmp_path / "c.pth")
    export.main([str(tmp_path / "c.pth"), "--to", str(tmp_path / "nnunet"), "--format", "nnunet"])
    plan = json.loads((tmp_path / "nnunet/adaptation_plan.json").read_text())
    assert plan["recommended_downstream_patchsize"] == [16, 16, 32] and plan["pretrain_num_input_channels"] == 1
    weights = torch.load(tmp_path / "nnunet/checkpoint_final.pth", weights_only=True)["network_weights"]
    for name in (f"{plan['keys_to_in_proj'][0]}.weight", plan["key_to_lpe"], f"{plan['key_to_encoder']}.norm.weight"):
        assert name in weights
    # back through the same plan
    file = str(tmp_path / "nnunet/checkpoint_final.pth")
    words = ["--source", "nnssl", "--num_heads", "2", "--grid", "2", "2", "4"]
    export.main([file, "--to", str(tmp_path / "back"), *words])
    assert torch.equal(VisionTransformer3D.from_pretrained(tmp_path / "back")(x), model(x))


def plan_of(tmp_path, **recorded):
    """Return the adaptation plan of an encoder whose checkpoint records these settings of the preprocessing."""
    args = {"grid_size": [2, 2, 4], "num_heads": 2} | recorded
    torch.save({"model": ours().state_dict(), "args": args}, tmp_path / "c.pth")
    words = ["--to", str(tmp_path / "nnunet"), "--format", "nnunet", "--overwrite"]
    export.main([str(tmp_path / "c.pth"), *words])
    plan = json.loads((tmp_path / "nnunet/adaptation_plan.json").read_text())
    return plan["pretrain_plan"], plan["to_do_by_hand"]


def test_the_axes_of_a_plan_are_those_of_our_volumes(tmp_path):
    # the array's axes are y, z, x of the patient, of 2, 3 and 1 mm, one of them reversed
    affine = np.array([[0, 0, 1, 0], [-2, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1.0]])
    file = nib.Nifti1Image(np.arange(60, dtype=np.float32).reshape(3, 4, 5), affine)
    nib.save(file, tmp_path / "scan.nii.gz")
    plan, _ = plan_of(tmp_path, intensity="window", spacing=[1.0, 2.0, 3.0])
    assert plan["image_reader_writer"] == "NibabelIOWithReorient"
    # what that reader of nnU-Net 2.8.1 returns: reoriented to RAS, axes and spacing in the order z, y, x
    reoriented = file.as_reoriented(nib.io_orientation(affine))
    array, spacing = reoriented.get_fdata().transpose(2, 1, 0), reoriented.header.get_zooms()[::-1]
    order = plan["transpose_forward"]
    assert np.array_equal(array.transpose(order), read_image(tmp_path / "scan.nii.gz")[0].numpy())
    assert [spacing[axis] for axis in order] == plan["configurations"]["pretraining"]["spacing"] == [1, 2, 3]
    assert np.array_equal(array.transpose(order).transpose(plan["transpose_backward"]), array)


def test_the_normalisation_of_a_plan_computes_our_window(tmp_path):
    plan, notes = plan_of(tmp_path, intensity="window", low=-175.0, high=250.0, spacing=[1.0, 1.0, 2.0])
    configuration = plan["configurations"]["pretraining"]
    assert (configuration["normalization_schemes"], configuration["use_mask_for_norm"]) == (
        ["CTNormalization"],
        [False],
    )
    known, x = (
        plan["foreground_intensity_properties_per_channel"]["0"],
        torch.linspace(-1000, 1000, 500)[None, None, None],
    )
    # what CTNormalization of nnU-Net 2.8.1 computes
    found = (x.clamp(known["percentile_00_5"], known["percentile_99_5"]) - known["mean"]) / known["std"]
    expected, _ = Preprocessing(low=-175.0, high=250.0, foreground_threshold=None).apply(MetaTensor(x))
    torch.testing.assert_close(found, expected.as_tensor())
    assert any("add the class VisionTransformer3D" in note for note in notes)
    assert all(note[1:] in (tmp_path / "nnunet/README.md").read_text() for note in notes)


@pytest.mark.parametrize(
    "recorded, scheme, masked, note",
    [
        ({"intensity": "zscore"}, "ZScoreNormalization", True, "non-zero"),
        ({"intensity": "percentiles", "low": 1.0, "high": 99.0}, "NoNormalization", False, "percentiles 1 and 99"),
        ({"intensity": "window"}, "CTNormalization", False, "set spacing: the encoder was trained on volumes with"),
        ({}, None, False, "set spacing and normalization_schemes: the checkpoint does not record"),
    ],
)
def test_a_plan_says_what_nnunet_cannot_do(tmp_path, capsys, recorded, scheme, masked, note):
    plan, notes = plan_of(tmp_path, **recorded)
    configuration = plan["configurations"]["pretraining"]
    assert (configuration["normalization_schemes"], configuration["use_mask_for_norm"]) == ([scheme], [masked])
    (found,) = (line for line in notes if note in line)
    assert f"--format nnunet: {found}\n" in capsys.readouterr().out


def test_a_plan_that_does_not_fit_is_refused():
    state = to_nnssl(ours().state_dict())
    with pytest.raises(NotConvertible, match="key_to_lpe"):
        from_nnssl(state, {"key_to_encoder": "encoder"})
    plan = {"key_to_encoder": "other", "keys_to_in_proj": ["stem.proj"], "key_to_lpe": "other.pos"}
    with pytest.raises(NotConvertible, match="found no pos_embed"):
        from_nnssl(state, plan)


# ---------------------------------------------------------------- the program


@pytest.mark.parametrize(
    "form, network", [("monai_vit", ViT), ("monai_unetr", UNETR), ("monai_mae", MaskedAutoEncoderViT)]
)
def test_exported_for_monai_and_back(tmp_path, x, form, network, capsys):
    sizes = DEEP if form == "monai_unetr" else OURS
    model = ours(**(sizes | DECODER))
    model.decoder_pos_embed.data[:, :1] = 0
    args = {"grid_size": list(model.grid_size), "num_heads": 2, "decoder_num_heads": 3}
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "c.pth")
    export.main([str(tmp_path / "c.pth"), "--to", str(tmp_path / "monai"), "--format", form])
    printed, readme = capsys.readouterr().out, (tmp_path / "monai/README.md").read_text()
    left_out = form != "monai_mae"
    assert printed.count("CLS token is left out: features equal those of this encoder without its CLS") == left_out
    assert readme.count("* The CLS token is left out: features equal") == left_out
    written = load_file(tmp_path / "monai/model.safetensors")
    count = sum(value.numel() for value in written.values())
    assert f"{network.__name__}, {len(written)} tensors, {count:,} values" in printed
    card = json.loads((tmp_path / "monai/config.json").read_text())
    assert card["architecture"] == f"monai.networks.nets.{network.__name__}"
    more = {"out_channels": 2} if network is UNETR else {}
    other = network(**card["arguments"], **more)
    other.load_state_dict(load_file(tmp_path / "monai/model.safetensors"), strict=network is not UNETR)
    with pytest.raises(ValueError, match=f"found the format '{form}'"):
        VisionTransformer3D.from_pretrained(tmp_path / "monai")
    torch.save(other.state_dict(), tmp_path / "monai.pth")
    words = ["--source", form, "--num_heads", "2", "--grid", *map(str, model.grid_size)]
    export.main([str(tmp_path / "monai.pth"), "--to", str(tmp_path / "back"), *words])
    back = VisionTransformer3D.from_pretrained(tmp_path / "back")
    if form != "monai_mae":
        # written without the CLS token
        state = {k: v for k, v in model.state_dict().items() if k in back.state_dict()}
        model = VisionTransformer3D(**sizes, class_token=False).eval()
        model.load_state_dict(state | {"pos_embed": state["pos_embed"][:, 1:]})
    a, b = (m(x, return_features=True)["all_features"] for m in (back, model))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_monai_vit_keeps_the_cls_token_on_request(tmp_path, x, capsys):
    model = ours()
    torch.save({"model": model.state_dict(), "args": {"grid_size": [2, 2, 4], "num_heads": 2}}, tmp_path / "c.pth")
    words = [str(tmp_path / "c.pth"), "--to", str(tmp_path / "monai"), "--class_token", "--format"]
    with pytest.raises(InputError, match="--class_token: is a setting of --format monai_vit"):
        export.main([*words, "monai_unetr"])
    export.main([*words, "monai_vit"])
    assert "left out" not in capsys.readouterr().out + (tmp_path / "monai/README.md").read_text()
    other = match_norm_eps(ViT(**json.loads((tmp_path / "monai/config.json").read_text())["arguments"]).eval())
    other.load_state_dict(load_file(tmp_path / "monai/model.safetensors"))
    found, hidden = other(x)
    torch.testing.assert_close(found, model(x), **CLOSE)
    expected = model(x, return_features=True)["all_features"]
    torch.testing.assert_close(other.norm(hidden[-1]), expected, **CLOSE)
    # what differs without the token is far more than rounding
    plain = monai_vit()
    plain.load_state_dict(to_monai_vit(model.state_dict()))
    assert (plain(x)[0] - expected[:, -16:]).abs().max() > 0.01


def test_without_a_cls_token_there_is_no_note_on_it(tmp_path, capsys):
    state = ours(class_token=False).state_dict()
    torch.save({"model": state, "args": {"grid_size": [2, 2, 4], "num_heads": 2}}, tmp_path / "c.pth")
    words = [str(tmp_path / "c.pth"), "--to", str(tmp_path / "monai"), "--format", "monai_vit"]
    with pytest.raises(InputError, match="found no CLS token"):
        export.main([*words, "--class_token"])
    export.main(words)
    assert "CLS" not in capsys.readouterr().out


def test_a_hybrid_encoder_has_no_counterpart(tmp_path):
    from Finetune.models_convvit3d import ConvViT3D

    model = ConvViT3D(img_size=32, embed_dims=(6, 6, 12, 12), depths=(1, 1, 1, 1), num_heads=2)
    torch.save({"model": model.state_dict(), "args": {"num_heads": 2}}, tmp_path / "c.pth")
    with pytest.raises(InputError, match="found MiM's hybrid encoder, expected a ViT"):
        export.main([str(tmp_path / "c.pth"), "--to", str(tmp_path / "out"), "--format", "monai_vit"])
