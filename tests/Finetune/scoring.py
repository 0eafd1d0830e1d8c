"""Finetune.evaluate on label maps in a folder."""

import json

import nibabel as nib
import numpy as np

from Finetune.evaluate import main

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def save(path, values, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.astype(np.uint8), affine), path)


def run(folder, *extra, out="card"):
    flags = ["--predictions", folder / "p", "--labels", folder / "label", "--preset", "BTCV", "--out", folder / out]
    main([*map(str, flags), *map(str, extra)])
    return json.loads((folder / out / "scores.json").read_text())
