"""The former name of `python -m Finetune.sweep`."""

import sys

from common.cli import run_program
from Finetune.sweep import main

if __name__ == "__main__":
    print("Finetune.compare is now called Finetune.sweep", file=sys.stderr)
    sys.exit(run_program(main))
