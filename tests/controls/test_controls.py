"""Controls of the whole chain, from pretraining to the table of a sweep, on phantoms whose answer is known.

Positive: where unlabelled volumes hold what four labelled ones cannot teach (see phantoms.py), an encoder pretrained
with MAE, GL-MAE or MiM beats one from scratch by ten points of Dice after fine-tuning, and its frozen features beat
those of a random one by as much. Negative: pretrained on the same volumes with their voxels shuffled an encoder is
about as good as one from scratch. What was measured is in docs/evidence.md.
"""

import json
from dataclasses import dataclass

import pytest

from Finetune.probe import main as probe
from Finetune.sweep import main as sweep
from tests.controls.phantoms import write_labelled, write_unlabelled
from tests.helpers import run_module

pytestmark = pytest.mark.slow

PREPROCESSING = "--intensity window --low 0 --high 1000 --foreground_threshold none"
# The patterns lie as the patches do: crops have the size of the volumes, and levels of MiM are cut at multiples of 16.
VIEWS = "--crop_mode fixed --flip_prob 0 --local_size 32"
LOOP = "--warmup_epochs 0.5 --health_every 0 --save_every 1000 --workers 0 --seed 0"
# in Dice, from 0 to 1
LEAST_GAIN = 0.1
# The noise of a patch is most of its variance.
DECODER = "--norm_pix_eps 1e-3 --decoder_embed_dim 48 --decoder_depth 1 --decoder_num_heads 2"
VIT = "--embed_dim 96 --depth 4 --num_heads 3 --patch_size 8 --local_views 1"
GLMAE = "--global_views 2 --global_size 32 --out_dim 256 --hidden_dim 128 --bottleneck_dim 32 --teacher_temp_epochs 2"
WEIGHTS = "--weight_global_global 0.1 --weight_global_local 0.1"
HYBRID = "--model tiny --embed_dims 12 24 48 96 --depths 1 1 1 2 --num_heads 3 --num_mid 2 --num_down 1"
LABELLED_SIZE = (32, 32, 32)
SETTINGS = "batch_size: 4\nmicro_batch_size: 4\ncrops: 1\nworkers: 0\nweight_decay: 0.01\n"


@dataclass(frozen=True)
class Control:
    """A pretraining, a fine-tuning, with pretrained and with random weights, and the phantoms of both."""

    flags: str
    head: str = "primus"
    lr: float = 1e-3
    volumes: int = 800
    # voxels of an unlabelled volume
    size: tuple[int, int, int] = LABELLED_SIZE
    strength: float = 0.24


CONTROLS = {
    "mae": Control(f"{VIT} --lr 1e-3 --batch_size 16 --samples_per_epoch 3200 --epochs 12"),
    "glmae": Control(f"{VIT} {GLMAE} {WEIGHTS} --lr 2e-3 --batch_size 8 --samples_per_epoch 1600 --epochs 14"),
    # Its levels need volumes of twice the size of its inputs, hence fewer of them.
    "mim": Control(
        f"{HYBRID} --lr 3e-3 --batch_size 4 --samples_per_epoch 400 --epochs 36",
        head="mim_light",
        lr=1e-2,
        volumes=200,
        size=(64, 64, 64),
        strength=0.25,
    ),
}


def pretrain(folder, method, shuffle=False):
    """Pretrain on phantoms and return the checkpoint."""
    control = CONTROLS[method]
    data = write_unlabelled(folder / "unlabelled", control.size, control.volumes, control.strength, shuffle)
    flags = f"--method {method} {control.flags} {PREPROCESSING} {VIEWS} {LOOP} {DECODER} --datalist {data}"
    folders = ["--cache_dir", folder / "cache", "--out_dir", folder / "pretraining"]
    run_module("Pretrain.main_pretrain", *flags.split(), *folders)
    return folder / "pretraining/checkpoint-last.pth"


def labelled(folder, method):
    """Write labelled phantoms and return the flags for them."""
    control = CONTROLS[method]
    preset = write_labelled(folder / "labelled", LABELLED_SIZE, training=8, validation=16, strength=control.strength)
    folders = ["--preset", preset, "--data", preset.parent, "--cache_dir", folder / "cache"]
    return [*folders, "--label_counts", 4, "--seeds", "0,1"]


def gain(folder, method, checkpoint, data):
    """Return what pretraining adds to the mean Dice at four labels, with its interval, by the table of a sweep."""
    control, settings = CONTROLS[method], folder / "settings.yaml"
    settings.write_text(f"lr: {control.lr}\n{SETTINGS}")
    flags = f"--models {control.head} --inits scratch,{method}={checkpoint} --updates 100 --settings {settings}"
    sweep([*map(str, data), *flags.split(), "--out", str(folder / "sweep")])
    rows = json.loads((folder / "sweep/sweep.json").read_text())["rows"]
    return next(row["minus_scratch"] for row in rows if row["init"] == method)


def frozen_gain(folder, method, checkpoint, data):
    """Return what pretraining adds to nearest neighbours of frozen patch features, with its interval."""
    probe([*map(str, data), *f"--probes knn --inits {method}={checkpoint} --out {folder / 'probe'}".split()])
    rows = json.loads((folder / "probe/probe.json").read_text())["summaries"]
    return next(row["minus_random"] for row in rows if (row["init"], row["probe"]) == (method, "knn patches"))


@pytest.mark.parametrize("method", CONTROLS)
def test_pretraining_helps_where_labels_cannot_teach(tmp_path, method):
    checkpoint, data = pretrain(tmp_path, method), labelled(tmp_path, method)
    found = {
        "frozen": frozen_gain(tmp_path, method, checkpoint, data),
        "trained": gain(tmp_path, method, checkpoint, data),
    }
    assert all(value["difference"] > LEAST_GAIN and value["ci95"][0] > 0 for value in found.values()), found


def test_pretraining_on_shuffled_voxels_does_not_help(tmp_path):
    found = gain(tmp_path, "mae", pretrain(tmp_path, "mae", shuffle=True), labelled(tmp_path, "mae"))
    assert found["difference"] < 0.06, found
