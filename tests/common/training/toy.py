"""A toy method that has everything a real one has, for tests of the training loop."""

import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from common import checkpoint
from common.config import from_dict
from common.data.sampler import generator
from common.distributed import Run
from common.runlog import TIMES
from common.training.method import Method
from common.training.optim import build_optimizer
from common.training.settings import LoopSettings, plan_updates
from common.training.trainer import Trainer
from tests.helpers import read_log

CPU = Run(torch.device("cpu"))
lines = read_log  # its former name, which test_fsdp.py still imports


class Toy(Method):
    """A regression with dropout (so that randomness must be restored too), a token, and the protocol's hooks."""

    def __init__(self, poison_from: int | None = None):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.poison_from, self.calls = poison_from, []

    @property
    def grad_norm_parameter(self):
        return self.layers[0].weight

    def forward(self, batch, step=0, part=0):
        error = (self.layers(batch["x"] + self.cls_token[0]).squeeze(-1) - batch["y"]).square().mean()
        if self.poison_from is not None and step >= self.poison_from:
            error = error * float("nan")
        return {"fit": error, "seen": batch["y"].mean()}

    def before_step(self, step):
        self.calls.append(("before", step, self.grad_norm_parameter.grad is not None))

    def after_step(self, step):
        self.calls.append(("after", step, self.grad_norm_parameter.grad is not None))

    def checkpoint_state(self):
        return {"model": self.state_dict()}

    def load_checkpoint_state(self, content):
        self.load_state_dict(content["model"])


class Numbers(torch.utils.data.Dataset):
    """Twelve samples, drawn from the position in the stream."""

    seed = 0

    def name(self, index):
        return f"scan{index}"

    def __len__(self):
        return 12

    def __getitem__(self, item):
        position, index = item
        x = torch.rand(4, generator=generator(self.seed, position)) + index
        return {"x": x, "y": x.sum()}


def run_toy(out_dir, method=None, run=CPU, data="twelve numbers", after_epoch=None, **settings):
    method = method or Toy()
    defaults = dict(
        amp="off", epochs=4, batch_size=4, workers=0, warmup_epochs=0.0, save_every=2, log_every=2, weight_decay=0.1
    )
    settings = from_dict(defaults | settings | {"out_dir": Path(out_dir)}, LoopSettings)
    settings.out_dir.mkdir(exist_ok=True)
    plan = plan_updates(settings, 12, run.world_size)
    trainer = Trainer(
        method,
        Numbers(),
        settings,
        run,
        plan,
        learning_rate=lambda step: 0.01 / (1 + step),
        loss_weights=lambda step: {"fit": 2.0},
        args={"note": "toy"},
        data_fingerprint={"data": data},
        make_optimizer=partial(build_optimizer, weight_decay=settings.optim.weight_decay),
        **({"after_epoch": after_epoch} if after_epoch else {}),
    )
    return method, checkpoint.load(trainer.fit())


def points(out_dir):
    """What TensorBoard shows: {tag: [(step, value)]}."""
    files = Path(out_dir).glob(
        "events.*"
    )  # TensorBoard reads them by name, which is by second; a toy starts twice in one
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(sorted(files, key=lambda p: (p.name.split(".")[3], p.stat().st_mtime_ns))):
            shutil.copy(path, f"{folder}/events.out.tfevents.{number:010d}")
        accumulator = EventAccumulator(folder, size_guidance={"scalars": 0})
        accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def same_logs(a, b):
    """Both runs logged the same: every epoch's line and every point, none doubled and none missing."""
    strip = [[{k: v for k, v in line.items() if k not in TIMES} for line in read_log(out_dir)] for out_dir in (a, b)]
    assert str(strip[0]) == str(strip[1])  # as text: NaN is the same as NaN
    assert str(points(a)) == str(points(b))


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
