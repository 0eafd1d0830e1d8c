"""Pretrain an encoder on unlabelled volumes with plain MAE, GL-MAE or MiM.

    python -m Pretrain.main_pretrain --method glmae --datalist /data/my_ct --out_dir runs/mine
    torchrun --nproc_per_node=8 -m Pretrain.main_pretrain ...

Recipes: scripts/pretrain_*.sh. The layout of the checkpoints: common/checkpoint.py.
"""

import io
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common import distributed, signals
from common.cache.build import build_cache
from common.cache.statistics import input_statistics
from common.cache.volume import CachedVolume
from common.cli import parse, run_program
from common.config import shown, to_dict
from common.data.datalist import Case
from common.data.loader import (
    Loading,
    build_loader,
    check_limits,
    end_workers,
    measure_loader,
    micro_batches,
    to_device,
)
from common.data.sampler import StreamSampler
from common.distributed import Run
from common.errors import InputError
from common.files import check_creatable, check_writable, digest, save_bytes
from common.runlog import RunLog, print_main
from common.training.method import Method
from common.training.optim import build_optimizer
from common.training.parallel import autocast_dtype
from common.training.schedules import warmup_cosine
from common.training.settings import BatchPlan, plan_updates
from common.training.summary import start_summary, update_flop
from common.training.trainer import Trainer
from common.watchdog import Watchdog
from Pretrain.build import TITLES, PretrainSettings, Task, build_task, settings_class
from Pretrain.data import ViewDataset
from Pretrain.health import MAX_VOLUMES, Health, by_hash, first_check, hold_out, read_log
from Pretrain.loading import choose_loading
from Pretrain.visualize import curves, picture


def main() -> None:
    settings = parse(settings_class(), description=__doc__)
    if not settings.dry_run:
        signals.write_marker_on_stop(settings.out_dir)
    run = distributed.setup(settings.device)
    try:
        pretrain(settings, run)
    finally:
        distributed.shutdown()


def pretrain(settings: PretrainSettings, run: Run) -> Path | None:
    """Run the whole program. Returns the last checkpoint, or None with `--loader_only` or `--dry_run`."""
    cases = settings.data.cases()
    (check_creatable if settings.dry_run else check_writable)(settings.out_dir)
    volumes, held_out = hold_out(prepare_volumes(settings, cases), settings.health.holdout)
    plan = plan_updates(settings, len(volumes), run.world_size)
    inputs = input_statistics(volumes) if settings.encoder.standardize else None
    torch.manual_seed(settings.seed)
    task = build_task(settings, plan, inputs)
    dataset = ViewDataset(volumes, task.specs, settings.seed)
    peak_lr = settings.optim.peak_lr(plan.batch * task.views)
    warmup = round(settings.optim.warmup_epochs * plan.steps_per_epoch)
    encoder = task.method.encoder
    encoder.set_grad_checkpointing(settings.precision.grad_checkpointing)
    flop = update_flop(task.method, dataset, task.loss_weights, plan)
    rows = describe(settings, task, plan, len(volumes), len(held_out), peak_lr, warmup)
    print_main(start_summary(f"{settings.method}: pretraining", rows, task.method, settings, plan, run, flop))
    loading = choose_loading(dataset, settings.views, run.device)
    if settings.loader_only:
        return measure(settings, run, plan, loading, task.views)
    hashes = [volume.content_hash for volume in volumes]
    draw = Reconstructions(settings, plan, dataset, encoder.patch_size)
    samples = ViewDataset(held_out or by_hash(volumes), task.specs, settings.seed)
    health = make_health(settings, run, plan, samples, bool(held_out))

    def after_epoch(epoch: int, log: RunLog, method: Method) -> dict[str, float]:
        draw(epoch, log, method)
        return health(epoch, log, method, trainer.means)

    trainer = Trainer(
        task.method,
        dataset,
        settings,
        run,
        plan,
        learning_rate=partial(warmup_cosine, total=plan.total_steps, warmup=warmup, peak=peak_lr),
        loss_weights=task.loss_weights,
        make_optimizer=partial(build_optimizer, weight_decay=settings.optim.weight_decay),
        args=to_dict(settings)
        | {
            "grid_size": list(encoder.grid_size),
            "num_heads": encoder.num_heads,
            "data": hashes,
            "held_out": [volume.content_hash for volume in held_out],
            "inputs": to_dict(inputs),
        },
        about=about(settings, plan, len(volumes), len(held_out)),
        loading=loading,
        data_fingerprint={"data": digest(hashes), "views": digest([task.specs])},
        **({"after_epoch": after_epoch} if run.rank == 0 else {}),
    )
    return trainer.dry_run() if settings.dry_run else trainer.fit()


def prepare_volumes(settings: PretrainSettings, cases: list[Case]) -> list[CachedVolume]:
    """Return the cached volumes. The first process builds what is missing, the others wait."""
    data = settings.data
    with distributed.main_first(), Watchdog(settings.hang_minutes):
        return build_cache(cases, data.preprocessing, data.cache_dir, settings.workers, data.allow_failures)


