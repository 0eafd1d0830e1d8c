"""The SLURM templates, checked by shellcheck and run with replacements for srun and scontrol."""

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
from tests.reliability.difference import difference

TEMPLATES = sorted((ROOT / "scripts/slurm").glob("*.sbatch"))
SRUN = """#!/usr/bin/env bash
# Run SLURM_NNODES tasks on this machine. On the first start, send Slurm's signal once $UNDER_WAY has content.
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


def test_the_list_of_templates():
    assert [t.name for t in TEMPLATES] == ["pretrain.sbatch", "pretrain_multinode.sbatch", "sweep.sbatch"]


@pytest.mark.parametrize(
    "script", [*TEMPLATES, ROOT / "scripts/slurm/requeue.sh", ROOT / "scripts/env.sh"], ids=lambda p: p.name
)
def test_shellcheck(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "--shell=bash", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", TEMPLATES, ids=lambda p: p.name)
def test_directives_request_signal_and_requeue(script):
    text = script.read_text()
    for directive in ("--signal=USR1@300", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {directive}\n" in text
    assert text.index("#SBATCH") < text.index(
        "# ---------------------------------------------------------------- settings"
    )


# ---------------------------------------------------------------- which jobs are requeued


def run_and_requeue(tmp_path, command: str, before: str = "", **env) -> tuple[int, str, str]:
    """Run `run_or_requeue` on a command. Return its exit code, its output and the arguments of scontrol."""
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
    arguments = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    assert not list((tmp_path / "out").glob(".started*"))
    return done.returncode, done.stdout + done.stderr, arguments


OLD = 'mkdir -p "$OUT_DIR"; touch -d yesterday "$OUT_DIR"/{requeue,checkpoint-last.pth}'


@pytest.mark.parametrize(
    "command, requeue",
    [
        ("exit 0", False),
        ("exit 75", True),
        ("exit 1", False),
        # A program that is stopped before it has installed its handlers:
        ("kill -USR1 $$", True),
        # torchrun ends with 1 instead of 75:
        ("sleep 0.1; touch $OUT_DIR/requeue; exit 1", True),
        # The marker of another run of the sweep:
        ("sleep 0.1; mkdir -p $OUT_DIR/runs/b/training; touch $OUT_DIR/runs/b/training/requeue; exit 2", False),
        # A dead rank, a hang:
        ("sleep 0.1; touch $OUT_DIR/checkpoint-last.pth; exit 1", True),
        ("sleep 0.1; touch $OUT_DIR/checkpoint-last.pth; exit 0", False),
        # The script receives the signal too:
        ("kill -USR1 $PPID; sleep 0.1; exit 75", True),
    ],
    ids=str,
)
def test_a_stopped_job_or_one_with_a_new_checkpoint_is_requeued(tmp_path, command, requeue):
    code, output, arguments = run_and_requeue(tmp_path, command, before=OLD)
    assert arguments == ("requeue 4711\n" if requeue else ""), output
    assert (code == 0) == (requeue or command.endswith("exit 0")), output


def test_not_more_often_than_allowed_and_with_the_tasks_cores(tmp_path):
    env = {"SLURM_RESTART_COUNT": 3, "MAX_RESTARTS": 3, "SLURM_CPUS_PER_TASK": 64}
    code, output, arguments = run_and_requeue(tmp_path, "echo cores: $SRUN_CPUS_PER_TASK; exit 75", **env)
    assert code == 75 and arguments == "" and "started 3 times, not again" in output and "cores: 64" in output


@pytest.mark.parametrize(
    "script, flag",
    [("pretrain.sbatch", "--out_dir"), ("pretrain_multinode.sbatch", "--out_dir"), ("sweep.sbatch", "--out")],
)
def test_a_folder_the_script_would_not_look_into_is_refused(tmp_path, script, flag):
    cluster = Cluster(tmp_path, tmp_path / "never")
    for words in ((flag, "elsewhere"), (f"{flag}=elsewhere",)):
        done = cluster.start(script, *words, OUT_DIR=tmp_path / "out")
        assert done.returncode == 2 and f"error: {words[0]}: set OUT_DIR instead" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_signal_to_the_whole_job_waits_for_the_program(tmp_path):
    """`launch` replaces the shell by the program, so that no shell ends before the program has saved."""
    program = tmp_path / "program"
    program.write_text(
        '#!/usr/bin/env bash\ntrap asked=1 USR1\ntouch $OUT_DIR/ready\nuntil [ -n "${asked:-}" ]; do sleep 0.05; done\n'
        "sleep 0.5; echo saved; touch $OUT_DIR/requeue; exit 1\n"
    )
    program.chmod(0o755)
    (tmp_path / "recipe.sh").write_text(f"source {ROOT}/scripts/env.sh\nlaunch some.module --flag\n")
    watch = "(until [ -e $OUT_DIR/ready ]; do sleep 0.05; done; kill -USR1 -- -$$) & "
    env = {"LAUNCHER": program, "PYTHON": sys.executable}
    _, output, _ = run_and_requeue(tmp_path, f"exec bash {tmp_path}/recipe.sh", before=watch, **env)
    assert 0 <= output.index("saved\n") < output.index("asked to stop: job 4711 goes back into the queue"), output


# ---------------------------------------------------------------- complete jobs


class Cluster:
    """Runs a template as Slurm would."""

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
    """Write a recipe and scans, and make the undisturbed run. Return the folder and the template's settings."""
    folder = tmp_path_factory.mktemp("slurm")
    for number in range(3):
        write_nifti(folder / f"scans/scan{number}.nii.gz", ct((40, 36, 30), seed=number))
    (folder / "recipe.sh").write_text(RECIPE.format(root=ROOT))
    settings = {"RECIPE": folder / "recipe.sh", "DATALIST": folder / "scans", "CACHE_DIR": folder / "cache"}
    command = ["bash", folder / "recipe.sh", "--datalist", folder / "scans", "--cache_dir", folder / "cache"]
    command += ["--out_dir", folder / "undisturbed"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHON": sys.executable})
    return folder, settings


@pytest.mark.slow
@pytest.mark.parametrize("template, nodes", [("pretrain.sbatch", 1), ("pretrain_multinode.sbatch", 2)])
def test_a_signalled_job_is_requeued_and_ends_as_undisturbed(pretraining, tmp_path, template, nodes):
    folder, settings = pretraining
    out = tmp_path / "out"
    cluster = Cluster(tmp_path, out / "log.jsonl", nodes)
    first = cluster.start(template, OUT_DIR=out, **settings)
    assert first.returncode == 0 and cluster.requeued.exists(), first.stdout[-2000:] + first.stderr[-4000:]
    assert cluster.requeued.read_text() == "requeue 4711\n" and "stopped by a signal: saved after" in first.stdout
    assert (out / "requeue").exists() and not (out / "checkpoint-7.pth").exists()
    second = cluster.start(template, restarts=1, OUT_DIR=out, **settings)
    assert second.returncode == 0 and "resuming from" in second.stdout, second.stdout[-2000:] + second.stderr[-4000:]
    assert cluster.requeued.read_text() == "requeue 4711\n" and (out / "checkpoint-7.pth").exists()
    if nodes == 1:
        assert difference(out, folder / "undisturbed") == ""


@pytest.mark.slow
def test_a_job_that_fails_or_restarts_too_often_ends(pretraining, tmp_path):
    _, settings = pretraining
    cluster = Cluster(tmp_path, tmp_path / "never")
    failed = cluster.start(
        "pretrain.sbatch", restarts=1, OUT_DIR=tmp_path / "out", **settings | {"DATALIST": tmp_path / "nowhere"}
    )
    assert failed.returncode != 0 and "nowhere" in failed.stderr and not cluster.requeued.exists()
    # A file system's clock moves in steps: without the pause, the marker can be as old as the start.
    (tmp_path / "tired.sh").write_text('sleep 0.1; touch "$OUT_DIR/requeue"; exit 1\n')
    tired = {"OUT_DIR": tmp_path / "tired", **settings, "RECIPE": tmp_path / "tired.sh"}
    assert cluster.start("pretrain.sbatch", restarts=100, **tired).returncode == 1 and not cluster.requeued.exists()
    assert cluster.start("pretrain.sbatch", restarts=99, **tired).returncode == 0 and cluster.requeued.exists()


@pytest.mark.slow
def test_a_signalled_run_of_a_sweep_resumes_too(tmp_path):
    data = make_dataset(load_preset("MSD09_Spleen"), tmp_path / "spleen")
    small = "embed_dim: 24\ndepth: 4\nnum_heads: 2\nfeature_size: 4\nroi: 32\npatch_size: 16\nlr: 0.001\n"
    small += "batch_size: 1\ncrops: 1\nworkers: 1\n"
    (tmp_path / "settings.yaml").write_text(small)
    out = tmp_path / "out"
    settings = {
        "PRESET": "MSD09_Spleen",
        "DATA": data,
        "INITS": "scratch",
        "SEEDS": "0",
        "UPDATES": "60",
        "OUT_DIR": out,
        "CACHE_DIR": tmp_path / "cache",
    }
    (tmp_path / "bin").mkdir()
    cluster = Cluster(tmp_path, out / "under_way")

    def signalled(script, *arguments, when: str):
        """Start a script, signal it as soon as `find` finds something, and check that it is requeued."""
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

    signalled("sweep.sbatch", "--settings", tmp_path / "settings.yaml", when="-name log.jsonl -size +0")
    # The same sweep as the array that --slurm writes.
    sweep_flags = [
        "--preset",
        "MSD09_Spleen",
        "--data",
        data,
        "--inits",
        "scratch",
        "--seeds",
        "0",
        "--out",
        out,
        "--updates",
        60,
    ]
    sweep_flags += ["--cache_dir", tmp_path / "cache", "--settings", tmp_path / "settings.yaml"]
    sweep.main([*map(str, sweep_flags), "--slurm"])
    signalled(out / "array.sbatch", when="-name predictions")
    last = cluster.start(out / "array.sbatch", restarts=1)
    assert last.returncode == 0 and not cluster.requeued.exists(), last.stdout[-2000:] + last.stderr[-4000:]
    (logs,) = [p for p in out.rglob("log.jsonl")]
    epochs = [json.loads(line)["epoch"] for line in logs.read_text().splitlines()]
    assert epochs == list(range(20)) and list(out.rglob("scores.json"))
