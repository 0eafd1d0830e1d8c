"""Updates of pretraining end to end, beside their arithmetic alone and their loading alone.

Each method trains on cached synthetic volumes with the program's own loader and loop. "Arithmetic alone" repeats one
batch that is on the device, so that what an update takes beyond that is time in which the device waits for data. On a
CPU it is also time that the loader's processes take from the arithmetic.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch

from benchmarks.cache import SHAPE, write_volumes
from benchmarks.harness import Row, alternate, count_flops, matrix_product, peak_memory, timed
from common.cache.build import build_cache
from common.cache.volume import CachedVolume
from common.cli import parse
from common.data.datalist import Case, stem
from common.data.loader import PREFETCH, Loading, build_loader, device_batches, end_workers, micro_batches
from common.data.sampler import StreamSampler
from common.distributed import Run
from common.training.loop import UpdateRule, train_one_epoch
from common.training.method import Batch
from common.training.optim import build_optimizer
from common.training.parallel import autocast_dtype, wrap
from common.training.settings import plan_updates
from common.training.state import TrainingState
from Pretrain.build import PretrainSettings, build_task, settings_class
from Pretrain.data import ViewDataset
from Pretrain.loading import choose_loading

# A smaller model and smaller views; otherwise both are those of the recipe.
QUICK = "--model tiny --decoder_embed_dim 192 --decoder_depth 2 --decoder_num_heads 3".split()
QUICK_VIEWS = "--local_size 64 --local_views 2".split()
# A step of MiM takes a minute on a few cores.
METHODS = {"cpu": ("mae", "glmae"), "cuda": ("mae", "glmae", "mim")}


class Training:
    """A pretraining run without its program: the method, its optimiser and the loop."""

    def __init__(self, settings: PretrainSettings, run: Run, num_samples: int):
        plan = plan_updates(settings, num_samples, run.world_size)
        torch.manual_seed(settings.seed)
        task = build_task(settings, plan)
        method = task.method.to(run.device)
        self.specs, self.plan = task.specs, plan
        optimizer = build_optimizer(method, settings.optim.weight_decay)
        self.dtype = autocast_dtype(settings.precision.amp, run.device)
        self.state = TrainingState(method, optimizer, run, self.dtype)
        self.state.model = wrap(method, run, plan.accum)
        self.rule = UpdateRule(lambda step: 1e-4, task.loss_weights, plan.accum, settings.optim.clip_grad)

    def update(self, batches: Iterable[Batch], count: int = 1) -> None:
        """Make `count` updates. No gradient is left behind."""
        # no update is the first of an epoch, in which the gradient of each loss would be measured as well
        train_one_epoch(self.state, batches, self.state.step + count, self.rule, first_step=-1)


def settings_of(method: str, batch: int, more: Sequence[str] = ()) -> PretrainSettings:
    """Return the settings of a run of `method` with `batch` volumes per update."""
    flags = ["--method", method, "--batch_size", str(batch), "--datalist", "none", "--out_dir", "none"]
    return parse(settings_class(), [*flags, *more])


def measure(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Return three rows for each method: loading alone, arithmetic alone and both."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmark-training-") as name:
        folder = Path(name)
        paths = write_volumes(folder, 1 if quick else 2, (256, 256, 100) if quick else SHAPE)
        volumes = build_cache(
            [Case(stem(path), path) for path in paths], settings_of("mae", 1).data.preprocessing, folder
        )
        for method in METHODS[device.type]:
            rows += method_rows(method, volumes, quick, device)
    return rows


def method_rows(
    method: str, volumes: Sequence[CachedVolume], quick: bool, device: torch.device
) -> list[dict[str, Any]]:
    on_cuda = device.type == "cuda"
    batch, updates = (4, 20) if on_cuda else (1, 4)
    workers = max(1, min(8, (os.cpu_count() or 1) - 1))
    smaller = [*QUICK, *QUICK_VIEWS, *(("--global_size", "96") if method == "glmae" else ())] if quick else ()
    settings = settings_of(method, batch, smaller)
    training = Training(settings, Run(device), len(volumes))
    loading = choose_loading(ViewDataset(volumes, training.specs), settings.views, device)
    with_loader = {"workers": workers, "batch": batch, "device": device}
    fixed = repeat(next(iter(batches_of(loading, **with_loader))))
    arithmetic = lambda: training.update(fixed)  # noqa: E731
    product, product_flops = matrix_product(device, training.dtype or torch.float32)
    seconds = alternate({"arithmetic": arithmetic, "product": product}, 5 if on_cuda else 2)
    loaded = seconds_per_batch(loading, lambda batches, count: list(islice(batches, count)), 12, **with_loader)
    whole = seconds_per_batch(loading, training.update, updates, **with_loader)
    rate, flops = product_flops / seconds["product"], count_flops(arithmetic)
    title = f"{method} {settings.encoder.model}, {batch} volume(s) per update"
    waiting = f"{max(0.0, 1 - seconds['arithmetic'] / whole):.0%} of the time waiting for data"
    common = {"theirs": seconds["arithmetic"], "against": "arithmetic alone", "unit": "s per update"}
    return [
        Row(name=f"{title}: loading with {workers} worker(s)", ours=loaded, **common).as_dict(),
        Row(
            name=f"{title}: arithmetic",
            against="a matrix product",
            ours=seconds["arithmetic"],
            unit="s per update",
            peak_bytes=peak_memory(arithmetic, device),
            share_of_rate=flops / seconds["arithmetic"] / rate,
        ).as_dict(),
        Row(
            name=f"{title}: end to end", ours=whole, share_of_rate=flops / whole / rate, note=waiting, **common
        ).as_dict(),
    ]


def seconds_per_batch(
    loading: Loading, consume: Callable[[Iterator[Batch], int], object], count: int, **with_loader: Any
) -> float:
    """Return the seconds per batch of `consume(batches, count)`, which takes `count` of them.

    The first batch does not count: after the workers are forked, the first write to each page of memory copies it. Then
    what the loader has prepared in advance is taken out, or the first batches would cost nothing.
    """
    batches = batches_of(loading, **with_loader)
    try:
        consume(batches, 1)
        for _ in range(PREFETCH * with_loader["workers"]):
            next(batches)
        return timed(lambda: consume(batches, count)) / count
    finally:
        batches.close()


def batches_of(loading: Loading, workers: int, batch: int, device: torch.device) -> Iterator[Batch]:
    """Yield batches on the device from the program's loader without end; `close` ends its workers."""
    sampler = StreamSampler(len(loading.dataset), batch, accum=1)
    sampler.stop = 10**6
    loader = build_loader(loading, sampler, workers, device)
    try:
        yield from device_batches(micro_batches(loader, loading, batch), loading.prepare, device)
    finally:
        end_workers(loader)
