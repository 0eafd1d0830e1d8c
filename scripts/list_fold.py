"""Write the training cases of a fold as a list for pretraining, so that no held-out case is seen in it.

    python -m scripts.list_fold --preset BTCV --data DIR --fold 0 --out lists/btcv_fold0.json

The list is a Decathlon JSON with one section, `training`, of images without labels, by their absolute paths.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from common.cli import parse, run_program
from common.config import setting
from common.files import save_bytes
from common.runlog import print_main
from Finetune.cases import find_cases, split
from Finetune.presets import load_preset
from Finetune.settings import DataSettings


@dataclass(kw_only=True)
class ListSettings(DataSettings):
    """Settings of the list."""

    out: Path = setting(help="JSON file to write")


def main(argv: list[str] | None = None) -> None:
    settings = parse(ListSettings, argv, description=__doc__)
    preset = load_preset(settings.preset)
    training, validation = split(find_cases(preset, settings.data, settings.data_root), preset, settings.fold)
    images = [{"name": case.name, "image": os.path.realpath(case.image)} for case in training]
    save_bytes(settings.out, json.dumps({"training": images}, indent=1).encode())
    print_main(f"{settings.out}: {len(training)} training cases; {len(validation)} are held out")


if __name__ == "__main__":
    sys.exit(run_program(main))
