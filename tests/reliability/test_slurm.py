"""The SLURM templates: checked by shellcheck, and run as they are against stand-ins for srun and scontrol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from Finetune.presets import load_preset
from tests.Finetune.made import make_dataset
from tests.helpers import ROOT, ct, write_nifti
from tests.reliability.compare import difference

TEMPLATES = sorted((ROOT / "scripts/slurm").glob("*.sbatch"))
SRUN = """#!/usr/bin/env bash
# Stand-in: one task per node of SLURM_NNODES, all here. On the first start, Slurm's signal once $UNDER_WAY is there.
while [[ "$1" == --* ]]; do shift; done
pids=()
for ((node = 0; node < ${SLURM_NNODES:-1}; node++)); do
  setsid env SLURM_NODEID="$node" "$@" &
  pids+=($!)
done
if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
  while [ ! -s "$UNDER_WAY" ] && kill -0 "${pids[0]}" 2>/dev/null; do sleep 0.1; done
  for pid in "${pids[@]}"; do kill -USR1 -- "-$pid"; done
fi
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; else echo "$@" >>"$REQUEUED"; fi
"""
RECIPE = """source "{root}/scripts/env.sh"
launch Pretrain.main_pretrain --method glmae --model tiny --embed_dim 24 --depth 2 --num_heads 2 --patch_size 8 \\
  --decoder_embed_dim 24 --decoder_depth 1 --decoder_num_heads 2 --global_size 32 --local_size 16 --local_views 2 \\
  --hidden_dim 32 --bottleneck_dim 8 --out_dim 16 --batch_size 4 --samples_per_epoch 40 --epochs 8 --warmup_epochs 0 \\
  --lr 1e-3 \\
  --device cpu "$@"
