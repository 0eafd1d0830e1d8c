"""Print the Dice of the demo's two fine-tunings beside each other, and write the table to a file.

python -m scripts.demo_table --pretrained runs/demo_glmae/scores --scratch runs/demo_glmae/scratch/scores --out FILE
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.cli import parse, run_program
from common.config import setting
from common.files import save_bytes
from common.runlog import print_main
from Finetune.evaluation.formats import aligned, fixed
from Finetune.evaluation.metrics import case_means
from Finetune.evaluation.report import read_card


@dataclass(kw_only=True)
class TableSettings:
    """Settings of the table."""

    pretrained: Path = setting(help="score card of the network that starts from the pretrained encoder")
    scratch: Path = setting(help="score card of the same network from random weights")
    out: Path = setting(help="text file to write")


def main(argv: list[str] | None = None) -> None:
    settings = parse(TableSettings, argv, description=__doc__)
    table = dice_table({"pretrained": settings.pretrained, "scratch": settings.scratch})
    save_bytes(settings.out, table.encode())
    print_main(table)


def dice_table(cards: Mapping[str, Path]) -> str:
    """Return a line per class with the Dice of each card (heading -> folder), and a line for the mean over cases.

    Raises:
        InputError: a folder holds no readable card.
    """
    columns = {}
    for heading, folder in cards.items():
        scores, _ = read_card(folder)
        means = [value for value in case_means(scores, "dice").values() if value is not None]
        columns[heading] = {score.name: score.values["dice"] for score in scores}
        columns[heading]["mean"] = sum(means) / len(means) if means else None
    first, *_ = columns.values()
    rows = [["Dice", *columns], *([name, *(fixed(dice[name], 2) for dice in columns.values())] for name in first)]
    return "\n".join(aligned(rows)) + "\n"


if __name__ == "__main__":
    sys.exit(run_program(main))
