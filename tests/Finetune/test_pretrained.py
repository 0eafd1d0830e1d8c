"""Loading checkpoints: every layout, position tables of other grids, and files that are refused."""

import argparse
import os
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch

from Finetune.encoder3d import resample_pos_embed
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.pretrained import clean_keys
from tests.Finetune.test_models_3dvit import small
from tests.helpers import ROOT


def authors_file(path, grid=(10, 10, 10), decoder_width=48, prefix="module.backbone.", **model):
    """Write a file as the authors' are believed to be and return its encoder and decoder.

    It has the prefixes of DDP and a wrapper, a DINO head, a teacher and a Namespace of arguments.
    """
    vit = small(
        img_size=tuple(8 * g for g in grid),
        encoder_only=False,
        decoder_embed_dim=decoder_width,
        decoder_depth=1,
        **model,
    )
    weights = {prefix + k: torch.randn_like(v) if k != "pos_embed" else v for k, v in vit.state_dict().items()}
    head = {"module.head.mlp.0.weight": torch.rand(4, 48), "module.head.last_layer.weight_g": torch.ones(4, 1)}
    teacher = {k.removeprefix("module."): v + 1 for k, v in weights.items() if "decoder" not in k}
    content = {
        "student": weights | head,
        "teacher": teacher,
        "optimizer": {"state": {}},
        "epoch": 1599,
        "args": argparse.Namespace(lr=0.1, output_dir="x"),
        "dino_loss": OrderedDict(center=torch.zeros(1, 4)),
    }
    torch.save(content, path)
    return {k.removeprefix(prefix): v for k, v in weights.items()}


