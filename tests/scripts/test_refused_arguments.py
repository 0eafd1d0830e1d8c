"""Scripts that check their arguments themselves refuse them before anything is installed."""

import os
import subprocess

import pytest

from tests.helpers import ROOT

# would be asked for its version, and would fill the environment
PYTHON = """#!/usr/bin/env bash
touch {started}
exit 1
"""


@pytest.mark.parametrize(
    "command, message",
    [
        ("demo.sh --foo", "found '--foo', expected --smoke"),
        ("demo.sh --method foo", "--method: found 'foo', expected glmae or mim"),
        ("demo.sh --method", "--method: found '', expected glmae or mim"),
        ("MSD04_Hippocampus/evidence.sh --foo", "found '--foo', expected --quick"),
        ("MSD04_Hippocampus/run.sh --init scratch", "MODEL=foo: expected unetr or mim"),
        ("BTCV/run.sh --init scratch --data=elsewhere", "--data=elsewhere: expected as DATA=..."),
        ("BTCV/run.sh --out_dir elsewhere", "--out_dir: expected as DATA=... or OUT=..."),
        ("sample_abdomen/run.sh --preset WORD", "--preset: this recipe is for sample_abdomen"),
        ("slurm/pretrain.sbatch --out_dir elsewhere", "--out_dir: set OUT_DIR instead"),
        ("slurm/pretrain_multinode.sbatch --out_dir=elsewhere", "--out_dir=elsewhere: set OUT_DIR instead"),
        ("slurm/sweep.sbatch --out elsewhere", "--out: set OUT_DIR instead"),
    ],
)
def test_arguments_are_refused_before_anything_is_installed(tmp_path, command, message):
    started, python = tmp_path / "started", tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text(PYTHON.format(started=started))
    python.chmod(0o755)
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv")}
    environment |= {"SLURM_SUBMIT_DIR": str(ROOT), "MODEL": "foo"}
    script, *words = command.split()
    done = subprocess.run(["bash", ROOT / "scripts" / script, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not started.exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
