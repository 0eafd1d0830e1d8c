"""The commands of the documents run as written, one after another, on small volumes and with small networks.

They run in a copy of the repository. In a command only three things change: folders that stand for the reader's own
(`/data/...`) lie in the copy, numbers of processes are at most 2, and flags of size are added at its end (`SIZES`).
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from monai.networks.nets import ViT

from Finetune.presets import load_preset
from tests.documents import all_commands
from tests.Finetune.made import make_dataset
from tests.helpers import ROOT, write_scans

# start of a command -> why it is not run here
ELSEWHERE = {
    "bash scripts/demo.sh": "tests/scripts/test_demo.py",
    "bash scripts/test.sh": "runs these tests",
    "python generate_cache_files.py --datasets 1k": "needs the 746 volumes of two data sets",
    "python -m scripts.check_leakage --pretrain 1k": "needs the 746 volumes of two data sets",
    "python -m common.report runs/mine --watch": "does not end; tests/common/report/",
    "sbatch": "needs Slurm; tests/reliability/",
    "torchrun --nnodes=2": "needs two machines; tests/reliability/",
    "NPROC=8 bash scripts/pretrain_glmae.sh --out_dir": "needs the 746 volumes of two data sets",
    "python -m tests.reliability": "tests/reliability/",
    "DATA=/path/to/Task04_Hippocampus": "takes an hour, and needs the data set",
    "python my_": "tests/test_extending.py",
    'python -c "import sys, my_head': "tests/test_extending.py",
    "python -m Finetune.main_finetune --preset my_lungs.yaml": "tests/test_extending.py",
    "python -m Finetune.predict --checkpoint runs/lungs": "tests/test_extending.py",
    "python -m Finetune.evaluate --predictions runs/lungs": "tests/test_extending.py",
    "git clone": "needs a network",
    "source .venv/bin/activate": "needs a network",
}
VIT = "--model tiny --embed_dim 24 --depth 12 --num_heads 2 "
DECODER = "--decoder_embed_dim 24 --decoder_depth 1 --decoder_num_heads 2 "
PRETRAIN = (
    f"{VIT} {DECODER} --global_size 32 --local_size 32 --local_views 2 --out_dim 16 --hidden_dim 16 --bottleneck_dim 8 "
)
PRETRAIN += "--batch_size 2 --epochs 1 --warmup_epochs 0"
FINETUNE = "--embed_dim 24 --num_heads 2 --feature_size 4 --roi 32 --crops 1 --epochs 1 --warmup_epochs 0"
# program -> flags that make it small
SIZES = {
    "pretrain_glmae.sh": PRETRAIN,
    "BTCV/run.sh": FINETUNE,
    "Finetune.main_finetune": FINETUNE,
    "Finetune.sweep": "--updates 1 --models primus --label_counts 3 --seeds 0 --tune lr=1e-4,1e-3",
    "Finetune.probe": "--updates 2 --label_counts 3 --seeds 0 --roi 32 --learning_rates 1e-2",
    "-m benchmarks": "--quick --only cache",
}
RECIPE = "{embed_dim: 24, num_heads: 2, roi: [32, 32, 32], crops: 1, batch_size: 2}"
FOLDERS = {"/path/to/RawData/Training": "/data/BTCV", "/downloads/": "/data/downloads/"}


def documented():
    """Return the commands on lines of their own, without repeated ones."""
    return list(dict.fromkeys(command for command in all_commands() if not command.inline))


def runs_elsewhere(command):
    return any(command.text.startswith(start) for start in ELSEWHERE)


def made_small(text):
    """Return a command with the folders of the copy, few processes and flags of size."""
    for old, new in FOLDERS.items():
        text = text.replace(old, new)
    text = text.replace("/data/", "data/")
    text = re.sub(r"(NPROC=|--nproc_per_node=|--workers )\d+", r"\g<1>2", text)
    return " ".join([text, *(flags for program, flags in SIZES.items() if program in text)])


def copy_of_the_repository(folder):
    for name in ("Finetune", "Pretrain", "common", "scripts", "benchmarks", "assets", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *ROOT.glob("*.toml")]:
        shutil.copy(path, folder)


def make_data(folder):
    """Write what the documents take for given: all cases of BTCV, scans without labels, and a data set of one's own."""
    data, btcv = folder / "data", load_preset("BTCV")
    cases = make_dataset(btcv, data / "downloads/RawData/Training")
    for number in (*range(1, 11), *range(21, 41)):
        for source in (cases / "img/img0002.nii.gz", cases / "label/label0002.nii.gz"):
            target = source.with_name(source.name.replace("0002", f"{number:04d}"))
            if not target.exists():
                os.link(source, target)
    (data / "BTCV").symlink_to(cases)
    write_scans(data / "my_ct")
    write_scans(data / "scans")
    for name, kind in (("other", "img"), ("other_labels", "label")):
        (data / name).mkdir()
        for number in ("0001", "0035"):
            shutil.copy(cases / f"{kind}/{kind}{number}.nii.gz", data / name / f"case{number}.nii.gz")
    make_dataset(load_preset("MSD09_Spleen"), data / "my_organs")
    shutil.copy(folder / "Finetune/datasets/MSD09_Spleen.yaml", folder / "my_organs.yaml")


def prepare(folder, command):
    """Put in place what a reader has from an earlier step, under the name of the page."""
    if "monai_vit.pth" in command:
        sizes = dict(in_channels=1, img_size=32, patch_size=16, hidden_size=48, mlp_dim=192, num_layers=2, num_heads=12)
        torch.save(ViT(**sizes).state_dict(), folder / "monai_vit.pth")
    for name in re.findall(r"(?:runs/\w+/)?[\w-]+\.pth|runs/glmae/settings\.yaml", command):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            source = "settings.yaml" if name.endswith("yaml") else "checkpoint-last.pth"
            os.link(folder / "runs/mine" / source, folder / name)
    if "recipe.yaml" in command:
        (folder / "recipe.yaml").write_text(RECIPE)
    if "runs/fold?" in command and not (folder / "runs/fold0").exists():
        shutil.copytree(folder / "runs/btcv/predictions", folder / "runs/fold0/predictions")


@pytest.mark.slow
def test_documented_commands_run(tmp_path):
    copy_of_the_repository(tmp_path)
    make_data(tmp_path)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = kept | {"PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    chosen = [command for command in documented() if not runs_elsewhere(command)]
    assert len(chosen) > 15
    for text in dict.fromkeys(made_small(command.text) for command in chosen):
        prepare(tmp_path, text)
        done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    for made in (
        "runs/mine/checkpoint-last.pth",
        "runs/btcv/scores/scores.json",
        "scores/scores.json",
        "runs/compared",
        "exported/model.safetensors",
        "for_monai",
        "from_monai/model.safetensors",
        "runs/mine/report.html",
        "page.html",
        "runs/sweep/sweep.png",
        "runs/probe/probe.txt",
        "runs/benchmarks.json",
    ):
        assert (tmp_path / made).exists(), made
    assert len(list((tmp_path / "predictions").glob("*.nii.gz"))) == 2


def test_commands_that_are_not_run_are_documented():
    unused = [start for start in ELSEWHERE if not any(command.text.startswith(start) for command in documented())]
    assert unused == []
