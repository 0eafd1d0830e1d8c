"""The cells of the notebook run unchanged, in its own folder, with Finetune/ on the path."""

import json
import os
import subprocess
import sys

import pytest
import torch

from Finetune.models_3dvit import vit_base_patch16_3d
from tests.helpers import ROOT

NOTEBOOKS = ROOT / "Finetune/notebooks"


@pytest.mark.slow
def test_the_load_pretrained_notebook_runs(tmp_path):
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vit_base_patch16_3d(img_size=160).state_dict().items()}
    weights = {f"module.backbone.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    torch.save({"student": weights | {"module.head.mlp.0.weight": torch.zeros(1)}}, tmp_path / "checkpoint-1599.pth")
    cells = json.loads((NOTEBOOKS / "load_pretrained.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # print the last line of each cell, which a notebook displays
    for cell, source in enumerate(sources[1:], 1):
        body, _, last = f"\n{source}".rpartition("\n")
        sources[cell] = f"{body}\nprint(({last}))"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "CHECKPOINT": str(tmp_path / "checkpoint-1599.pth")
    }
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(sources)], cwd=NOTEBOOKS, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for expected in (
        "150 of 150",
        "(0, 1)",
        "torch.Size([1, 768])",
        "torch.Size([6, 6, 6])",
        "torch.Size([1, 193, 768])",
    ):
        assert expected in done.stdout
