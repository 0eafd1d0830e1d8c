"""Pretrain an encoder on unlabelled volumes: plain MAE, GL-MAE or MiM.

    python -m Pretrain.main_pretrain --method glmae --datalist /data/my_ct --out_dir runs/mine
    torchrun --nproc_per_node=8 -m Pretrain.main_pretrain ...

Recipes: scripts/pretrain_*.sh. The checkpoints' layout: common/checkpoint.py.
"""

import io
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from common import distributed, signals
from common.cache.build import build_cache
from common.cli import parse, run_program
from common.config import to_dict
from common.data.loader import build_loader, measure_loader, to_device
from common.data.sampler import StreamSampler
from common.errors import InputError
from common.files import check_writable, digest, save_bytes
from common.runlog import RunLog, print_main
from common.training.loop import fit
from common.training.optim import build_optimizer
from common.training.schedules import warmup_cosine
from common.training.settings import BatchPlan, plan_updates
from common.training.state import TrainingState
from common.watchdog import Watchdog
from Pretrain.build import PretrainSettings, build_task
from Pretrain.data import ViewDataset
from Pretrain.visualize import picture


def main() -> None:
    settings = parse(PretrainSettings, description=__doc__)
    signals.mark_when_stopped(settings.out_dir)
    run = distributed.setup(settings.device)
    try:
        pretrain(settings, run)
    finally:
        distributed.shutdown()


def pretrain(settings: PretrainSettings, run: distributed.Run) -> Path | None:
    """The whole run; returns its last checkpoint, None where only the loader was measured."""
    check_writable(settings.out_dir)
    with distributed.main_first(), Watchdog(settings.hang_minutes):
        volumes = build_cache(
            settings.cases(),
            settings.preprocessing(),
            settings.cache_dir,
            settings.workers,
            skip_failures=settings.allow_failures,
        )
    plan = plan_updates(settings, len(volumes), run.world_size)
    torch.manual_seed(settings.seed)
    task = build_task(settings, plan)
    encoder = task.method.encoder
    encoder.set_grad_checkpointing(settings.grad_checkpointing)
    views = plan.batch * task.views
    peak = settings.lr if settings.lr is not None else settings.blr * views / 256
    print_main(
        f"{settings.method}: {len(volumes)} volumes, {plan.total_steps} updates ({plan.steps_per_epoch} per epoch), "
        f"effective batch {plan.batch} volumes = {views} views ({run.world_size} process(es) x {plan.micro_batch} "
        f"x {plan.accum} accumulated), learning rate {peak:.3g}, on {run.device}"
    )
    dataset = ViewDataset(volumes, task.specs, settings.seed)
    if settings.loader_only:
        return measure(settings, run, plan, dataset, task.views)
    warmup = round(settings.warmup_epochs * plan.steps_per_epoch)
    training = TrainingState(
        task.method,
        dataset,
        settings,
        run,
        plan,
        learning_rate=partial(warmup_cosine, total=plan.total_steps, warmup=warmup, peak=peak),
        weights=task.weights,
        args=to_dict(settings) | {"grid_size": list(encoder.grid_size), "data": [v.content_hash for v in volumes]},
        data_fingerprint={"data": digest([v.content_hash for v in volumes]), "views": digest([task.specs])},
        make_optimizer=partial(build_optimizer, weight_decay=settings.weight_decay),
    )
    return fit(training, partial(draw_reconstructions, settings, plan, dataset) if run.rank == 0 else None)


def measure(
    settings: PretrainSettings, run: distributed.Run, plan: BatchPlan, dataset: ViewDataset, views: int
) -> None:
    """`--loader_only`: this rank's batches of the first epoch, without a model."""
    sampler = StreamSampler(len(dataset), plan.micro_batch, plan.accum, run.rank, run.world_size, settings.seed)
    sampler.stop = plan.steps_per_epoch
    loader = build_loader(dataset, sampler, settings.workers, run.device)
    print_main(str(measure_loader(loader, lambda batch: (len(batch["key"]), len(batch["key"]) * views))))


def draw_reconstructions(
    settings: PretrainSettings, plan: BatchPlan, dataset: ViewDataset, epoch: int, log: RunLog, method: nn.Module
) -> dict[str, float]:
    """One view of each kind with its reconstruction, always the same: reconstruction-{epoch}.png and TensorBoard."""
    if (epoch + 1) % settings.save_every and epoch + 1 != settings.epochs:
        return {}
    sample = torch.utils.data.default_collate([dataset[(0, 0)]])
    method.eval()
    with torch.no_grad():
        rows = method.reconstructions(to_device(sample, method.encoder.pos_embed.device))
    if rows:
        pixels = picture(rows, method.encoder.patch_size, settings.norm_pix_loss)
        save_picture(settings.out_dir / f"reconstruction-{epoch}.png", pixels)
        log.image("reconstruction", pixels, (epoch + 1) * plan.steps_per_epoch - 1)
    return {}


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """As PNG. A run can do without: on a full disk it says so and goes on."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    try:
        save_bytes(path, content.getvalue())
    except InputError as error:
        print_main(f"warning: {error}")


if __name__ == "__main__":
    sys.exit(run_program(main))
