"""CPU and GPU agree on the losses and gradients of every method and every network, and on a label map."""

import copy

import nibabel as nib
import numpy as np
import pytest
import torch

from common.data.loader import to_device
from Finetune.architectures import ModelSettings, build_model, resolve
from Finetune.engine_finetune import Finetuning, SegmentationLosses
from Finetune.heads import HEADS
from Finetune.losses import classification_losses
from Finetune.presets import load_preset
from tests.Finetune import predicting
from tests.Pretrain.test_cuda_fake import METHODS, build, views, volumes

pytestmark = pytest.mark.cuda

VIT = dict(embed_dim=24, depth=4, num_heads=2, patch_size=(16, 16, 16))
# no drop path: a seed gives other random numbers on a GPU
HYBRID = dict(embed_dims=(6, 6, 12, 24), depths=(1, 1, 1, 1), num_heads=2, drop_path=0.0)
# the sizes of each network, where they are not those of the ViT
SIZES = {"unetr": VIT | {"feature_size": 4}, "swinunetr": {"feature_size": 12}, "dynunet": {"feature_size": 2}}
SIZES |= dict.fromkeys((name for name, head in HEADS.items() if head.encoder == "hybrid"), HYBRID)


def losses_and_gradients(method, batch, device):
    """The losses, and the gradient of their sum by the name of the parameter."""
    method = copy.deepcopy(method).to(device)
    torch.manual_seed(0)
    losses = {name: value for name, value in method(to_device(batch, device)).items() if value.requires_grad}
    sum(losses.values()).backward()
    gradients = {name: p.grad.cpu() for name, p in method.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in losses.items()}, gradients


def assert_agree(method, batch, device):
    losses, gradients = losses_and_gradients(method, batch, torch.device("cpu"))
    found, found_gradients = losses_and_gradients(method, batch, device)
    assert losses and found == pytest.approx(losses, rel=1e-4)
    assert found_gradients.keys() == gradients.keys()
    # the key biases have no gradient but rounding errors
    scale = max(gradient.norm().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        apart = (found_gradients[name] - gradient).norm().item()
        assert apart < 1e-3 * (gradient.norm().item() + 1e-3 * scale), name


@pytest.mark.parametrize("name", METHODS)
def test_pretraining(device, name):
    assert_agree(build(name), volumes() if name.startswith("mim") else views(), device)


@pytest.mark.parametrize("name", HEADS)
def test_networks(device, name):
    classifies = "classif" in name
    preset = load_preset("CC_CCII" if classifies else "BTCV")
    settings = ModelSettings(model=name, roi=(64, 64, 64), **SIZES.get(name, VIT))
    network = build_model(resolve(settings, preset, None))
    losses = classification_losses if classifies else SegmentationLosses(preset)
    if classifies:
        batch = {"image": torch.rand(2, 1, 64, 64, 64), "target": torch.tensor([0, 1])}
    else:
        crops = torch.rand(1, 2, 1, 64, 64, 64)
        batch = {"image": crops, "label": (crops * preset.out_channels).to(torch.uint8)}
    assert_agree(Finetuning(network, losses), batch, device)


def test_prediction(device, tmp_path):
    preset = load_preset("sample_abdomen")
    file = predicting.save_checkpoint(tmp_path / "c.pth", preset)
    predicting.write_ct(tmp_path / "in/plain.nii.gz", preset, predicting.AFFINES["flipped"])
    predicting.run(file, tmp_path / "in", tmp_path / "cpu", "--device", "cpu")
    predicting.run(file, tmp_path / "in", tmp_path / "device", "--device", device.type, "--amp", "off")
    maps = [np.asarray(nib.load(tmp_path / name / "plain.nii.gz").dataobj) for name in ("cpu", "device")]
    assert len(np.unique(maps[0])) > 1 and (maps[0] == maps[1]).mean() > 0.999
