"""The SLURM templates: checked by shellcheck, and run as they are against stand-ins for srun and scontrol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from Finetune import sweep
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


# ---------------------------------------------------------------- what is put back into the queue


def requeued(tmp_path, command: str, before: str = "", **env) -> tuple[int, str, str]:
    """(exit code, what was said, what scontrol was told) of run_or_requeue on `command`, in the folder $OUT_DIR."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(SCONTROL)
    (tmp_path / "bin/scontrol").chmod(0o755)
    script = "set -euo pipefail\nsource scripts/slurm/requeue.sh\n"
    script += f'{before}\nrun_or_requeue "$OUT_DIR" bash -c "$COMMAND"'
    env = {
        "OUT_DIR": tmp_path / "out",
        "COMMAND": command,
        "REQUEUED": tmp_path / "requeued",
        "SLURM_JOB_ID": 4711,
    } | env
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | {k: str(v) for k, v in env.items()}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, start_new_session=True
    )
    told = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    assert not list((tmp_path / "out").glob(".started*"))
    return done.returncode, done.stdout + done.stderr, told


OLD = 'mkdir -p "$OUT_DIR"; touch -d yesterday "$OUT_DIR"/{requeue,checkpoint-last.pth}'


@pytest.mark.parametrize(
    "command, again",
    [
        ("exit 0", False),
        ("exit 75", True),
        ("exit 1", False),
        ("kill -USR1 $$", True),  # before it listened
        ("sleep 0.1; touch $OUT_DIR/requeue; exit 1", True),  # torchrun has swallowed the 75
        (
            "sleep 0.1; mkdir -p $OUT_DIR/cells/b/run; touch $OUT_DIR/cells/b/run/requeue; exit 2",
            False,
        ),  # a neighbour's
        ("sleep 0.1; touch $OUT_DIR/checkpoint-last.pth; exit 1", True),  # a dead rank, a hang
        ("sleep 0.1; touch $OUT_DIR/checkpoint-last.pth; exit 0", False),
        ("kill -USR1 $PPID; sleep 0.1; exit 75", True),  # the signal goes to the script as well
    ],
    ids=str,
)
def test_what_was_asked_to_stop_or_got_further_is_started_again(tmp_path, command, again):
    code, said, told = requeued(tmp_path, command, before=OLD)
    assert told == ("requeue 4711\n" if again else ""), said
    assert (code == 0) == (again or command.endswith("exit 0")), said


def test_not_more_often_than_was_allowed_and_with_the_cores_of_the_task(tmp_path):
    env = {"SLURM_RESTART_COUNT": 3, "MAX_RESTARTS": 3, "SLURM_CPUS_PER_TASK": 64}
    code, said, told = requeued(tmp_path, "echo cores: $SRUN_CPUS_PER_TASK; exit 75", **env)
    assert code == 75 and told == "" and "started 3 times, not again" in said and "cores: 64" in said


@pytest.mark.parametrize(
    "script, flag",
    [("pretrain.sbatch", "--out_dir"), ("pretrain_multinode.sbatch", "--out_dir"), ("compare.sbatch", "--out")],
)
def test_a_folder_that_the_script_would_not_look_into_is_refused(tmp_path, script, flag):
    cluster = Cluster(tmp_path, tmp_path / "never")
    for words in ((flag, "elsewhere"), (f"{flag}=elsewhere",)):
        done = cluster.start(script, *words, OUT_DIR=tmp_path / "out")
        assert done.returncode == 2 and f"error: {words[0]}: set OUT_DIR instead" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_signal_to_every_process_of_the_job_waits_for_the_program(tmp_path):
    """`launch` becomes the program, so there is no shell that dies before it has saved."""
    program = tmp_path / "program"
    program.write_text(
        '#!/usr/bin/env bash\ntrap asked=1 USR1\ntouch $OUT_DIR/ready\nuntil [ -n "${asked:-}" ]; do sleep 0.05; done\n'
        "sleep 0.5; echo saved; touch $OUT_DIR/requeue; exit 1\n"
    )
    program.chmod(0o755)
    (tmp_path / "recipe.sh").write_text(f"source {ROOT}/scripts/env.sh\nlaunch some.module --flag\n")
    watch = "(until [ -e $OUT_DIR/ready ]; do sleep 0.05; done; kill -USR1 -- -$$) & "
    env = {"LAUNCHER": program, "PYTHON": sys.executable}
    _, said, _ = requeued(tmp_path, f"exec bash {tmp_path}/recipe.sh", before=watch, **env)
    assert 0 <= said.index("saved\n") < said.index("asked to stop: job 4711 goes back into the queue"), said


# ---------------------------------------------------------------- whole jobs


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

    def start(self, template: str | Path, *arguments: str, restarts: int = 0, **env) -> subprocess.CompletedProcess:
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

    def signalled(script, *arguments, when: str):
        """Started, signalled as soon as `find` finds something, and put back into the queue."""
        watch = f'until [ -n "$(find "$OUT_DIR" {when} 2>/dev/null)" ]; do sleep 0.1; done; echo 1 >"$UNDER_WAY"'
        (out / "under_way").unlink(missing_ok=True)
        watcher = subprocess.Popen(["bash", "-c", watch], env=cluster.env | {"OUT_DIR": str(out)})
        try:
            done = cluster.start(script, *map(str, arguments), **settings)
        finally:
            watcher.kill()
        assert done.returncode == 0 and "asked to stop" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
        assert cluster.requeued.read_text() == "requeue 4711\n" and not list(out.rglob("scores.json"))
        cluster.requeued.unlink()

    signalled("compare.sbatch", "--settings", tmp_path / "cells.yaml", when="-name log.jsonl -size +0")
    # the same grid as an array that --slurm writes
    grid = ["--preset", "MSD09_Spleen", "--data", data, "--inits", "scratch", "--seeds", "0", "--out", out]
    grid += ["--cache_dir", tmp_path / "cache", "--settings", tmp_path / "cells.yaml"]
    sweep.main([*map(str, grid), "--slurm"])
    signalled(out / "array.sbatch", when="-name predictions")
    last = cluster.start(out / "array.sbatch", restarts=1)
    assert last.returncode == 0 and not cluster.requeued.exists(), last.stdout[-2000:] + last.stderr[-4000:]
    (logs,) = [p for p in out.rglob("log.jsonl")]
    told = [json.loads(line)["epoch"] for line in logs.read_text().splitlines()]
    assert told == list(range(8)) and list(out.rglob("scores.json"))