"""


def test_there_are_templates():
    assert [t.name for t in TEMPLATES] == ["compare.sbatch", "pretrain.sbatch", "pretrain_multinode.sbatch"]


@pytest.mark.parametrize(
    "script", [*TEMPLATES, ROOT / "scripts/slurm/requeue.sh", ROOT / "scripts/env.sh"], ids=lambda p: p.name
)
def test_shellcheck(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "--shell=bash", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", TEMPLATES, ids=lambda p: p.name)
def test_directives_ask_for_what_the_requeue_needs(script):
    text = script.read_text()
    for directive in ("--signal=USR1@300", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {directive}\n" in text
    assert text.index("#SBATCH") < text.index(
        "# ---------------------------------------------------------------- settings"
    )


class Cluster:
    """Starts a template as Slurm would, as often as it asks to be started."""

    def __init__(self, folder: Path, under_way: Path, nodes: int = 1):
        self.requeued = folder / "requeued.txt"
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            tool = folder / "bin" / name
            tool.parent.mkdir(exist_ok=True)
            tool.write_text(text)
            tool.chmod(0o755)
        self.env = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "REQUEUED": str(self.requeued),
            "UNDER_WAY": str(under_way),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NNODES": str(nodes),
            "SLURM_ARRAY_TASK_ID": "0",
            "OMP_NUM_THREADS": "1",
            "WORKERS": "1",
            "GPUS": "1",
            "GRACE": "60",
        }

    def start(self, template: str, *arguments: str, restarts: int = 0, **env) -> subprocess.CompletedProcess:
        env = self.env | {"SLURM_RESTART_COUNT": str(restarts)} | {k: str(v) for k, v in env.items()}
        return subprocess.run(
            ["bash", ROOT / "scripts/slurm" / template, *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=240,
        )


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    """A recipe, scans, and the run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("slurm")
    for number in range(3):
        write_nifti(folder / f"scans/scan{number}.nii.gz", ct((40, 36, 30), seed=number))
    (folder / "recipe.sh").write_text(RECIPE.format(root=ROOT))
    settings = {"RECIPE": folder / "recipe.sh", "DATALIST": folder / "scans", "CACHE_DIR": folder / "cache"}
    command = [
        "bash",
        folder / "recipe.sh",
        "--datalist",
        folder / "scans",
        "--cache_dir",
        folder / "cache",
        "--out_dir",
        folder / "whole",
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHON": sys.executable})
    return folder, settings


@pytest.mark.slow
@pytest.mark.parametrize("template, nodes", [("pretrain.sbatch", 1), ("pretrain_multinode.sbatch", 2)])
def test_a_signalled_job_saves_goes_back_into_the_queue_and_ends_as_if_nothing_had_been(
    pretraining, tmp_path, template, nodes
):
    folder, settings = pretraining
    out = tmp_path / "out"
    cluster = Cluster(tmp_path, out / "log.jsonl", nodes)
    first = cluster.start(template, OUT_DIR=out, **settings)
    assert first.returncode == 0 and cluster.requeued.exists(), first.stdout[-2000:] + first.stderr[-4000:]
    assert cluster.requeued.read_text() == "requeue 4711\n" and "asked to stop: saved after" in first.stdout
    assert (out / "requeue").exists() and not (out / "checkpoint-7.pth").exists()
    second = cluster.start(template, restarts=1, OUT_DIR=out, **settings)
    assert second.returncode == 0 and "resuming from" in second.stdout, second.stdout[-2000:] + second.stderr[-4000:]
    assert cluster.requeued.read_text() == "requeue 4711\n" and (out / "checkpoint-7.pth").exists()
    if nodes == 1:
        assert difference(out, folder / "whole") == ""


@pytest.mark.slow
def test_a_job_that_fails_is_not_started_again_and_neither_is_one_too_many(pretraining, tmp_path):
    _, settings = pretraining
    cluster = Cluster(tmp_path, tmp_path / "never")
    failed = cluster.start(
        "pretrain.sbatch", restarts=1, OUT_DIR=tmp_path / "out", **settings | {"DATALIST": tmp_path / "nowhere"}
    )
    assert failed.returncode != 0 and "nowhere" in failed.stderr and not cluster.requeued.exists()
    (tmp_path / "tired.sh").write_text('mkdir -p "$OUT_DIR"; touch "$OUT_DIR/requeue"; exit 1\n')
    tired = {"OUT_DIR": tmp_path / "tired", **settings, "RECIPE": tmp_path / "tired.sh"}
    assert cluster.start("pretrain.sbatch", restarts=100, **tired).returncode == 1 and not cluster.requeued.exists()
    assert cluster.start("pretrain.sbatch", restarts=99, **tired).returncode == 0 and cluster.requeued.exists()


@pytest.mark.slow
def test_a_signalled_cell_of_a_comparison_goes_on_too(tmp_path):
    data = make_dataset(load_preset("MSD09_Spleen"), tmp_path / "spleen")
    small = "model: unetr\nembed_dim: 24\ndepth: 4\nnum_heads: 2\nfeature_size: 4\nroi: 32\npatch_size: 16\nlr: 0.001\n"
    small += (
        "batch_size: 1\ncrops: 1\nworkers: 1\nwarmup_epochs: 0\nvalidate_every: 0\nsamples_per_epoch: 8\nepochs: 8\n"
    )
    (tmp_path / "cells.yaml").write_text(small)
    out = tmp_path / "out"
    settings = {
        "PRESET": "MSD09_Spleen",
        "DATA": data,
        "INITS": "scratch",
        "SEEDS": "0",
        "OUT_DIR": out,
        "CACHE_DIR": tmp_path / "cache",
    }
    (tmp_path / "bin").mkdir()
    cluster = Cluster(tmp_path, out / "under_way")
    watch = 'until [ -n "$(find "$OUT_DIR" -name log.jsonl -size +0 2>/dev/null)" ]; do sleep 0.1; done; '
    watch += 'echo 1 >"$UNDER_WAY"'
    watcher = subprocess.Popen(["bash", "-c", watch], env=cluster.env | {"OUT_DIR": str(out)})
    try:
        first = cluster.start("compare.sbatch", "--settings", str(tmp_path / "cells.yaml"), **settings)
    finally:
        watcher.kill()
    assert first.returncode == 0 and cluster.requeued.exists(), first.stdout[-2000:] + first.stderr[-4000:]
    second = cluster.start("compare.sbatch", "--settings", str(tmp_path / "cells.yaml"), restarts=1, **settings)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-4000:]
    (logs,) = [p for p in out.rglob("log.jsonl")]
    told = [json.loads(line)["epoch"] for line in logs.read_text().splitlines()]
    assert told == list(range(8)) and list(out.rglob("scores.json"))
