"""Measure the peak host memory of Finetune.predict for 14 classes on a volume of 512 x 512 x 600 voxels.

    python -m benchmarks.predict_memory --out runs/predict_memory

The preset keeps the spacing of the file, so that the logits are as large as the volume: the worst case (8.8 GB if all
were in memory). The volume is noise. The network has random weights; its size only adds the activations of one window.

Measured on one thread of a busy two-core machine, versions of constraints.txt: 4.46 GB at the peak with these defaults
(177 s), 4.62 GB with `--model unetr --overlap 0` (719 s).
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np

from common import checkpoint
from common.cli import parse, run_program
from common.config import setting, to_dict
from common.runlog import print_main
from Finetune.architectures import Architecture, build_model
from Finetune.evaluation.formats import write_json
from Finetune.presets import load_preset

CLASSES = 14


@dataclass(kw_only=True)
class MemorySettings:
    """Settings of the measurement."""

    out: Path = setting(help="folder for the volume, the checkpoint, the prediction and memory.json")
    shape: tuple[int, int, int] = setting((512, 512, 600), "voxels of the volume")
    model: Literal["linear", "unetr"] = setting("linear", "linear is fast; unetr adds the activations of a decoder")
    overlap: float = setting(0.25, "overlap of the sliding window; changes the time, not the memory", least=0, below=1)


def main(argv: list[str] | None = None) -> None:
    config = parse(MemorySettings, argv, description=__doc__)
    write_volume(config)
    write_checkpoint(config)
    start = time.time()
    peak = predict(config)
    result = {
        "shape": list(config.shape),
        "classes": CLASSES,
        "model": config.model,
        "peak_gb": round(peak / 1e9, 2),
        "logits_gb": round(CLASSES * 4 * float(np.prod(config.shape)) / 1e9, 2),
        "seconds": round(time.time() - start),
    }
    write_json(config.out / "memory.json", result)
    print_main(json.dumps(result))


def write_volume(config: MemorySettings) -> None:
    (config.out / "in").mkdir(parents=True, exist_ok=True)
    volume = np.random.default_rng(0).integers(-200, 300, config.shape, dtype=np.int16)
    nib.save(nib.Nifti1Image(volume, np.diag([-0.8, -0.8, 1.0, 1.0])), config.out / "in/volume.nii")


def write_checkpoint(config: MemorySettings) -> None:
    preset = replace(load_preset("BTCV"), spacing=None, foreground_threshold=None)
    sizes = {"patch_size": (16, 16, 16), "feature_size": 16, "embed_dim": 192, "depth": 4, "num_heads": 3}
    architecture = Architecture(config.model, in_chans=1, out_channels=CLASSES, roi=preset.roi, **sizes)
    args = {"preset": to_dict(preset), "architecture": to_dict(architecture), "config": {"fold": 0, "seed": 0}}
    args |= {"training_cases": [], "validation_cases": []}
    checkpoint.save(config.out / "random.pth", {"state_dict": build_model(architecture).state_dict(), "args": args})


def predict(config: MemorySettings) -> int:
    """Run Finetune.predict. Return its peak memory in bytes."""
    command = [sys.executable, "-m", "Finetune.predict", "--checkpoint", str(config.out / "random.pth")]
    command += ["--images", str(config.out / "in"), "--out", str(config.out / "predictions")]
    subprocess.run([*command, "--device", "cpu", "--overlap", str(config.overlap)], check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(run_program(main))
