"""Does the encoder learn? Measures that need no labels, on a fixed batch, and warnings when one leaves its range.

    M views   N patches   C width   P voxels of a patch (times channels)   R rows

The batch consists of at most 16 volumes that are not trained on (`--holdout`). What is measured:

    reconstruction   PSNR on removed patches, above that of each patch's mean and that of a prediction from position
                     alone, and the losses of the method
    features         of the patches, after the embedding, each block and the final norm: shares of position, volume
                     and content, participation ratio, growth of the residual stream
    method           GL-MAE: the teacher's entropy and kl. MiM: alignment of each level, and that of a guessed place

Where a range has no other source it is our choice, between what we measured for an encoder that learns and one that
does not: on 160 volumes of the hippocampus, ViT 192x6, patch 8; and GL-MAE as in scripts/demo.sh.
"""

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.data import default_collate

from common.cache.volume import CachedVolume
from common.config import setting
from common.data.loader import to_device
from common.runlog import print_main
from common.training.method import Batch, Method, Reconstruction
from common.training.parallel import autocast, eager_blocks
from common.training.settings import BatchPlan
from Pretrain.data import ViewDataset
from Pretrain.losses import patchify, undo_norm_pix

# with fewer volumes none is held out
MIN_VOLUMES = 20
# volumes of the fixed batch
MAX_VOLUMES = 16
# views whose features are measured, and how many are encoded at once
MAX_VIEWS, VIEWS_AT_ONCE = 32, 8
# tokens of which a participation ratio is computed
MAX_ROWS = 2048

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


# ---------------------------------------------------------------- measures


