"""Does the encoder learn? Measures that need no labels, on a fixed batch, and warnings when one leaves its range.

The batch consists of at most 16 volumes that are not trained on (`--holdout`), or of training volumes where none is
held out. What is measured:

    reconstruction, features   see measures.py
    method                     its losses. GL-MAE: the teacher's entropy and kl. MiM: alignment of each level, and that
                               of a guessed place

Where a range has no other source it is our choice, between what we measured for an encoder that learns and one that
does not: on 160 volumes of the hippocampus, ViT 192x6, patch 8; and GL-MAE as in scripts/demo.sh.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import default_collate

from common.cache.volume import CachedVolume
from common.config import setting
from common.data.loader import to_device
from common.runlog import print_main
from common.training.method import Batch, Method, Reconstruction
from common.training.parallel import autocast
from common.training.settings import BatchPlan
from Pretrain.data import ViewDataset
from Pretrain.measures import encoder_measures, reconstruction_measures

# with fewer volumes none is held out
MIN_VOLUMES = 20
# volumes of the fixed batch
MAX_VOLUMES = 16
# views whose features are measured
MAX_VIEWS = 32
# before the names of measures in the log
PREFIX = "health/"

Values = Mapping[str, float]


@dataclass(kw_only=True)
class HealthSettings:
    """Settings of the measures of learning."""

    holdout: float = setting(
        0.05,
        f"share of the volumes that is not trained on, to measure learning; of fewer than {MIN_VOLUMES} none",
        least=0,
        below=1,
    )
    health_every: int = setting(1, "epochs between two measurements; 0: never", least=0)


def hold_out(volumes: Sequence[CachedVolume], share: float) -> tuple[list[CachedVolume], list[CachedVolume]]:
    """Return the volumes to train on, in their order, and those that are held out.

    Held out are the volumes with the lowest content hashes, whatever the order of the list: `share` of them and at
    least one, or none where there are fewer than 20 or `share` is 0. A volume that is listed twice is on one side.
    """
    count = max(1, round(share * len(volumes))) if share and len(volumes) >= MIN_VOLUMES else 0
    hashes = {volume.content_hash for volume in by_hash(volumes)[:count]}
    training = [volume for volume in volumes if volume.content_hash not in hashes]
    return training, [volume for volume in by_hash(volumes) if volume.content_hash in hashes]


def by_hash(volumes: Sequence[CachedVolume]) -> list[CachedVolume]:
    return sorted(volumes, key=lambda volume: volume.content_hash)


# ---------------------------------------------------------------- warnings


@dataclass(frozen=True)
class Check:
    """A range: `failed` returns the numbers to print when values have left it, None otherwise.

    Attributes:
        text: the warning, formatted with these numbers, and the remedy.
    """

    failed: Callable[[Values], Values | None]
    text: str


def outside(name: str, low: float = -math.inf, high: float = math.inf) -> Callable[[Values], Values | None]:
    """Return a check of one value that fails below `low` or above `high`. A missing value or NaN does not fail."""

    def failed(values: Values) -> Values | None:
        value = values.get(name, math.nan)
        return {"value": value} if value < low or value > high else None

    return failed


def lowest_outside(ending: str, low: float) -> Callable[[Values], Values | None]:
    """Return a check that fails when the value of some kind of view, `<kind>/<ending>`, is below `low`."""

    def failed(values: Values) -> Values | None:
        found = {name.split("/")[0]: value for name, value in values.items() if name.endswith(f"/{ending}")}
        below = {kind: value for kind, value in found.items() if value < low}
        return {"kind": min(below, key=below.get), "value": min(below.values())} if below else None

    return failed


def few_directions(values: Values) -> Values | None:
    names = ("norm/participation_ratio", "patches/participation_ratio")
    found, of_patches = (values.get(name, math.nan) for name in names)
    return {"found": found, "of_patches": of_patches} if found < 0.6 * of_patches else None


def uniform_teacher(values: Values) -> Values | None:
    entropy, kl = values.get("monitor/entropy", math.nan), values.get("monitor/kl", math.nan)
    return {"entropy": entropy, "kl": kl} if entropy > 0.999 and kl < 1e-3 else None


def aligned_by_chance(values: Values) -> Values | None:
    for levels in ("up_mid", "mid_down"):
        found, chance = (values.get(f"{name}_{levels}", math.nan) for name in ("align", "chance"))
        if found > 0.99 * chance:
            return {"levels": levels, "found": found, "chance": chance}
    return None


CHECKS = {
    # measured: 0.013 with a frozen Dice of 0.41, 0.13 with 0.57; random weights 0.67
    "content": Check(
        outside("norm/content", low=0.04),
        "features hardly depend on what a patch contains ({value:.3f} of their power, expected 0.04 or more): "
        "keep --standardize and train longer",
    ),
    # measured, where patches themselves have about 5: 2.6 with a frozen Dice of 0.009, 8.6 with 0.41, 13.3 with 0.63
    "directions": Check(
        few_directions,
        "features vary in {found:.1f} directions, fewer than the patches that they encode ({of_patches:.1f}): lower "
        "--lr (or --blr)",
    ),
    # measured: from 5 to 480 at the learning rate that gave 2.6 directions
    "growth": Check(
        outside("growth", high=50.0),
        "the residual stream grows to {value:.0f} times the power of the embedding (expected 50 or less): "
        "lower --lr (or --blr)",
    ),
    # our choice: a mean squared error of the normalised patch of 1, that of predicting 0
    "mean": Check(
        lowest_outside("over_mean", low=0.0),
        "{kind} patches are predicted no better than by their mean ({value:.2f} dB): train longer, or lower --lr; "
        "if they are noise raise --norm_pix_eps to its variance (about 1e-4 for CT)",
    ),
    # our choice
    "position": Check(
        lowest_outside("over_position", low=0.01),
        "predictions of {kind} patches do not depend on what is visible ({value:.3f} dB): keep --standardize, "
        "lower --lr, or lower the mask ratio",
    ),
    # measured: 0.99998 and 2e-5 in every epoch of a run whose consistency learned nothing, 0.967 and 0.01 to 0.077 in
    # one whose did
    "uniform": Check(
        uniform_teacher,
        "the teacher is uniform: its entropy is {entropy:.5f} of the highest possible one and kl is {kl:.1e}, so the "
        "consistency losses carry no signal: keep --standardize, lower --lr to 3e-4, or lower --teacher_temp",
    ),
    # our choice: two equally frequent ones of 4096 have 0.083
    "one prototype": Check(
        outside("monitor/entropy_of_mean", low=0.02),
        "the teacher assigns one prototype to everything (entropy of the mean {value:.3f}): raise --teacher_temp, or "
        "lower --center_momentum",
    ),
    # our choice
    "alignment": Check(
        aligned_by_chance,
        "MiM aligns {levels} no better than by guessing the place ({found:.3f}, by chance {chance:.3f}): use "
        "--align infonce, or raise --weight_align_{levels}",
    ),
}


def warnings(values: Values, norm_pix_loss: bool = True) -> dict[str, str]:
    """Return the warnings that values give, by kind.

    Args:
        values: those of the log without the prefix `health/`.
        norm_pix_loss: whether targets are normalised. Otherwise the true mean of a patch is more than can be known.
    """
    left_out = set() if norm_pix_loss else {"mean"}
    # their limits were measured on ViTs; only MiM, on its hybrid, has an up level
    left_out |= {"content", "directions"} if "up/psnr" in values else set()
    failed = {kind: check.failed(values) for kind, check in CHECKS.items() if kind not in left_out}
    return {kind: CHECKS[kind].text.format(**numbers) for kind, numbers in failed.items() if numbers}


def first_check(plan: BatchPlan, warmup_epochs: float) -> int:
    """Return the number of updates after which values are checked.

    Every masked autoencoder predicts the mean at first. So not before the end of the warm-up, nor before half of the
    run, of which at most 1,000 updates; and never in a trial of less than 100 updates. Our choice.
    """
    return max(round(warmup_epochs * plan.steps_per_epoch), min(plan.total_steps // 2, 1000), 100)


# ---------------------------------------------------------------- the fixed batch


@dataclass
class Health:
    """Measures a method on a fixed batch of volumes after an epoch, and prints each kind of warning once.

    Args:
        samples: views of these volumes; the first 16 are used.
        held_out: whether they were not trained on.
        micro_batch: volumes at once.
        first_check: number of updates after which values are checked.
        norm_pix_eps: epsilon of the normalised targets; None when targets are not normalised.
        dtype: of autocast, None for none.
    """

    samples: ViewDataset
    held_out: bool
    micro_batch: int
    first_check: int
    norm_pix_eps: float | None
    dtype: torch.dtype | None = None
    batches: list[Batch] = field(default_factory=list)
    printed: set[str] = field(default_factory=set)
    # warnings of the last measurement, by kind
    failed: dict[str, str] = field(default_factory=dict)

    def __call__(self, epoch: int, step: int, method: Method, means: Values) -> dict[str, float]:
        """Return the measures as `health/...`.

        Args:
            step: of the schedules.
            means: values of the training epoch, which are checked as well.
        """
        values = self.measure(method, step)
        if step + 1 >= self.first_check:
            monitors = {name: value for name, value in means.items() if name.startswith("monitor/")}
            self.failed = warnings({**values, **monitors}, self.norm_pix_eps is not None)
            self.warn(self.failed, epoch)
        return {f"{PREFIX}{name}": value for name, value in values.items()}

    def warn(self, found: Mapping[str, str], epoch: int) -> None:
        for kind, text in found.items():
            if kind not in self.printed:
                print_main(f"warning: epoch {epoch + 1}: {text}")
        self.printed |= found.keys()

    @torch.no_grad()
    def measure(self, method: Method, step: int) -> dict[str, float]:
        """Return all measures of a method that are finite: with a single view some are not defined."""
        if not self.batches:
            self.batches = self._load()
        device = next(method.parameters()).device
        method.eval()
        rows, reported, counts = [], [], [len(batch["key"]) for batch in self.batches]
        with autocast(device, self.dtype):
            for batch in self.batches:
                batch = to_device(batch, device)
                reported.append(report(method, batch, step))
                rows.append(method.reconstructions(batch) or complete_views(batch))
            made = {kind: joined([row[kind] for row in rows]) for kind in rows[0]}
            patch_size = method.encoder.patch_size
            values = encoder_measures(method.encoder, views_to_encode(made, method.encoder.img_size))
        for kind, row in made.items():
            if row.prediction is not None:
                measured = reconstruction_measures(row, patch_size, self.norm_pix_eps)
                values |= {f"{kind}/{name}": value for name, value in measured.items()}
        for name in reported[0]:
            values[name] = sum(part[name] * count for part, count in zip(reported, counts)) / sum(counts)
        # one transfer for all
        numbers = torch.stack([value.float() for value in values.values()]).tolist()
        return {name: float(f"{number:.6g}") for name, number in zip(values, numbers) if math.isfinite(number)}

    def _load(self) -> list[Batch]:
        count = min(MAX_VOLUMES, len(self.samples))
        volumes = f"{count} held-out" if self.held_out else f"{count} training"
        reason = "" if self.held_out else f" (none is held out of fewer than {MIN_VOLUMES}, or with --holdout 0)"
        print_main(f"health: measured on {volumes} volume(s){reason}")
        samples = [self.samples[(position, position)] for position in range(count)]
        starts = range(0, count, self.micro_batch)
        return [default_collate(samples[start : start + self.micro_batch]) for start in starts]


def report(method: Method, batch: Batch, step: int) -> dict[str, Tensor]:
    """Return what a method reports for a batch, the sum of its parts."""
    values: dict[str, Tensor] = {}
    for part in range(method.num_parts):
        for name, value in method(batch, step, part).items():
            values[name] = values.get(name, 0.0) + value
    return values


def complete_views(batch: Batch) -> dict[str, Reconstruction]:
    """Return the views of a batch for a method that reconstructs nothing."""
    return {kind: Reconstruction(views.flatten(0, 1), None, None) for kind, views in batch.items() if views.ndim == 6}


def joined(rows: Sequence[Reconstruction]) -> Reconstruction:
    return Reconstruction(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*rows)))


def views_to_encode(made: Mapping[str, Reconstruction], size: Sequence[int]) -> Tensor:
    """Return at most 32 views of one kind: of those with the encoder's size the kind that has most, else the first."""
    kinds = [row.view for row in made.values() if tuple(row.view.shape[2:]) == tuple(size)]
    views = max(kinds, key=len) if kinds else next(iter(made.values())).view
    return views[:MAX_VIEWS]


def read_log(path: Path) -> list[dict]:
    """Return the lines of log.jsonl that hold measures."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if any(name.startswith(PREFIX) for name in line)]
