"""Classification: it learns, the scans of a patient share a fold, and AUC is correct."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import load
from common.errors import InputError
from Finetune.cases import find_cases, patient_of, split
from Finetune.main_finetune import main
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_classifier import Classifier
from Finetune.presets import load_preset
from scripts import convert_cc_ccii
from tests.common.report.made import page_of
from tests.Finetune.made import make_scans

SMALL = "--embed_dim 24 --depth 2 --num_heads 2 --roi 32 32 16 --patch_size 16".split()
QUICK = "--batch_size 4 --micro_batch_size 4 --workers 0 --warmup_epochs 0".split()


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return make_scans(load_preset("CC_CCII"), tmp_path_factory.mktemp("cc"))


def run(tmp_path, scans, *extra):
    flags = ["--preset", "CC_CCII", "--data", scans, "--out_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache"]
    return main([*map(str, flags), *SMALL, *QUICK, *map(str, extra)])


def test_no_patient_is_in_two_folds(scans):
    preset = load_preset("CC_CCII")
    cases = find_cases(preset, scans)
    assert len(cases) == 30
    seen = []
    for fold in range(5):
        training, validation = split(cases, preset, fold)
        assert not {patient_of(c, preset) for c in training} & {patient_of(c, preset) for c in validation}
        seen += [case.name for case in validation]
    assert sorted(seen) == sorted(case.name for case in cases)


def test_it_learns_and_writes_its_scores(tmp_path, scans):
    run(tmp_path, scans, "--epochs", 12, "--lr", 0.003, "--validate_every", 12)
    card = json.loads((tmp_path / "run/classification.json").read_text())
    assert card["scores"]["auc"] > 0.8
    rows = list(csv.DictReader(open(tmp_path / "run/classification.csv")))
    assert len(rows) == card["cases"] == 6
    assert "of 6 cases" in page_of(tmp_path / "run")
    assert np.mean([row["class"] == row["predicted"] for row in rows]) == pytest.approx(card["scores"]["accuracy"])


def test_freeze_trains_only_the_head(tmp_path, scans):
    flags = ("--epochs", 1, "--validate_every", 0, "--resume", "none")
    before = load(run(tmp_path, scans, *flags, "--lr", 0.0))["state_dict"]
    after = load(run(tmp_path, scans, *flags, "--lr", 0.1, "--freeze"))["state_dict"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize("class_token", [True, False])
def test_the_class_token_is_pooled_if_there_is_one(class_token):
    vit = VisionTransformer3D(32, 16, embed_dim=24, depth=1, num_heads=2, class_token=class_token)
    x, model = torch.rand(2, 1, 32, 32, 32), Classifier(vit, 3)
    tokens = vit(x, return_features=True)["all_features"]
    torch.testing.assert_close(model(x), model.head(tokens[:, 0] if class_token else tokens.mean(dim=1)))


def test_networks_for_another_task_are_refused(tmp_path, scans):
    with pytest.raises(InputError, match="--model mim.*CC_CCII.*classification"):
        run(tmp_path, scans, "--model", "mim")
    with pytest.raises(InputError, match="--model classifier.*BTCV.*segmentation"):
        run(tmp_path, scans, "--preset", "BTCV", "--model", "classifier")


def test_published_slices_are_converted_to_volumes(tmp_path):
    rng = np.random.default_rng(0)
    pixels = {n: rng.integers(0, 255, (6, 8), dtype=np.uint8) for n in (2, 10, 1)}
    for n, slice_ in pixels.items():
        path = tmp_path / f"raw/NCP/12/1034/{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(slice_).save(path)
    (tmp_path / "raw/CP/3/7").mkdir(parents=True)
    (tmp_path / "raw/CP/3/7/0.png").write_bytes(b"torn")
    flags = ["--data", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="1 of 2.*0.png"):
        convert_cc_ccii.main(flags)
    volume = nib.load(tmp_path / "out/NCP/NCP_12-1034.nii.gz")
    np.testing.assert_array_equal(np.asarray(volume.dataobj), np.stack([pixels[n].T for n in (1, 2, 10)], axis=2))
    (case,) = find_cases(load_preset("CC_CCII"), tmp_path / "out")
    assert patient_of(case, load_preset("CC_CCII")) == "NCP_12"
    Image.fromarray(np.full((6, 8), 3000, np.uint16)).save(tmp_path / "raw/CP/3/7/0.png")
    with pytest.raises(InputError, match="0.png.*mode I.*8"):
        convert_cc_ccii.main(flags)
    with pytest.raises(InputError, match="no scan"):
        convert_cc_ccii.main(["--data", str(tmp_path / "out"), "--out", str(tmp_path / "x")])