def describe(
    settings: PretrainSettings, task: Task, plan: BatchPlan, volumes: int, held_out: int, peak_lr: float, warmup: int
) -> dict[str, str]:
    """Return what the summary at the start prints of pretraining, name -> text."""
    encoder, specs = settings.encoder, task.specs.items()
    kinds = [f"{spec.count} {kind} of {shown(spec.size)} voxels" for kind, spec in specs if spec.count]
    return {
        "model": f"{encoder.model}, patches of {shown(encoder.patch_size)} voxels",
        "data": f"{volumes} volumes" + (f", {held_out} held out for measures" if held_out else ""),
        "views": f"{', '.join(kinds)} per volume; {plan.batch * task.views} views per update",
        "rate": f"learning rate {peak_lr:.3g} after {warmup:,} updates of warm-up",
    }


def about(settings: PretrainSettings, plan: BatchPlan, volumes: int, held_out: int) -> dict[str, Any]:
    """Return what run.json holds about the run besides its settings."""
    return {
        "program": "pretraining",
        "title": f"{TITLES.get(settings.method, settings.method.upper())} pretraining",
        "method": settings.method,
        "training_volumes": volumes,
        "held_out_volumes": held_out,
        "health_volumes": min(MAX_VOLUMES, held_out or volumes),
        "health_checked_from_update": first_check(plan, settings.optim.warmup_epochs),
    }


def measure(settings: PretrainSettings, run: Run, plan: BatchPlan, loading: Loading, views: int) -> None:
    """Load this rank's batches of the first epoch without a model, and print the speed (`--loader_only`)."""
    sampler = StreamSampler(len(loading.dataset), plan.micro_batch, plan.accum, run.rank, run.world_size, settings.seed)
    sampler.stop = plan.steps_per_epoch
    check_limits(loading, sampler, settings.workers)
    loader = build_loader(loading, sampler, settings.workers, run.device)
    try:
        batches = micro_batches(loader, loading, plan.micro_batch)
        print_main(measure_loader(loader, batches, lambda batch: len(batch["key"]), views))
    finally:
        end_workers(loader)


@dataclass(frozen=True)
class Reconstructions:
    """Draws one view of each kind and its reconstruction, always the same views, after some epochs.

    Writes reconstruction-{epoch}.png, and an image to TensorBoard.
    """

    settings: PretrainSettings
    plan: BatchPlan
    dataset: ViewDataset
    patch_size: tuple[int, int, int]

    def __call__(self, epoch: int, log: RunLog, method: Method) -> None:
        if not draws_after(epoch, self.settings):
            return
        sample = torch.utils.data.default_collate([self.dataset[(0, 0)]])
        method.eval()
        with torch.no_grad():
            rows = method.reconstructions(to_device(sample, next(method.parameters()).device))
        if rows:
            encoder = self.settings.encoder
            pixels = picture(rows, self.patch_size, encoder.norm_pix_loss, encoder.norm_pix_eps)
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, format="PNG")
            save_picture(self.settings.out_dir / f"reconstruction-{epoch}.png", content.getvalue())
            log.add_image("reconstruction", pixels, (epoch + 1) * self.plan.steps_per_epoch - 1)


def draws_after(epoch: int, settings: PretrainSettings) -> bool:
    """Return whether pictures are drawn after an epoch: when a numbered checkpoint is written."""
    return settings.is_due(epoch, settings.checkpoints.save_every)


@dataclass(frozen=True)
class HealthLog:
    """Measures the health of the encoder after some epochs, logs it, and draws health.png beside the log."""

    settings: PretrainSettings
    plan: BatchPlan
    health: Health

    def __call__(self, epoch: int, log: RunLog, method: Method, means: dict[str, float]) -> dict[str, float]:
        settings = self.settings
        if not settings.is_due(epoch, settings.health.health_every):
            return {}
        step = (epoch + 1) * self.plan.steps_per_epoch - 1
        values = self.health(epoch, step, method, means)
        log.add_scalars(values, step)
        for kind, text in self.health.failed.items():
            log.add_warning(epoch, kind, text)
        if draws_after(epoch, settings):
            lines = [*read_log(log.epochs_path), {"epoch": epoch, **means, **values}]
            save_picture(settings.out_dir / "health.png", curves(lines))
        return values


def make_health(
    settings: PretrainSettings, run: Run, plan: BatchPlan, samples: ViewDataset, held_out: bool
) -> HealthLog:
    """Return the measures of health."""
    encoder = settings.encoder
    health = Health(
        samples,
        held_out,
        plan.micro_batch,
        first_check=first_check(plan, settings.optim.warmup_epochs),
        norm_pix_eps=encoder.norm_pix_eps if encoder.norm_pix_loss else None,
        dtype=autocast_dtype(settings.precision.amp, run.device),
    )
    return HealthLog(settings, plan, health)


def save_picture(path: Path, content: bytes) -> None:
    """Write a picture. A full disk must not end the run: it is reported."""
    try:
        save_bytes(path, content)
    except InputError as error:
        print_main(f"warning: {error}")


if __name__ == "__main__":
    sys.exit(run_program(main))