@pytest.mark.slow
def test_the_readmes_example_runs_from_inside_finetune(tmp_path):
    """The snippet of the README, unchanged, with nothing but Finetune/ on the path."""
    code = f"""
from models_3dvit import vit_base_patch16_3d
import torch
with torch.device("meta"):
    shapes = {{k: v.shape for k, v in vit_base_patch16_3d(img_size=160).state_dict().items()}}
path = {str(tmp_path / "c.pth")!r}
torch.save({{"student": {{"module.backbone." + k: torch.zeros(s) for k, s in shapes.items()}}}}, path)
model = vit_base_patch16_3d(img_size=(96, 96, 96), patch_size=16, in_chans=1, embed_dim=768, encoder_only=True)
missing_keys, unexpected_keys = model.load_pretrained_checkpoint(path, encoder_only=True, interpolate_pos_embed=True)
assert missing_keys == [] and unexpected_keys == []
import sys
assert not [m for m in sys.modules if m.split(".")[0] in ("common", "Pretrain", "Finetune")]
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "Finetune", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "150 of 150 encoder tensors" in done.stdout and "resampled 1: pos_embed" in done.stdout


def test_a_file_of_the_authors_gives_the_same_features(tmp_path):
    weights = authors_file(tmp_path / "checkpoint-1599.pth", grid=(4, 4, 4))
    model = small()
    missing, unexpected = model.load_pretrained_checkpoint(tmp_path / "checkpoint-1599.pth")
    assert missing == []
    assert "head.mlp.0.weight" in unexpected and "decoder_pred.weight" in unexpected
    reference = small()
    reference.load_state_dict({k: v for k, v in weights.items() if k in reference.state_dict()})
    x = torch.rand(1, 1, 32, 32, 32)
    assert torch.equal(model.eval()(x), reference.eval()(x))
    assert model.load_report.encoder_total == len(model.load_report.matched) == len(model.state_dict())


def test_a_position_table_of_another_grid_is_resampled(tmp_path):
    weights = authors_file(tmp_path / "c.pth", grid=(10, 10, 10))
    model = small()
    model.load_pretrained_checkpoint(tmp_path / "c.pth")
    assert model.load_report.resampled == ["pos_embed"]
    torch.testing.assert_close(model.pos_embed.data, resample_pos_embed(weights["pos_embed"], (10, 10, 10), (4, 4, 4)))
    with pytest.raises(ValueError, match="resampling is off"):
        small().load_pretrained_checkpoint(tmp_path / "c.pth", interpolate_pos_embed=False)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "backbone.", "encoder.", "module._orig_mod.backbone.", "vit."]
)
@pytest.mark.parametrize("key", ["student", "model", "state_dict", None])
def test_every_layout_loads(tmp_path, prefix, key):
    source, model = small(), small()
    weights = {prefix + k: v for k, v in source.state_dict().items()}
    torch.save({key: weights, "epoch": 3} if key else weights, tmp_path / "c.pth")
    assert model.load_pretrained_checkpoint(tmp_path / "c.pth") == ([], [])
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


def test_the_teacher_is_loaded_only_on_request(tmp_path):
    weights = authors_file(tmp_path / "c.pth", grid=(4, 4, 4))
    model = small()
    model.load_pretrained_checkpoint(tmp_path / "c.pth", checkpoint_key="teacher")
    assert torch.equal(model.norm.weight.data, weights["norm.weight"] + 1)
    torch.save({"teacher": {"backbone.x": torch.ones(1)}}, tmp_path / "teacher_only.pth")
    with pytest.raises(ValueError, match="checkpoint_key='teacher'"):
        model.load_pretrained_checkpoint(tmp_path / "teacher_only.pth")


def test_decoder_and_head_are_loaded_if_they_fit(tmp_path):
    weights = authors_file(tmp_path / "c.pth", grid=(4, 4, 4), decoder_num_heads=4)
    model = small(encoder_only=False, decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=4)
    missing, unexpected = model.load_pretrained_checkpoint(tmp_path / "c.pth", encoder_only=False)
    assert missing == [] and {k.split(".")[0] for k in unexpected} == {"head"}
    assert torch.equal(model.decoder_pred.weight.data, weights["decoder_pred.weight"])
    other = small(encoder_only=False, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=4)
    missing, unexpected = other.load_pretrained_checkpoint(tmp_path / "c.pth", encoder_only=False)
    # another width is no error
    assert "decoder_embed.weight" in missing and "decoder_embed.weight" in unexpected


def test_a_classifier_ignores_a_dino_head(tmp_path):
    authors_file(tmp_path / "c.pth", grid=(4, 4, 4))
    model = small(num_classes=3)
    head = model.head.weight.clone()
    model.load_pretrained_checkpoint(tmp_path / "c.pth", encoder_only=True)
    assert torch.equal(model.head.weight, head) and model(torch.rand(1, 1, 32, 32, 32)).shape == (1, 3)


def test_more_channels_of_one_image_give_the_same_tokens(tmp_path):
    torch.save(small().state_dict(), tmp_path / "c.pth")
    one, four, raw = small(), small(in_chans=4), small(in_chans=4)
    one.load_pretrained_checkpoint(tmp_path / "c.pth")
    four.load_pretrained_checkpoint(tmp_path / "c.pth")
    raw.load_pretrained_checkpoint(tmp_path / "c.pth", rescale_channels=False)
    x = torch.rand(1, 1, 32, 32, 32)
    torch.testing.assert_close(one.eval()(x), four.eval()(x.expand(-1, 4, -1, -1, -1)))
    torch.testing.assert_close(raw.patch_embed.proj.weight, 4 * four.patch_embed.proj.weight)


def test_misfits_are_refused_and_change_nothing(tmp_path):
    other = VisionTransformer3D(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=4)
    torch.save(other.state_dict(), tmp_path / "narrow.pth")
    partial = small().state_dict()
    del partial["blocks.1.attn.qkv.weight"]
    torch.save(partial, tmp_path / "partial.pth")
    torch.save({"student": {"module.other." + k: v for k, v in small().state_dict().items()}}, tmp_path / "prefix.pth")
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name, message in [("narrow", r"found \(24,\)"), ("partial", "qkv.weight is missing"), ("prefix", "only 0 of")]:
        with pytest.raises(ValueError, match=message):
            model.load_pretrained_checkpoint(tmp_path / f"{name}.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_code_in_a_file_is_never_executed(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": small().state_dict(), "args": Attack()}, tmp_path / "attack.pth")
    (tmp_path / "attack.pkl").write_bytes(pickle.dumps(Attack()))
    for name in ("attack.pth", "attack.pkl"):
        with pytest.raises(ValueError, match="read safely"):
            small().load_pretrained_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_torn_and_missing_files_are_refused(tmp_path):
    torch.save(small().state_dict(), tmp_path / "c.pth")
    torn = tmp_path / "torn.pth"
    torn.write_bytes((tmp_path / "c.pth").read_bytes()[:5000])
    with pytest.raises(ValueError, match="torn.pth"):
        small().load_pretrained_checkpoint(torn)
    with pytest.raises(ValueError, match="no such checkpoint"):
        small().load_pretrained_checkpoint(tmp_path / "none.pth")


def test_a_flipped_bit_is_refused(tmp_path):
    model, path = small(), tmp_path / "c.pth"
    torch.save({"student": model.state_dict()}, path)
    content = bytearray(path.read_bytes())
    where = content.find(model.pos_embed.numpy().tobytes()) + 1000
    content[where] ^= 1
    path.write_bytes(content)
    altered = torch.load(path, weights_only=True)["student"]["pos_embed"]
    # torch itself reads it without an error
    assert not torch.equal(altered, model.pos_embed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="c.pth.*damaged.*c/data/"):
        model.load_pretrained_checkpoint(path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_entries_that_are_no_named_tensors_are_left_out(tmp_path):
    model = small()
    torch.save(
        {"model": model.state_dict() | {7: torch.zeros(2), None: torch.zeros(2), "note": "x"}}, tmp_path / "c.pth"
    )
    missing, unexpected = model.load_pretrained_checkpoint(tmp_path / "c.pth")
    assert missing == [] and unexpected == []


def test_prefixes_are_removed_at_the_start_only():
    assert list(clean_keys({"module.module.backbone.a": 0, "x.module.b": 0})) == ["a", "x.module.b"]
    with pytest.raises(ValueError, match="'a'"):
        clean_keys({"module.a": 0, "a": 1})


def test_a_model_without_class_token_loads_the_rest(tmp_path):
    torch.save(small().state_dict(), tmp_path / "c.pth")
    model = small(class_token=False)
    missing, unexpected = model.load_pretrained_checkpoint(tmp_path / "c.pth")
    assert missing == [] and unexpected == ["cls_token"]
    assert model(torch.rand(1, 1, 32, 32, 32), return_features=True)["all_features"].shape == (1, 64, 48)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    state = small().state_dict()
    state["blocks.1.mlp.fc1.weight"][3, 4] = value
    torch.save({"student": state}, tmp_path / "c.pth")
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"c\.pth.*1 tensor.*blocks\.1\.mlp\.fc1\.weight"):
        model.load_pretrained_checkpoint(tmp_path / "c.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tensors_that_are_not_loaded_need_not_be_finite(tmp_path):
    weights = small(encoder_only=False, decoder_depth=1).state_dict()
    weights["decoder_pred.weight"][:] = float("nan")
    torch.save({"student": weights}, tmp_path / "c.pth")
    assert small().load_pretrained_checkpoint(tmp_path / "c.pth")[0] == []


def test_sparse_tensors_are_refused_by_name(tmp_path):
    state = small().state_dict()
    state["norm.weight"] = state["norm.weight"].to_sparse()
    torch.save({"student": state}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"c\.pth.*sparse.*norm\.weight"):
        small().load_pretrained_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight"])
def test_tensors_with_too_few_axes_are_refused(tmp_path, name):
    torch.save({"student": small().state_dict() | {name: torch.zeros(48)}}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"c\.pth.*\(48,\)"):
        small().load_pretrained_checkpoint(tmp_path / "c.pth")


def test_expanded_tensors_are_refused_by_name(tmp_path):
    """The file has one number, and the tensor would need 64 GB."""
    state = small().state_dict() | {"pos_embed": torch.zeros(1).expand(1, 2**17, 2**17)}
    torch.save({"student": state}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"c\.pth.*expanded.*pos_embed"):
        small().load_pretrained_checkpoint(tmp_path / "c.pth")
