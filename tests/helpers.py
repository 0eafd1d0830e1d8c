"""What many tests use: small volumes, empty files, runs of programs and their logs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def ct(shape=(40, 36, 32), seed=0) -> np.ndarray:
    """Return a CT-like volume in HU, int16: an ellipsoid in air with four blobs and noise."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    volume = np.where(sum(x**2 for x in axes) < 0.8, 40.0, -1000.0)
    for _ in range(4):
        centre = rng.uniform(-0.5, 0.5, 3)
        volume[sum((x - c) ** 2 for x, c in zip(axes, centre)) < 0.04] = rng.uniform(-100, 300)
    return (volume + rng.normal(0, 10, shape)).astype(np.int16)


def write_nifti(path: Path, data: np.ndarray, spacing=(2.0, 2.0, 2.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([*spacing, 1.0])), path)
    return path


def touch(folder: Path, *names: str) -> None:
    """Write empty files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_scans(folder: Path) -> Path:
    """Write three CT-like volumes of different depth, and return their folder."""
    for i in range(3):
        write_nifti(folder / f"scan{i}.nii.gz", ct((40, 36, 30 + 4 * i), seed=i))
    return folder


def read_log(out_dir: str | Path) -> list[dict]:
    """Return the lines of the log.jsonl of a run."""
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def run_module(
    *args, nproc: int = 1, cwd: Path = ROOT, check: bool = True, timeout: float | None = None, **env
) -> subprocess.CompletedProcess:
    """Run one of this repository's programs as a user would, through torchrun if `nproc` > 1.

    With `check`, an exit code other than 0 fails the test with the program's output. After `timeout` seconds the
    program is killed and the test fails.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    command = [sys.executable, *launcher, "-m", *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    if check:
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
    return done
