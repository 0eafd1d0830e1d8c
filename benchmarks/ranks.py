"""Updates of MAE on every process of a torchrun launch, for benchmarks/growth.py. Prints the median seconds per update.

torchrun --standalone --nproc_per_node=2 -m benchmarks.ranks cpu base 3
"""

import sys
from itertools import repeat

import torch

from benchmarks.harness import alternate
from benchmarks.training import QUICK, Training, settings_of
from common import distributed
from common.data.loader import to_device
from common.runlog import print_main


def main(device: str, model: str, updates: int) -> None:
    run = distributed.setup(device)
    torch.set_num_threads(1)
    settings = settings_of("mae", run.world_size, [*(QUICK if model == "tiny" else ()), "--local_views", "2"])
    training = Training(settings, run, run.world_size)
    batch = {"local": torch.rand(1, 2, 1, 96, 96, 96), "key": torch.tensor([run.rank])}
    batch = to_device(batch, run.device)
    print_main(str(alternate({"update": lambda: training.update(repeat(batch))}, updates)["update"]))
    distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
