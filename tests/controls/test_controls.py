"""Controls of the whole chain, from pretraining to the table of a sweep, on phantoms whose answer is known.

Positive: where unlabelled volumes hold what four labelled ones cannot teach (see phantoms.py), a pretrained encoder
beats one from scratch: by ten points of Dice after MAE. GL-MAE gained 0.085 (0.052..0.121) where this was written, so
its limit is lower. MiM is missing: in minutes on two cores it does not learn these patterns (docs/evidence.md).
Negative: pretrained on the same volumes with their voxels shuffled an encoder is about as good as one from scratch
(measured: 0.031 better, -0.011..0.072).
"""

import json

import pytest

from Finetune.sweep import main as sweep
from tests.controls.phantoms import write_labelled, write_unlabelled
from tests.helpers import run_module

pytestmark = pytest.mark.slow

PREPROCESSING = "--intensity window --low 0 --high 1000 --foreground_threshold none"
# Crops have the size of the volumes, so that the patterns lie as the patches do.
VIEWS = "--crop_mode fixed --flip_prob 0 --local_size 32"
LOOP = "--lr 1e-3 --warmup_epochs 0.5 --health_every 0 --save_every 1000 --workers 0 --seed 0"
# The noise of a patch is most of its variance.
DECODER = "--norm_pix_eps 1e-3 --decoder_embed_dim 48 --decoder_depth 1 --decoder_num_heads 2"
VIT = "--embed_dim 96 --depth 4 --num_heads 3 --patch_size 8 --local_views 1"
GLMAE = "--global_views 2 --global_size 32 --out_dim 256 --hidden_dim 128 --bottleneck_dim 32 --teacher_temp_epochs 2"
WEIGHTS = "--weight_global_global 0.1 --weight_global_local 0.1"
METHODS = {
    "mae": f"{VIT} --batch_size 16 --samples_per_epoch 3200 --epochs 12",
    "glmae": f"{VIT} {GLMAE} {WEIGHTS} --batch_size 8 --samples_per_epoch 1600 --epochs 16",
}
SIZE = (32, 32, 32)
SETTINGS = "lr: 0.001\nbatch_size: 4\nmicro_batch_size: 4\ncrops: 1\nworkers: 0\nweight_decay: 0.01\n"


def gain(folder, method, shuffle=False):
    """Return what pretraining adds to the mean Dice at four labels, with its interval, by the table of a sweep."""
    data = write_unlabelled(folder / "unlabelled", SIZE, 800, shuffle)
    cache = ["--cache_dir", folder / "cache"]
    flags = f"--method {method} {METHODS[method]} {PREPROCESSING} {VIEWS} {LOOP} {DECODER} --datalist {data}"
    run_module("Pretrain.main_pretrain", *flags.split(), *cache, "--out_dir", folder / "pretraining")
    preset = write_labelled(folder / "labelled", SIZE, training=8, validation=16)
    settings = folder / "settings.yaml"
    settings.write_text(SETTINGS)
    checkpoint = folder / "pretraining/checkpoint-last.pth"
    flags = f"--models primus --inits scratch,{method}={checkpoint} --label_counts 4 --seeds 0,1"
    flags = [*flags.split(), "--preset", preset, "--data", preset.parent, *cache, "--updates", 100]
    sweep([*map(str, flags), "--settings", str(settings), "--out", str(folder / "sweep")])
    rows = json.loads((folder / "sweep/sweep.json").read_text())["rows"]
    return next(row["minus_scratch"] for row in rows if row["init"] == method)


@pytest.mark.parametrize("method, least", [("mae", 0.10), ("glmae", 0.03)])
def test_pretraining_helps_where_labels_cannot_teach(tmp_path, method, least):
    found = gain(tmp_path, method)
    assert found["difference"] > least and found["ci95"][0] > 0, found


def test_pretraining_on_shuffled_voxels_does_not_help(tmp_path):
    found = gain(tmp_path, "mae", shuffle=True)
    assert found["difference"] < 0.06, found
