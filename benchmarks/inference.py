"""Sliding-window inference with 14 classes: time and memory against MONAI, and the peak memory of Finetune.predict."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from benchmarks.harness import Row, alternate, peak_memory, peak_resident
from common import checkpoint
from common.config import to_dict
from Finetune.architectures import Architecture, build_model
from Finetune.inference.label_map import largest_channel
from Finetune.inference.sliding_window import Window, predictor, slabs
from Finetune.presets import load_preset

CLASSES = 14
WINDOW = Window((96, 96, 96), overlap=0.25, batch=1)


def measure_window(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Return the row of a label map of a volume by our slabs and by MONAI's inferer.

    The network is one 1x1x1 convolution: what is measured is cutting, blending and storing, not a network. On CUDA
    MONAI's sums stay on the GPU, as they do by default, and ours are always in host memory.
    """
    shape, rounds = ((256, 256, 128), 1) if quick else ((512, 512, 200), 2)
    model = nn.Conv3d(1, CLASSES, 1).eval().requires_grad_(False).to(device)
    image = torch.rand(1, *shape)
    pair = {"ours": lambda: our_labels(model, image, device), "theirs": lambda: monai_labels(model, image, device)}
    agreement = (pair["ours"]() == pair["theirs"]().cpu()).float().mean().item()
    assert agreement > 0.9999, f"the label maps agree in {agreement:.4%} of the voxels only"
    seconds = alternate(pair, rounds)
    # host memory on the CPU; on CUDA the memory of the GPU, which is the scarce one
    peaks = {name: peak_memory(function, device) for name, function in pair.items()}
    name = f"sliding window, {CLASSES} classes, {'x'.join(map(str, shape))}"
    row = Row(
        name=name,
        against="MONAI SlidingWindowInferer",
        ours=seconds["ours"],
        theirs=seconds["theirs"],
        aim=1.0,
        peak_bytes=peaks["ours"],
        their_peak_bytes=peaks["theirs"],
        memory_aim=0.25,
    )
    return [row.as_dict()]


@torch.no_grad()
def our_labels(model: nn.Module, image: Tensor, device: torch.device) -> Tensor:
    """Return the label map (D, H, W) uint8 of an image (C, D, H, W), slab by slab."""
    labels = torch.empty(image.shape[1:], dtype=torch.uint8)
    for row, logits in slabs(image, predictor(model, device, None), WINDOW):
        labels[row : row + logits.shape[1]] = largest_channel(logits)
    return labels


@torch.no_grad()
def monai_labels(model: nn.Module, image: Tensor, device: torch.device) -> Tensor:
    """Return the same from MONAI's inferer, which holds the logits of the whole volume."""
    inferer = SlidingWindowInferer(WINDOW.roi, WINDOW.batch, WINDOW.overlap, WINDOW.blending)
    return inferer(image[None].to(device), model)[0].argmax(0).to(torch.uint8)


# ---------------------------------------------------------------- the program


def measure_prediction(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Return the row of the peak host memory of Finetune.predict, beside the size of the logits alone.

    The preset keeps the spacing of the file, so that the logits are as large as the volume: the worst case. The volume
    is noise. The network has random weights; its size only adds the activations of one window.
    """
    shape = (256, 256, 128) if quick else (512, 512, 600)
    with tempfile.TemporaryDirectory(prefix="benchmark-predict-") as folder:
        write_volume(Path(folder), shape)
        write_checkpoint(Path(folder))
        peak = predict(Path(folder), device)
    name = f"peak host memory of Finetune.predict, {CLASSES} classes, {'x'.join(map(str, shape))}"
    logits = CLASSES * 4 * float(np.prod(shape))
    note = "with Python and its libraries"
    row = Row(name=name, against="the logits of the volume alone", ours=peak, theirs=logits, unit="bytes", note=note)
    return [row.as_dict()]


def write_volume(folder: Path, shape: tuple[int, int, int]) -> None:
    (folder / "in").mkdir()
    volume = np.random.default_rng(0).integers(-200, 300, shape, dtype=np.int16)
    nib.save(nib.Nifti1Image(volume, np.diag([-0.8, -0.8, 1.0, 1.0])), folder / "in/volume.nii")


def write_checkpoint(folder: Path) -> None:
    preset = replace(load_preset("BTCV"), spacing=None, foreground_threshold=None)
    sizes = {"patch_size": (16, 16, 16), "feature_size": 16, "embed_dim": 192, "depth": 4, "num_heads": 3}
    architecture = Architecture("linear", in_chans=1, out_channels=CLASSES, roi=preset.roi, **sizes)
    args = {"preset": to_dict(preset), "architecture": to_dict(architecture), "config": {"fold": 0, "seed": 0}}
    args |= {"training_cases": [], "validation_cases": []}
    checkpoint.save(folder / "random.pth", {"state_dict": build_model(architecture).state_dict(), "args": args})


def predict(folder: Path, device: torch.device) -> float:
    """Run Finetune.predict. Return the peak of its resident memory in bytes."""
    command = [sys.executable, "-m", "Finetune.predict", "--checkpoint", str(folder / "random.pth")]
    command += ["--images", str(folder / "in"), "--out", str(folder / "out"), "--device", device.type, "--overlap", "0"]
    return peak_resident(command)
