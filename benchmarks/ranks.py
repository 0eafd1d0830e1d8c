"""Updates of MAE on every process of a torchrun launch, for benchmarks/growth.py. Prints the median seconds per update.

torchrun --standalone --nproc_per_node=2 -m benchmarks.ranks cpu base 3 1

The numbers are the updates that are timed and the volumes of a process, of two views each.
"""

import sys
from itertools import repeat

import torch

from benchmarks.harness import alternate
from benchmarks.training import QUICK, Training, settings_of
from common import distributed
from common.data.loader import to_device
from common.runlog import print_main


def main(device: str, model: str, updates: int, volumes: int) -> None:
    run = distributed.setup(device)
    torch.set_num_threads(1)
    total = run.world_size * volumes
    settings = settings_of("mae", total, [*(QUICK if model == "tiny" else ()), "--local_views", "2"])
    training = Training(settings, run, total)
    batch = {"local": torch.rand(volumes, 2, 1, 96, 96, 96), "key": run.rank * volumes + torch.arange(volumes)}
    batch = to_device(batch, run.device)
    print_main(str(alternate({"update": lambda: training.update(repeat(batch))}, updates)["update"]))
    distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
