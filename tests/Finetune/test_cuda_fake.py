"""Training steps of every network and every kind of loss on fake CUDA tensors."""

from functools import partial

import pytest
import torch

from Finetune.architectures import ModelSettings, build_model, resolve
from Finetune.engine_finetune import Finetuning, SegmentationLosses, make_optimizer
from Finetune.losses import classification_losses
from Finetune.presets import load_preset
from tests.common.fake_cuda import check, train

VIT = dict(embed_dim=24, depth=4, num_heads=2, patch_size=(16, 16, 16), drop_path=0.1)
HYBRID = dict(embed_dims=(6, 6, 12, 24), depths=(1, 1, 1, 1), num_heads=2)
# one preset for each kind of loss
DICE_CE, REGIONS, CLASSES = "BTCV", "MSD01_BrainTumour", "CC_CCII"
RUNS = [
    ("unetr", DICE_CE, VIT | {"feature_size": 4}, {}),
    ("unetr", REGIONS, VIT | {"feature_size": 4}, {"layer_decay": 0.75}),
    ("linear", DICE_CE, VIT, {"freeze": True}),
    ("mim", DICE_CE, HYBRID, {}),
    ("mim_light", DICE_CE, HYBRID, {}),
    pytest.param("swinunetr", REGIONS, {"feature_size": 12}, {}, marks=pytest.mark.slow),
    ("dynunet", DICE_CE, {"feature_size": 2}, {}),
    ("classifier", CLASSES, VIT, {}),
]


@pytest.mark.parametrize("model, preset, sizes, how", RUNS)
def test_a_step_stays_on_the_device_and_never_waits(model, preset, sizes, how):
    preset = load_preset(preset)
    network = build_model(resolve(ModelSettings(model=model, roi=(64, 64, 64), **sizes), preset, None))
    classifies = preset.task == "classification"
    losses = classification_losses if classifies else SegmentationLosses(preset)

    def batch():
        if classifies:
            return {"image": torch.rand(2, 1, 64, 64, 64), "target": torch.zeros(2, dtype=torch.long)}
        crops = torch.rand(1, 2, preset.channels, 64, 64, 64)
        return {"image": crops, "label": torch.zeros(1, 2, 1, 64, 64, 64, dtype=torch.uint8)}

    names = {"ce"} if classifies else {"dice"} if preset.regions else {"dice", "ce"}
    optimizer = partial(make_optimizer, weight_decay=1e-5, layer_decay=how.get("layer_decay"))
    method = Finetuning(network, losses, freeze=how.get("freeze", False))
    check(*train(method, batch, {"dice": 1.0, "ce": 1.0}, optimizer), names)