def psnr(mse: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of a mean squared error, for intensities in [0, 1]."""
    return -10.0 * mse.log10()


def participation_ratio(x: Tensor) -> Tensor:
    """Return the number of directions that rows (R, C) vary in: (sum l)^2 / sum l^2 of the eigenvalues l of their
    covariance. It is C when they vary equally in all, 1 when in one. Of many rows 2,048 are used, evenly spaced."""
    x = x[:: max(1, len(x) // MAX_ROWS)]
    x = x - x.mean(dim=0)
    # the smaller of the two matrices; their eigenvalues are the same
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    return gram.trace().square() / gram.square().sum()


def feature_measures(x: Tensor) -> dict[str, Tensor]:
    """Return measures of the patch features of several views (M, N, C) on the same patch grid, M and N at least 2.

    `power` is the mean square of a channel; after a LayerNorm about 1. `constant`, `position`, `volume` and `content`
    are its shares that all tokens have in common, that depend on the position alone, on the view alone, and on neither
    alone. They add up to 1. They are the unbiased estimates of a two-way random-effects analysis of variance, cut off
    at 0. `participation_ratio` is that of the content.
    """
    x = x.float()
    count, patches = x.shape[:2]
    mean = x.mean(dim=(0, 1))
    x = x - mean
    by_position, by_view = x.mean(dim=0, keepdim=True), x.mean(dim=1, keepdim=True)
    rest = x - by_position - by_view
    content = rest.square().sum() / ((count - 1) * (patches - 1))
    position = (by_position.square().sum() / (patches - 1) - content / count).clamp(min=0)
    volume = (by_view.square().sum() / (count - 1) - content / patches).clamp(min=0)
    noise = position / patches + volume / count + content / (count * patches)
    parts = {
        "constant": (mean.square().sum() - noise).clamp(min=0),
        "position": position,
        "volume": volume,
        "content": content,
    }
    total = sum(parts.values())
    shares = {name: part / total for name, part in parts.items()}
    return {"power": total / x.shape[2], **shares, "participation_ratio": participation_ratio(rest.flatten(0, 1))}


def reconstruction_measures(made: Reconstruction, patch_size: Sequence[int], norm_pix_eps: float | None) -> dict:
    """Return the PSNR on removed patches, and how far it is above that of two predictions that need no encoder.

    `over_mean`: above the mean of each true patch. With normalised targets the prediction is given that mean and the
    standard deviation as well. Otherwise it has to find the mean too, and may stay below.

    `over_position`: above the mean prediction for this position in the other views. It is 0 when predictions do not
    depend on what is visible.

    Args:
        norm_pix_eps: epsilon of the normalised targets; None when targets are not normalised.
    """
    patches, mask = patchify(made.view, patch_size).float(), made.mask.unsqueeze(-1)  # (M, N, P), (M, N, 1)
    prediction = made.prediction.float()
    removed = prediction * mask
    others = (mask.sum(dim=0) - mask).clamp(min=1)  # (M, N, 1)
    from_position = (removed.sum(dim=0) - removed) / others
    # predicted in another view too
    paired = mask * ((mask.sum(dim=0) - mask) > 0)

    def error(predicted: Tensor, weight: Tensor) -> Tensor:
        if norm_pix_eps is not None:
            predicted = undo_norm_pix(predicted, patches, norm_pix_eps)
        return ((predicted - patches).square().mean(dim=-1, keepdim=True) * weight).sum() / weight.sum()

    of_mean = (patches.var(dim=-1, correction=0, keepdim=True) * mask).sum() / mask.sum()
    mse = error(prediction, mask)
    return {
        "psnr": psnr(mse),
        "over_mean": psnr(mse) - psnr(of_mean),
        "over_position": psnr(error(prediction, paired)) - psnr(error(from_position, paired)),
    }


@contextmanager
def captured(encoder: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the tokens that enter the first transformer block ("embed"), and those after each block and the norm."""
    blocks = [m for name, m in encoder.named_modules() if isinstance(m, Block) and not name.startswith("decoder")]
    modules = {f"block{index:02}": block for index, block in enumerate(blocks)}
    if "norm" in dict(encoder.named_children()):
        modules["norm"] = encoder.get_submodule("norm")
    found: dict[str, list[Tensor]] = {name: [] for name in ("embed", *modules)}
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: found[name].append(output))
        for name, module in modules.items()
    ]
    handles.append(blocks[0].register_forward_pre_hook(lambda module, inputs: found["embed"].append(inputs[0])))
    try:
        # a compiled block would ignore its hook
        with eager_blocks(True):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def encoder_measures(encoder: nn.Module, views: Tensor) -> dict[str, Tensor]:
    """Return `feature_measures` of complete views (M, C, D, H, W): of their patches, embedded, after each block and
    after the norm; and `growth`, the power of the residual stream after the last block over that of the embedding."""
    patches = math.prod(size // p for size, p in zip(views.shape[2:], encoder.patch_size))
    with captured(encoder) as found:
        for part in views.split(VIEWS_AT_ONCE):
            encoder(part)
    if len(views) < 2 or patches < 2:
        return {}
    # without a CLS token
    tokens = {name: torch.cat(parts)[:, -patches:] for name, parts in found.items()}
    tokens = {"patches": patchify(views, encoder.patch_size)} | tokens
    measured = {name: feature_measures(x) for name, x in tokens.items()}
    last = max(name for name in measured if name.startswith("block"))
    growth = measured[last]["power"] / measured["embed"]["power"]
    return {f"{name}/{key}": value for name, of in measured.items() for key, value in of.items()} | {"growth": growth}


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
    """Return the number of updates from which on values are checked.

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
        first_check: number of updates from which on values are checked.
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

    def __call__(self, epoch: int, step: int, method: Method, means: Values) -> dict[str, float]:
        """Return the measures as `health/...`.

        Args:
            step: of the schedules.
            means: values of the training epoch, which are checked as well.
        """
        values = self.measure(method, step)
        if step + 1 >= self.first_check:
            monitors = {name: value for name, value in means.items() if name.startswith("monitor/")}
            self.warn(warnings({**values, **monitors}, self.norm_pix_eps is not None), epoch)
        return {f"health/{name}": value for name, value in values.items()}

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
    kinds = [kind for kind, views in batch.items() if views.ndim == 6]
    return {kind: Reconstruction(batch[kind].flatten(0, 1), None, None) for kind in kinds}


def joined(rows: Sequence[Reconstruction]) -> Reconstruction:
    return Reconstruction(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*rows)))


def views_to_encode(made: Mapping[str, Reconstruction], size: Sequence[int]) -> Tensor:
    """Return at most 32 views of one kind: of those with the encoder's size the kind that has most, else the first."""
    kinds = [row.view for row in made.values() if tuple(row.view.shape[2:]) == tuple(size)]
    views = max(kinds, key=len) if kinds else next(iter(made.values())).view
    return views[:MAX_VIEWS]


# ---------------------------------------------------------------- the picture

# title and lines of each curve over epochs; a line is drawn when the log has it
CURVES = {
    "PSNR above the patch mean, dB": ("over_mean",),
    "PSNR above position alone, dB": ("over_position",),
    "shares after the norm": ("norm/constant", "norm/position", "norm/volume", "norm/content"),
    "losses": ("rec_", "global_global", "global_local", "align_", "chance_"),
    "monitors, update": ("monitor/entropy", "monitor/kl"),
}
PREFIX = "health/"


def read_log(path: Path) -> list[dict]:
    """Return the lines of log.jsonl that hold measures."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if any(name.startswith(PREFIX) for name in line)]


def draw(lines: Sequence[Mapping[str, float]]) -> bytes:
    """Return a PNG of the measures over the epochs, and per block in the last one."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    for ax, (title, wanted) in zip(axes, CURVES.items()):
        for name in lines[-1]:
            short = name.removeprefix(PREFIX)
            is_monitor = title.startswith("monitors")
            if is_monitor != name.startswith(PREFIX) and any(_matches(short, word) for word in wanted):
                ax.plot([line["epoch"] for line in lines], [line.get(name, math.nan) for line in lines], label=short)
        _finish(ax, title, "epoch")
    for ax, measure in zip(axes[len(CURVES) :], ("participation_ratio", "power", "content")):
        stages = [name for name in lines[-1] if name.startswith(PREFIX) and name.endswith(f"/{measure}")]
        for line, label in ((lines[0], "first"), (lines[-1], "last")):
            ax.plot([line.get(name, math.nan) for name in stages], label=label)
        ax.set_xticks(range(len(stages)), [name.split("/")[1].replace("block", "") for name in stages], fontsize=6)
        _finish(ax, f"{measure.replace('_', ' ')} per block", "")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=70)
    return content.getvalue()


def _matches(name: str, word: str) -> bool:
    return name == word or name.endswith(f"/{word}") or name.startswith(word)


def _finish(ax, title: str, xlabel: str) -> None:
    ax.set_title(title, fontsize=8)
    ax.set_xlabel(xlabel, fontsize=7)
    ax.tick_params(labelsize=6)
    if ax.lines:
        ax.legend(fontsize=6)
