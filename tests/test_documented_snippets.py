"""The Python of the documents that loads an encoder runs as printed, beside a ViT-B of the repository."""

import subprocess
import sys

import pytest
import torch

from Finetune.models_3dvit import vit_base_patch16_3d
from tests.documents import FENCED
from tests.helpers import ROOT

pytestmark = pytest.mark.slow


def snippet(page, word):
    """Return the one block of Python of a page that has this word."""
    blocks = [text for language, text in FENCED.findall((ROOT / page).read_text()) if language == "python"]
    (found,) = [text for text in blocks if word in text]
    return found


def run(folder, before, code, after):
    """Run Python in a folder, with Finetune/ on its path as the README says."""
    text = f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'Finetune')!r}]\n{before}\n{code}\n{after}\n"
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = vit_base_patch16_3d(img_size=96, patch_size=16)
    weights = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("snippets") / "checkpoint-1599.pth"
    torch.save({"student": weights, "args": {"grid_size": [6, 6, 6], "num_heads": 12}}, path)
    return path


def test_the_snippet_of_the_readme(checkpoint):
    code = snippet("README.md", "load_pretrained_checkpoint")
    shapes = "print(missing_keys, unexpected_keys, tuple(features.shape), tuple(patches.shape))"
    printed = run(checkpoint.parent, "import torch\nvolume = torch.rand(2, 1, 96, 96, 96)", code, shapes)
    assert printed.splitlines()[-1] == "[] [] (2, 768) (2, 216, 768)"


def test_the_snippet_that_loads_an_export(checkpoint):
    # the line that needs a network is left out
    lines = snippet("docs/checkpoints.md", "from_pretrained").splitlines()
    code = "\n".join(line for line in lines if "owner/name" not in line)
    assert len(code.splitlines()) == len(lines) - 1
    export = [sys.executable, "-m", "Finetune.export", checkpoint, "--to", checkpoint.parent / "exported"]
    subprocess.run(export, cwd=ROOT, check=True, capture_output=True)
    printed = run(checkpoint.parent, "", code, "print(encoder.grid_size)")
    assert printed.splitlines()[-1] == "(8, 8, 8)"
