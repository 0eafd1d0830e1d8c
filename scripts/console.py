"""The console commands that `pip install -e .` makes. Each is a program that `python -m` runs as well."""

import sys
from importlib import import_module
from pathlib import Path

from common.cli import run_program

# command -> module with a `main`; a module is imported only when its command is called
COMMANDS = {
    "glmae-pretrain": "Pretrain.main_pretrain",
    "glmae-finetune": "Finetune.main_finetune",
    "glmae-predict": "Finetune.predict",
    "glmae-evaluate": "Finetune.evaluate",
    "glmae-sweep": "Finetune.sweep",
    "glmae-probe": "Finetune.probe",
    "glmae-report": "common.report.__main__",
    "glmae-export": "Finetune.export",
    "glmae-embed": "Finetune.embed",
    "glmae-cache": "generate_cache_files",
    "glmae-prepare": "scripts.prepare",
    "glmae-doctor": "common.doctor",
}


def main() -> int:
    """Run the program of the command that this process was called as, and return its exit code."""
    return run_program(import_module(COMMANDS[Path(sys.argv[0]).stem]).main)
