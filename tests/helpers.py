"""Small volumes and programs for tests."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def ct(shape=(40, 36, 32), seed=0) -> np.ndarray:
    """A CT-like volume in HU, int16: an ellipsoid body in air with a few blobs and noise."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    volume = np.where(sum(g**2 for g in grid) < 0.8, 40.0, -1000.0)
    for _ in range(4):
        centre = rng.uniform(-0.5, 0.5, 3)
        volume[sum((g - c) ** 2 for g, c in zip(grid, centre)) < 0.04] = rng.uniform(-100, 300)
    return (volume + rng.normal(0, 10, shape)).astype(np.int16)


def write_nifti(path: Path, data: np.ndarray, spacing=(2.0, 2.0, 2.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([*spacing, 1.0])), path)
    return path


def run_module(*args, nproc: int = 1, cwd: Path = ROOT, check: bool = True, **env) -> subprocess.CompletedProcess:
    """A program of ours as a user starts it; `nproc` > 1 through torchrun. Fails the test with its output unless
    `check` is False."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    command = [sys.executable, *launcher, "-m", *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if check:
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done
