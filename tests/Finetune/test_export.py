"""An exported folder gives the same features, says what it holds, and is refused where it does not fit."""

import json
import sys

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin

from common.cache.statistics import InputStatistics
from common.errors import InputError
from Finetune import export
from Finetune.contract import contract_warning, recorded_preprocessing
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_convvit3d import ConvViT3D
from Finetune.presets import load_preset

VIT = dict(img_size=(16, 16, 32), patch_size=8, embed_dim=24, depth=2, num_heads=2)
HYBRID = dict(img_size=(32, 32, 64), embed_dims=(6, 6, 12, 12), depths=(1, 1, 1, 2), num_heads=2)
RECORDED = {
    "method": "glmae",
    "step": 40,
    "batch_size": 2,
    "datasets": ["BTCV"],
    "datalist": ["/home/someone/scans"],
    "spacing": [1.5, 1.5, 2.0],
    "intensity": "window",
    "low": -1000.0,
    "high": 1000.0,
    "inputs": {"mean": [0.2], "std": [0.3]},
    "data": ["aa", "bb"],
}


def scrambled(model):
    """Return the model with all of its tensors changed, so that none is at its initial value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


def save(path, model, key="student", prefix="module.backbone.", **args):
    args = {"grid_size": list(model.grid_size), "num_heads": 2} | RECORDED | args
    torch.save({key: {prefix + name: value for name, value in model.state_dict().items()}, "args": args}, path)
    return path


def run(*words):
    export.main([str(word) for word in words])


@pytest.fixture
def vit(tmp_path):
    model = scrambled(VisionTransformer3D(**VIT, encoder_only=False, decoder_embed_dim=16, decoder_depth=1))
    save(tmp_path / "vit.pth", model)
    return model


# ---------------------------------------------------------------- equal features


def test_a_vit_comes_back_bit_for_bit(tmp_path, vit, capsys):
    run(tmp_path / "vit.pth", "--to", tmp_path / "out")
    loaded = VisionTransformer3D.from_pretrained(tmp_path / "out")
    x = torch.rand(1, 1, 16, 16, 32)
    assert torch.equal(loaded(x, return_features=True)["all_features"], vit(x, return_features=True)["all_features"])
    assert not loaded.training and not [name for name in loaded.state_dict() if "decoder" in name]
    assert "VisionTransformer3D, 30 tensors" in capsys.readouterr().out


@pytest.mark.parametrize("pyramid", [False, True])
def test_a_hybrid_comes_back_bit_for_bit(tmp_path, pyramid):
    model = scrambled(ConvViT3D(**HYBRID, pyramid=pyramid))
    save(tmp_path / "mim.pth", model, "state_dict" if pyramid else "model", "backbone." if pyramid else "")
    run(tmp_path / "mim.pth", "--to", tmp_path / "out")
    loaded = ConvViT3D.from_pretrained(tmp_path / "out")
    x = torch.rand(1, 1, 32, 32, 64)
    layers = (0, 1, 2, 3, 4)[: 4 + pyramid]
    for found, expected in zip(loaded(x, return_layers=layers)[1], model(x, return_layers=layers)[1]):
        assert torch.equal(found, expected)
    assert torch.equal(loaded(x), model(x))


def test_the_teacher_is_exported_on_request(tmp_path, vit):
    content = torch.load(tmp_path / "vit.pth", weights_only=True)
    content["teacher"] = {name: value + 1 for name, value in content["student"].items()}
    torch.save(content, tmp_path / "both.pth")
    run(tmp_path / "both.pth", "--to", tmp_path / "out", "--key", "teacher")
    loaded = VisionTransformer3D.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.norm.weight, vit.norm.weight + 1)


def test_huggingface_hubs_own_class_reads_the_folder(tmp_path, vit):
    run(tmp_path / "vit.pth", "--to", tmp_path / "out")

    class FromHub(PyTorchModelHubMixin, VisionTransformer3D):
        pass

    loaded, x = FromHub.from_pretrained(tmp_path / "out").eval(), torch.rand(1, 1, 16, 16, 32)
    assert torch.equal(loaded(x), vit(x))


def test_a_model_of_the_hub_is_downloaded(tmp_path, vit, monkeypatch):
    run(tmp_path / "vit.pth", "--to", tmp_path / "out")
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path / "out")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    VisionTransformer3D.from_pretrained("someone/vit", revision="v1")
    assert asked == [("someone/vit", "v1", ["config.json", "model.safetensors"])]


def test_arguments_can_be_replaced(tmp_path, vit):
    run(tmp_path / "vit.pth", "--to", tmp_path / "out")
    loaded = VisionTransformer3D.from_pretrained(tmp_path / "out", img_size=32)
    assert loaded.grid_size == (4, 4, 4) and loaded.load_report.resampled == ["pos_embed"]


def test_an_exported_folder_is_exported_again_unchanged(tmp_path, vit):
    run(tmp_path / "vit.pth", "--to", tmp_path / "a", "--licence", "cc-by-4.0")
    run(tmp_path / "a", "--to", tmp_path / "b", "--licence", "cc-by-4.0")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# ---------------------------------------------------------------- the card


def test_the_card_says_what_was_recorded(tmp_path, vit):
    run(tmp_path / "vit.pth", "--to", tmp_path / "out", "--licence", "cc-by-4.0")
    card = json.loads((tmp_path / "out/config.json").read_text())
    assert (card["architecture"], card["grid_size"], card["patch_size"]) == ("VisionTransformer3D", [2, 2, 4], [8] * 3)
    contract = card["preprocessing"]
    assert (contract["orientation"], contract["spacing"], contract["low"]) == ("RAS", [1.5, 1.5, 2.0], -1000.0)
    assert (contract["mean"], contract["std"]) == ([0.2], [0.3])
    training = card["training"]
    assert (training["method"], training["updates"], training["volumes"]) == ("glmae", 40, 2)
    # no paths of the machine
    assert training["data_sets"] == ["BTCV", "scans"] and str(tmp_path) not in json.dumps(card)
    assert "license: cc-by-4.0" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    "args, record, expected",
    [
        ({}, None, None),
        ({}, {"environment": {"code": "abc-dirty"}}, "abc-dirty"),
        ({"code_version": "def"}, {"environment": {"code": "abc"}}, "def"),
        ({}, {"environment": {"code": "unknown"}}, None),
        ({"code_version": 3}, ["no", "record"], None),
    ],
)
def test_the_card_has_the_code_version_of_the_training(tmp_path, vit, args, record, expected):
    if record:
        (tmp_path / "run.json").write_text(json.dumps(record))
    save(tmp_path / "c.pth", vit, **args)
    run(tmp_path / "c.pth", "--to", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["training"]["code_version"] == expected
    assert f"| code version | {expected or 'not recorded'} |" in (tmp_path / "out/README.md").read_text()


def test_unknown_preprocessing_is_said_to_be_unknown(tmp_path, vit):
    torch.save({"model": vit.state_dict(), "args": {"grid_size": [2, 2, 4], "num_heads": 2}}, tmp_path / "c.pth")
    run(tmp_path / "c.pth", "--to", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["preprocessing"] is None
    assert "does not record" in (tmp_path / "out/README.md").read_text()
    assert contract_warning(tmp_path / "out", load_preset("BTCV")) == ""


@pytest.mark.parametrize("exported", [False, True])
def test_differences_from_a_preset_are_named_in_one_line(tmp_path, vit, exported):
    path = tmp_path / "vit.pth"
    if exported:
        run(path, "--to", tmp_path / "out")
        path = tmp_path / "out"
    expected = f"{path}: was trained on other inputs than those of preset BTCV: intensities window -1000..1000 HU, "
    assert contract_warning(path, load_preset("BTCV")) == expected + "here window -175..250 HU"
    text = contract_warning(path, load_preset("MSD01_BrainTumour"))
    assert "spacing 1.5 1.5 2.0 mm, here 1.0 1.0 1.0 mm" in text
    assert "here zscore" in text and "channels 1, here 4" in text and "\n" not in text


def test_equal_preprocessing_gives_no_warning(tmp_path, vit):
    save(tmp_path / "same.pth", vit, low=-175.0, high=250.0)
    assert contract_warning(tmp_path / "same.pth", load_preset("BTCV")) == ""


@pytest.mark.parametrize(
    "mean, std, words",
    [
        (0.45, 0.35, ""),
        (0.2, 0.3, ""),
        (0.6, 0.3, "mean and standard deviation of the voxels 0.20 and 0.30, here 0.60 and 0.30"),
        (0.2, 0.1, "here 0.20 and 0.10"),
        (0.2, 0.7, "here 0.20 and 0.70"),
    ],
)
def test_voxels_far_from_those_of_the_training_are_named(tmp_path, vit, mean, std, words):
    save(tmp_path / "same.pth", vit, low=-175.0, high=250.0)
    run(tmp_path / "same.pth", "--to", tmp_path / "out")
    for path in (tmp_path / "same.pth", tmp_path / "out"):
        text = contract_warning(path, load_preset("BTCV"), InputStatistics((mean,), (std,)))
        assert words in text and bool(text) == bool(words)
    # another window gives other numbers, and is named itself
    assert "mean" not in contract_warning(tmp_path / "vit.pth", load_preset("BTCV"), InputStatistics((9.0,), (1.0,)))


def test_another_orientation_or_modality_is_named(tmp_path, vit):
    save(tmp_path / "same.pth", vit, low=-175.0, high=250.0, modality="any")
    run(tmp_path / "same.pth", "--to", tmp_path / "out")
    card = tmp_path / "out/config.json"
    card.write_text(card.read_text().replace('"orientation": "RAS"', '"orientation": "LPS"'))
    text = contract_warning(tmp_path / "out", load_preset("BTCV"))
    assert "modality any, here CT" in text and "orientation LPS, here RAS" in text


def test_a_finetuned_checkpoint_has_the_contract_of_its_preset():
    from common.config import to_dict

    preset = load_preset("BTCV")
    assert recorded_preprocessing({"preset": to_dict(preset)}, "x") == preset.preprocessing


# ---------------------------------------------------------------- refused


def spoil(folder, **changes):
    card = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "other"}, "found the format 'other', expected 'mask-volumes encoder'"),
        ({"format_version": 2}, "found version 2 of its format"),
        ({"architecture": "ConvViT3D"}, "found the architecture 'ConvViT3D', expected 'VisionTransformer3D'"),
        ({"num_heads": 5}, "cannot be built from its config.json: embed_dim: found 24"),
        ({"img_size": "large"}, "cannot be built"),
        ({"depth": 3}, "only 30 of 42 encoder tensors fit"),
        ({"weights_sha256": "0"}, "model.safetensors: damaged"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(tmp_path, vit, changes, message):
    run(tmp_path / "vit.pth", "--to", tmp_path / "out")
    spoil(tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        VisionTransformer3D.from_pretrained(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_export_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no readable config.json"):
        VisionTransformer3D.from_pretrained(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("[")
    with pytest.raises(ValueError, match="found no JSON"):
        VisionTransformer3D.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="no readable config.json"):
        VisionTransformer3D.from_pretrained(tmp_path / "a/b/missing")


def test_without_safetensors_the_message_says_what_to_install(tmp_path, vit, monkeypatch):
    run(tmp_path / "vit.pth", "--to", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        VisionTransformer3D.from_pretrained(tmp_path / "out")


def test_an_existing_folder_is_replaced_only_on_request(tmp_path, vit):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        with pytest.raises(InputError, match="exists and is no export"):
            run(tmp_path / "vit.pth", "--to", tmp_path / "mine", *more)
    run(tmp_path / "vit.pth", "--to", tmp_path / "out")
    with pytest.raises(InputError, match="--overwrite"):
        run(tmp_path / "vit.pth", "--to", tmp_path / "out")
    run(tmp_path / "vit.pth", "--to", tmp_path / "out", "--overwrite", "--licence", "mit")
    assert json.loads((tmp_path / "out/config.json").read_text())["licence"] == "mit"
    # nothing temporary is left
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "out", "vit.pth"}


def test_a_failed_export_leaves_the_folder_as_it_was(tmp_path, vit, monkeypatch):
    run(tmp_path / "vit.pth", "--to", tmp_path / "out")
    before = (tmp_path / "out/config.json").read_bytes()

    def fail(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "sync", fail)
    with pytest.raises(InputError, match="No space left"):
        run(tmp_path / "vit.pth", "--to", tmp_path / "out", "--overwrite", "--licence", "mit")
    assert (tmp_path / "out/config.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "vit.pth"}


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model": {"x": torch.ones(1)}}, "expected the weights of the ViT or MiM's hybrid encoder"),
        ({"optimizer": {}}, "expected weights under"),
    ],
)
def test_files_without_an_encoder_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(InputError, match=message):
        run(tmp_path / "c.pth", "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_file_does_not_record_is_asked_for(tmp_path):
    model = VisionTransformer3D(**VIT)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    with pytest.raises(InputError, match="expected --num_heads"):
        run(tmp_path / "c.pth", "--to", tmp_path / "out")
    with pytest.raises(InputError, match="17 rows, of no cube; expected --grid D H W"):
        run(tmp_path / "c.pth", "--to", tmp_path / "out", "--num_heads", 2)
    run(tmp_path / "c.pth", "--to", tmp_path / "out", "--num_heads", 2, "--grid", 2, 2, 4)
    x = torch.rand(1, 1, 16, 16, 32)
    assert torch.equal(VisionTransformer3D.from_pretrained(tmp_path / "out")(x), model.eval()(x))
