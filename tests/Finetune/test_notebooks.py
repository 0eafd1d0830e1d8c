"""The notebooks hold no outputs, and their cells run from top to bottom, unchanged and in their own folder."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch

from Finetune.models_3dvit import vit_base_patch16_3d
from scripts.make_sample_data import make
from tests.helpers import ROOT

NOTEBOOKS = sorted((ROOT / "Finetune/notebooks").glob("*.ipynb"))


def cells_of(path):
    return json.loads(path.read_text())["cells"]


def code_of(path):
    return ["".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "code"]


def execute(path, work, **environment):
    """Run the code cells in a process, as Jupyter does in the notebook's folder, and return what they print."""
    settings = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "2", "WORK": str(work), "SAMPLES": "4"} | environment
    # only what the cells themselves put on the path
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "\n".join(code_of(path))]
    done = subprocess.run(command, cwd=path.parent, env=kept | settings, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_and_code_is_complete(path):
    cells = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    for source in code_of(path):
        ast.parse(source)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "sample_abdomen"
    make(out, synthetic=True)
    return str(out)


@pytest.mark.slow
def test_the_load_pretrained_notebook_runs(tmp_path, data):
    printed = execute(ROOT / "Finetune/notebooks/load_pretrained.ipynb", tmp_path, DATA=data)
    for expected in ("pretraining a small MAE", "78 of 78 encoder tensors", "0 missing", "share of the variance"):
        assert expected in printed
    assert "was trained on other inputs than those of preset sample_abdomen" in printed
    assert "1 of 1 label maps" in printed and "equal features: True" in printed


@pytest.mark.slow
def test_the_reconstruct_notebook_runs(tmp_path, data):
    printed = execute(ROOT / "Finetune/notebooks/reconstruct.ipynb", tmp_path, DATA=data)
    assert "in the units of the input" in printed and "86 of 216 patches seen" in printed
    errors = printed.split("mean squared error over the removed patches: ")[1].split("; of their true means: ")
    assert all(0 < float(error) < 1 for error in errors)


@pytest.mark.slow
def test_a_checkpoint_of_the_authors_shape_is_loaded(tmp_path, data):
    """The cells that need no more than a checkpoint-1599.pth, with a file of the published names and shapes."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vit_base_patch16_3d(img_size=160).state_dict().items()}
    weights = {f"module.backbone.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    torch.save({"student": weights | {"module.head.mlp.0.weight": torch.zeros(1)}}, tmp_path / "checkpoint-1599.pth")
    path = ROOT / "Finetune/notebooks/load_pretrained.ipynb"
    sources = code_of(path)
    last = next(number for number, source in enumerate(sources) if "return_layers" in source)
    command = [sys.executable, "-c", "\n".join(sources[: last + 1])]
    settings = {"MPLBACKEND": "Agg", "DATA": data, "CHECKPOINT": str(tmp_path / "checkpoint-1599.pth")}
    done = subprocess.run(command, cwd=path.parent, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for expected in ("150 of 150", "0 missing, 1 unexpected", "(1, 768)", "(1, 216, 768)", "[(1, 49, 768)"):
        assert expected in done.stdout
