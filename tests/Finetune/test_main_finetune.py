"""The fine-tuning program on small synthetic data: it learns, resumes, loads checkpoints and refuses bad input."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from common import checkpoint
from common.errors import InputError
from common.training.trainer import Trainer
from Finetune import export
from Finetune.architectures import load_finetuned
from Finetune.main_finetune import main
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_convvit3d import ConvViT3D
from Finetune.presets import available, load_preset
from tests.common.report.made import page_of
from tests.Finetune.made import make_dataset
from tests.helpers import read_log, run_module

SMALL = "--embed_dim 24 --depth 4 --num_heads 2 --feature_size 4 --roi 32 --patch_size 16".split()
QUICK = "--epochs 1 --batch_size 1 --crops 1 --workers 0 --warmup_epochs 0 --validate_every 0".split()


def run(tmp_path, preset, data, *extra, out="run"):
    flags = ["--preset", preset, "--data", data, "--out_dir", tmp_path / out, "--cache_dir", tmp_path / "cache"]
    return main([*map(str, flags), *SMALL, *QUICK, *map(str, extra)])


def vit_file(path, seed=1, **kwargs):
    torch.manual_seed(seed)
    defaults = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 2}
    model = VisionTransformer3D(**(defaults | kwargs))
    args = {"grid_size": list(model.grid_size), "num_heads": kwargs.get("num_heads", 2)}
    torch.save({"student": {f"module.backbone.{k}": v for k, v in model.state_dict().items()}, "args": args}, path)
    return model


def test_it_learns_and_its_checkpoint_suffices_to_rebuild_it(tmp_path, spleen):
    path = run(tmp_path, "MSD09_Spleen", spleen, "--epochs", 12, "--lr", 0.01, "--crops", 2, "--validate_every", 12)
    log = read_log(tmp_path / "run")
    assert log[-1]["dice"] < 0.8 * log[0]["dice"]
    assert log[-1]["val/dice"] > 0.02
    model, architecture, preset, args = load_finetuned(path)
    assert (architecture.roi, architecture.patch_size, preset.name) == ((32, 32, 32), (16, 16, 16), "MSD09_Spleen")
    assert args["validation_cases"] == ["spleen_2"] and args["training_cases"] == ["spleen_16", "spleen_17"]
    assert model(torch.zeros(1, 1, 32, 32, 32)).shape == (1, 2, 32, 32, 32)
    page = page_of(tmp_path / "run")
    assert all(
        words in page for words in ("MSD09_Spleen, fold 0", "12 of 12", "Dice in validation", "2 training and 1")
    )


@pytest.mark.parametrize("warmup", [0, 1])
def test_interrupted_and_resumed_run_equals_one_in_one_go(tmp_path, spleen, monkeypatch, warmup):
    flags = ("--epochs", 2, "--head_warmup_epochs", warmup)
    expected = checkpoint.load(run(tmp_path, "MSD09_Spleen", spleen, *flags, out="once"))["state_dict"]

    class Stopped(Exception):
        pass

    def stop(trainer):
        if trainer.state.epoch == 1:
            raise Stopped
        return {}

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Trainer, "_validate", stop)
        run(tmp_path, "MSD09_Spleen", spleen, *flags, out="parts")
    parts = checkpoint.load(run(tmp_path, "MSD09_Spleen", spleen, *flags, out="parts"))["state_dict"]
    for name, value in expected.items():
        assert torch.equal(value, parts[name]), name


def test_checkpoint_is_loaded_and_its_twin_has_the_same_head(tmp_path, spleen):
    file = tmp_path / "pretrained.pth"
    pretrained = vit_file(file).state_dict()
    frozen = ("--freeze", "--lr", "0")
    loaded, architecture, *_ = load_finetuned(run(tmp_path, "MSD09_Spleen", spleen, "--init", file, *frozen, out="a"))
    twin, *_ = load_finetuned(run(tmp_path, "MSD09_Spleen", spleen, "--init", file, "--scratch_twin", *frozen, out="b"))
    a, b = loaded.state_dict(), twin.state_dict()
    assert torch.equal(a["backbone.blocks.0.attn.qkv.weight"], pretrained["blocks.0.attn.qkv.weight"])
    assert not torch.equal(b["backbone.blocks.0.attn.qkv.weight"], pretrained["blocks.0.attn.qkv.weight"])
    head = [name for name in a if not name.startswith("backbone.")]
    assert head and all(torch.equal(a[name], b[name]) for name in head)


def test_random_encoder_is_standardised_and_a_loaded_one_is_not(tmp_path, spleen):
    vit_file(tmp_path / "pretrained.pth")
    starts = {"scratch": [], "plain": ["--no-standardize"], "loaded": ["--init", tmp_path / "pretrained.pth"]}
    starts["loaded plain"] = [*starts["loaded"], "--no-standardize"]
    found = {
        name: checkpoint.load(run(tmp_path, "MSD09_Spleen", spleen, *flags, "--lr", 0, out=name))
        for name, flags in starts.items()
    }
    weights = {name: content["state_dict"]["backbone.patch_embed.proj.weight"] for name, content in found.items()}
    (std,) = found["scratch"]["args"]["inputs"]["std"]
    torch.testing.assert_close(weights["scratch"] * std, weights["plain"])
    assert torch.equal(weights["loaded"], weights["loaded plain"])
    assert [found[name]["args"]["inputs"] for name in ("plain", "loaded")] == [None, None]


def test_freeze_and_layer_decay(tmp_path, spleen):
    file = tmp_path / "pretrained.pth"
    pretrained = vit_file(file).state_dict()
    model, *_ = load_finetuned(run(tmp_path, "MSD09_Spleen", spleen, "--init", file, "--freeze", "--lr", 0.01, out="f"))
    assert all(torch.equal(v, pretrained[k]) for k, v in model.backbone.state_dict().items() if k != "pos_embed")
    decayed = ("--init", file, "--layer_decay", 0.1, "--lr", 0.01, "--weight_decay", 0)
    model, *_ = load_finetuned(run(tmp_path, "MSD09_Spleen", spleen, *decayed, out="d"))
    after = model.backbone.state_dict()
    moved = [
        (after[f"blocks.{i}.mlp.fc1.weight"] - pretrained[f"blocks.{i}.mlp.fc1.weight"]).abs().max() for i in range(4)
    ]
    assert all(later > 3 * earlier for earlier, later in zip(moved, moved[1:]))


def test_head_warmup_moves_the_encoder_only_after_it(tmp_path, spleen):
    pretrained = vit_file(tmp_path / "vit.pth").state_dict()
    flags = ("--init", tmp_path / "vit.pth", "--head_warmup_epochs", 2, "--epochs", 3, "--save_every", 1, "--lr", 0.01)
    run(tmp_path, "MSD09_Spleen", spleen, *flags, "--weight_decay", 0.1)
    states = [checkpoint.load(tmp_path / f"run/checkpoint-{epoch}.pth")["state_dict"] for epoch in range(3)]
    for name, value in pretrained.items():
        if name not in ("pos_embed", "cls_token"):
            first, second, third = (state[f"backbone.{name}"] for state in states)
            assert torch.equal(first, value) and torch.equal(second, value) and not torch.equal(third, value), name
    head = "decoder2.transp_conv.conv.weight"
    assert not torch.equal(states[0][head], states[1][head])


def test_checkpoint_key_chooses_the_weights(tmp_path, spleen):
    student, teacher = (vit_file(tmp_path / f"{n}.pth", seed=n).state_dict() for n in (1, 2))
    args = {"num_heads": 2, "grid_size": [2, 2, 2]}
    torch.save({"student": student, "teacher": teacher, "args": args}, tmp_path / "both.pth")
    flags = ("--init", tmp_path / "both.pth", "--freeze", "--lr", 0, "--resume", "none", "--checkpoint_key")
    for key, expected in (("teacher", teacher), ("student", student), ("auto", student)):
        model, *_ = load_finetuned(run(tmp_path, "MSD09_Spleen", spleen, *flags, key))
        assert torch.equal(model.backbone.blocks[1].mlp.fc1.weight, expected["blocks.1.mlp.fc1.weight"]), key
    with pytest.raises(InputError, match="both.pth.*student.*teacher.*'centre'"):
        run(tmp_path, "MSD09_Spleen", spleen, *flags, "centre")


@pytest.mark.parametrize("model", ["unetr", "linear"])
def test_a_kept_class_token_gives_the_features_of_pretraining(tmp_path, spleen, model):
    pretrained, x = vit_file(tmp_path / "vit.pth").eval(), torch.rand(1, 1, 32, 32, 32)
    expected = pretrained(x, return_features=True)["patch_features"]
    flags = ("--init", tmp_path / "vit.pth", "--model", model, "--freeze", "--lr", 0, "--resume", "none")
    for choice, equal in (("keep", True), ("drop", False), ("auto", False)):
        path = run(tmp_path, "MSD09_Spleen", spleen, *flags, "--class_token", choice)
        found = load_finetuned(path)[0].backbone(x, return_features=True)["patch_features"]
        assert torch.allclose(found, expected, atol=1e-5) == equal, choice


@pytest.mark.slow
def test_leaking_folds_are_reported(tmp_path, capsys):
    data = make_dataset(load_preset("BTCV"), tmp_path / "btcv")
    vit_file(tmp_path / "pretrained.pth")
    for fold, start, warned in ((1, "pretrained.pth", True), (1, None, False), (0, "pretrained.pth", False)):
        init = ("--init", tmp_path / start) if start else ()
        path = run(tmp_path, "BTCV", data, "--fold", fold, *init, "--resume", "none", "--lr", 0)
        assert ("warning: fold 1: the papers' pretraining list" in capsys.readouterr().out) == warned
        assert bool(load_finetuned(path)[3]["leak"]) == warned
    # fold 0 of a list with other folds is not the preset's clean one
    names = sorted(path.name for path in data.glob("img/*.nii.gz"))
    cases = [{"image": f"img/{n}", "label": f"label/{n.replace('img', 'label')}", "fold": 1} for n in names]
    cases[0]["fold"] = 0
    (data / "custom.json").write_text(json.dumps({"training": cases}))
    path = run(tmp_path, "BTCV", data / "custom.json", "--init", tmp_path / "pretrained.pth", "--resume", "none")
    assert "the papers' pretraining list" in load_finetuned(path)[3]["leak"]


def test_unknown_pretraining_data_is_reported(tmp_path, spleen):
    vit_file(tmp_path / "pretrained.pth")
    path = run(tmp_path, "MSD09_Spleen", spleen, "--init", tmp_path / "pretrained.pth")
    assert load_finetuned(path)[3]["leak"].startswith("unknown")


def test_resuming_with_another_fold_is_refused(tmp_path, spleen):
    run(tmp_path, "MSD09_Spleen", spleen, "--epochs", 1)
    with pytest.raises(InputError, match="training data"):
        run(tmp_path, "MSD09_Spleen", spleen, "--epochs", 1, "--fold", 1)


def test_channels_last_changes_no_number_but_by_rounding(tmp_path, spleen):
    """Also where a run goes on in the other layout: moments and weights must then be paired as before."""
    other = ["--channels_last"]
    losses = {}
    for name, layouts in {"never": [[], []], "later": [[], other], "first": [other, []]}.items():
        for epochs, layout in zip((1, 3), layouts):
            path = run(tmp_path, "MSD09_Spleen", spleen, "--lr", 0.01, "--epochs", epochs, *layout, out=name)
        losses[name] = [line[term] for line in read_log(tmp_path / name) for term in ("dice", "ce", "grad_norm")]
        content = torch.load(path, weights_only=True)
        assert all(value.is_contiguous() for value in content["state_dict"].values())
    assert losses["later"] == pytest.approx(losses["never"], rel=1e-3)
    assert losses["first"] == pytest.approx(losses["never"], rel=1e-3)


def test_resuming_with_other_initial_weights_is_refused(tmp_path, spleen):
    file = tmp_path / "pretrained.pth"
    vit_file(file)
    run(tmp_path, "MSD09_Spleen", spleen, "--epochs", 1, "--init", file)
    before = (tmp_path / "run/checkpoint-last.pth").read_bytes()
    for flags in (("--init", file, "--scratch_twin"), ("--init", "scratch")):
        with pytest.raises(InputError, match="checkpoint-last.pth: not a checkpoint of this run"):
            run(tmp_path, "MSD09_Spleen", spleen, "--epochs", 2, *flags)
    assert (tmp_path / "run/checkpoint-last.pth").read_bytes() == before
    # as recorded before the check was there
    content = torch.load(tmp_path / "run/checkpoint-last.pth", weights_only=True)
    assert content["args"]["loop"].pop("init_sha256") == content["args"]["init_sha256"]
    torch.save(content, tmp_path / "run/checkpoint-last.pth")
    run(tmp_path, "MSD09_Spleen", spleen, "--epochs", 2, "--init", file)


@pytest.mark.slow
def test_best_checkpoint_is_not_replaced_by_a_worse_one(tmp_path, spleen, monkeypatch):
    scores = iter([0.5, 0.7, 0.6, 0.65, 0.9])
    monkeypatch.setattr("Finetune.main_finetune.validate", lambda *_: {"val/dice": next(scores)})
    best = tmp_path / "run/checkpoint-best.pth"
    flags = ("--select", "best", "--validate_every", 1)
    for epochs, epoch, score in ((3, 1, 0.7), (4, 1, 0.7), (5, 4, 0.9)):
        run(tmp_path, "MSD09_Spleen", spleen, *flags, "--epochs", epochs)
        content = torch.load(best, weights_only=True)
        assert (content["epoch"], content["args"]["best"], content["args"]["selected"]) == (epoch, score, "best")


def test_linear_probe_trains_only_its_head(tmp_path, spleen):
    file = tmp_path / "pretrained.pth"
    pretrained = vit_file(file).state_dict()
    flags = ("--init", file, "--model", "linear", "--lr", 0.1)
    model, *_ = load_finetuned(run(tmp_path, "MSD09_Spleen", spleen, *flags))
    assert torch.equal(model.backbone.state_dict()["norm.weight"], pretrained["norm.weight"])
    assert model.head.weight.std() > 0


def test_mim_network_with_its_pretrained_encoder(tmp_path, spleen):
    torch.manual_seed(2)
    encoder = ConvViT3D(img_size=32, embed_dims=(4, 8, 16, 24), depths=(1, 1, 1, 2), num_heads=3)
    file = tmp_path / "mim.pth"
    torch.save({"model": encoder.state_dict(), "args": {"num_heads": 3, "grid_size": [2, 2, 2]}}, file)
    flags = ["--preset", "MSD09_Spleen", "--data", spleen, "--cache_dir", tmp_path / "cache", "--model", "mim", *QUICK]
    flags += ["--roi", 64, 32, 32, "--batch_size", 2, "--micro_batch_size", 2]
    path = main([*map(str, flags), "--init", str(file), "--freeze", "--lr", "0.01", "--out_dir", str(tmp_path / "m")])
    model, architecture, *_ = load_finetuned(path)
    assert architecture.embed_dims == (4, 8, 16, 24) and architecture.depths == (1, 1, 1, 2)
    state = model.backbone.state_dict()
    assert torch.equal(state["blocks4.1.attn.qkv.weight"], encoder.state_dict()["blocks4.1.attn.qkv.weight"])
    # not in the pretrained encoder, so trained in spite of --freeze
    assert not torch.equal(state["blocks4.0.gamma_1"], torch.ones(24))
    with pytest.raises(InputError, match="mim.pth.* ViT"):
        run(tmp_path, "MSD09_Spleen", spleen, "--init", file)
    with pytest.raises(InputError, match="--roi 48.* 32.*--model mim"):
        main([*map(str, flags), "--out_dir", str(tmp_path / "n"), "--roi", "48"])


@pytest.mark.parametrize(
    "name, roi", [pytest.param("swinunetr", (64, 32, 32), marks=pytest.mark.slow), ("dynunet", (32, 32, 16))]
)
def test_other_networks_start_from_scratch(tmp_path, spleen, name, roi):
    flags = ("--model", name, "--feature_size", 12, "--roi", *roi)
    model, architecture, *_ = load_finetuned(run(tmp_path, "MSD09_Spleen", spleen, *flags))
    assert model(torch.zeros(1, 1, *roi)).shape == (1, 2, *roi)
    vit_file(tmp_path / "vit.pth")
    for extra in (
        ("--init", tmp_path / "vit.pth"),
        ("--freeze",),
        ("--head_warmup_epochs", 1),
        ("--class_token", "keep"),
    ):
        with pytest.raises(InputError, match=f"--model {name}"):
            run(tmp_path, "MSD09_Spleen", spleen, *flags, *extra)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, spleen):
    flags = ["--preset", "MSD09_Spleen", "--data", spleen, "--cache_dir", tmp_path / "cache", *SMALL, *QUICK]
    flags += ["--epochs", 3, "--batch_size", 2, "--validate_every", 3, "--lr", 0.01, "--micro_batch_size", 1]
    for name, processes, more in (("one", 1, ()), ("two", 2, ()), ("sharded", 2, ("--fsdp", "--select", "best"))):
        run_module("Finetune.main_finetune", *flags, "--out_dir", tmp_path / name, *more, nproc=processes)
    one, *others = (read_log(tmp_path / name) for name in ("one", "two", "sharded"))
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert a["dice"] == pytest.approx(b["dice"], abs=1e-4) and a["ce"] == pytest.approx(b["ce"], abs=1e-4)
        assert one[-1]["val/dice"] == pytest.approx(other[-1]["val/dice"], abs=1e-3)
    best, last = (checkpoint.load(tmp_path / f"sharded/checkpoint-{n}.pth")["state_dict"] for n in ("best", "last"))
    # there is one validation, after the last epoch
    assert all(torch.equal(best[name], last[name]) for name in last)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in available() if load_preset(n).task == "segmentation"])
def test_every_preset_runs_on_its_published_layout(tmp_path, name):
    preset = load_preset(name)
    affine = np.diag([*(-np.array((preset.spacing or (1, 1, 1))[:2])), preset.spacing[2], 1.0])
    data = make_dataset(preset, tmp_path / "data", affine)
    path = run(tmp_path, name, data, "--epochs", 2, "--validate_every", 2)
    log = read_log(tmp_path / "run")
    assert np.isfinite(log[-1]["dice"]) and 0 <= log[-1]["val/dice"] <= 1
    _, architecture, *_ = load_finetuned(path)
    assert architecture.out_channels == preset.out_channels and architecture.in_chans == preset.channels


# ---------------------------------------------------------------- bad input


def test_bad_settings_are_refused(tmp_path, spleen):
    for extra, message in (
        ("--roi 40", "roi.*40.*16"),
        ("--patch_size 12 --roi 36", "patch_size.*12.* 32"),
        ("--num_heads 5", "num_heads.* 5.* 24"),
        ("--fold 9", "fold.* 9"),
        ("--layer_decay 1.5", "--layer_decay 1.5.* 1"),
        ("--label_fraction 0", "--label_fraction 0.* 0"),
        ("--init nowhere.pth", "nowhere.pth"),
        ("--scratch_twin", "--scratch_twin.*--init"),
        ("--init a --checkpoint b", "--checkpoint b.*--init a"),
        ("--modle unetr", "--model"),
        ("--workers -1", "--workers -1.* 0"),
        ("--clip_grad 0", "--clip_grad 0.* 0"),
        ("--overlap 1", "--overlap 1.* 1"),
        ("--select best --validate_every 0", "--select best.*--validate_every 0"),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path, "MSD09_Spleen", spleen, *extra.split())


def test_checkpoints_of_other_architectures_are_refused(tmp_path, spleen):
    vit_file(tmp_path / "wide.pth", embed_dim=48)
    with pytest.raises(InputError, match="wide.pth.*embed_dim 48.*24"):
        run(tmp_path, "MSD09_Spleen", spleen, "--init", tmp_path / "wide.pth")
    torch.save({"model": {"stages.0.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth.* ViT"):
        run(tmp_path, "MSD09_Spleen", spleen, "--init", tmp_path / "other.pth")


def test_bad_labels_and_lists_are_refused(tmp_path):
    data = make_dataset(load_preset("MSD09_Spleen"), tmp_path / "ids")
    path = data / "labelsTr/spleen_17.nii.gz"
    label = nib.load(path)
    values = np.asarray(label.dataobj).copy()
    values[5, 5, 5] = 7
    nib.save(nib.Nifti1Image(values, label.affine), path)
    with pytest.raises(InputError, match="spleen_17.nii.gz.* 7.*MSD09_Spleen"):
        run(tmp_path, "MSD09_Spleen", data)
    nib.save(nib.Nifti1Image(values[:-1] * 0, label.affine), path)
    with pytest.raises(InputError, match="spleen_17.nii.gz.*shape"):
        run(tmp_path, "MSD09_Spleen", data)
    (data / "dataset.json").write_text('{"training": []}')
    with pytest.raises(InputError, match="dataset.json.*empty"):
        run(tmp_path, "MSD09_Spleen", data)


def test_the_order_has_a_seed_of_its_own(tmp_path, spleen):
    def losses(*flags, out):
        run(tmp_path, "MSD09_Spleen", spleen, "--epochs", 2, *flags, out=out)
        return [(line["dice"], line["ce"]) for line in read_log(tmp_path / out)]

    plain = losses(out="a")
    assert losses("--order_seed", 0, out="b") == plain != losses("--order_seed", 1, out="c")
    # the same data, other weights
    assert losses("--seed", 1, "--order_seed", 0, out="d") != plain
    with pytest.raises(InputError, match="not a checkpoint of this run .seed: found 0, expected"):
        losses("--order_seed", 1, "--epochs", 3, out="a")


def test_folder_that_cannot_be_written_is_refused(tmp_path, spleen):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run(tmp_path, "MSD09_Spleen", spleen, out="file/run")


def test_no_folder_is_made_when_the_data_are_missing(tmp_path):
    (tmp_path / "data/img").mkdir(parents=True)
    for preset, data in (("BTCV", "data"), ("MSD09_Spleen", "data"), ("BTCV", "nothing")):
        with pytest.raises(InputError, match=f"{data}: .*preset {preset}"):
            run(tmp_path, preset, tmp_path / data)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing(tmp_path, spleen, capsys):
    assert run(tmp_path, "MSD09_Spleen", spleen, "--dry_run", "--class_balance", "0.5") is None
    printed = capsys.readouterr().out
    assert "dry run: dice " in printed and "2 cases train, 1 validate" in printed and "FLOP per update" in printed
    assert not (tmp_path / "run").exists()


def test_an_exported_folder_is_loaded_as_its_checkpoint_is(tmp_path, spleen, capsys):
    vit_file(tmp_path / "c.pth")
    content = torch.load(tmp_path / "c.pth", weights_only=True)
    recorded = {"spacing": None, "intensity": "window", "low": -1000.0, "high": 1000.0, "data": ["none of these"]}
    torch.save(content | {"args": content["args"] | recorded}, tmp_path / "c.pth")
    export.main([str(tmp_path / "c.pth"), "--to", str(tmp_path / "exported")])
    weights = []
    for name in ("c.pth", "exported"):
        path = run(tmp_path, "MSD09_Spleen", spleen, "--init", tmp_path / name, out=f"run_{name}")
        weights.append(checkpoint.load(path)["state_dict"])
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "other inputs" in line]
        differs = "spacing as scanned, here 1.5 1.5 1.5 mm; intensities window -1000..1000 HU, here window -175..250 HU"
        assert line.endswith(f"/{name}: was trained on other inputs than those of preset MSD09_Spleen: {differs}")
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
