"""Probes: how well simple models predict the labels from frozen features.

    B crops   P prefix tokens   N patches   V voxels of a patch   K classes or regions   C width   M training rows

linear     one linear layer on each patch token: the K logits of its V voxels
attentive  the same after one cross-attention from the patch tokens to all tokens of the crop, added to them
knn        no training: the label maps of the most similar training patches, and the classes of the most similar crops

A classification preset has one crop per case. Its linear layer reads the CLS token (without one, the mean of the patch
tokens), its attention has one learned query.

All features are standardised per channel by statistics of the training crops: what BatchNorm without affine parameters
does (MAE's linear probe), with exact statistics instead of running ones. Each learning rate trains a head of its own,
all from the same weights and on the same batches. The one with the best score on the development cases is scored on the
test cases; no other head sees them.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.sampler import index_at, mix
from common.runlog import progress
from common.training.schedules import warmup_cosine
from Finetune.engine_finetune import Losses, SegmentationLosses, label_dice
from Finetune.evaluation.features import Features, summary_of, tiling
from Finetune.evaluation.statistics import mean
from Finetune.heads import Architecture
from Finetune.losses import classification_losses
from Finetune.models_light import unfold_channels
from Finetune.presets import Preset

# divides similarities before the softmax, as in DINO and Wu et al. 2018
TEMPERATURE = 0.07
# the variance of a channel below which it counts as constant
EPS = 1e-6
# numbers in a chunk of similarities or votes: 256 MB
CHUNK = 2**26
# tokens (B, P+N, C) -> logits or probabilities
Predict = Callable[[Tensor], Tensor]
# metric -> case -> value, such that the metric is the mean over cases
Scores = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class HeldOut:
    """Held-out cases: the features of their tiles, and their label maps (D, H, W) uint8 (none in classification)."""

    features: Features
    labels: Mapping[str, Tensor]


@dataclass(frozen=True)
class ProbeTask:
    """What a probe predicts, and how it is trained."""

    preset: Preset
    architecture: Architecture
    rates: tuple[float, ...]
    updates: int
    batch_size: int
    neighbours: int
    seed: int

    @property
    def classifies(self) -> bool:
        return self.preset.task == "classification"


@dataclass(frozen=True)
class Outcome:
    """The scores of one probe.

    Attributes:
        probe: its name in tables.
        rate: the learning rate that was chosen, None without training.
        development, test: per case, as in `Scores`.
        by_rate: learning rate -> the score on the development cases that chose it.
    """

    probe: str
    rate: float | None
    development: Scores
    test: Scores
    by_rate: dict[float, float | None]


def run_probe(name: str, train: Features, development: HeldOut, test: HeldOut, task: ProbeTask) -> list[Outcome]:
    """Return the outcomes of the probe `name`, one of `PROBES`."""
    outcomes = []
    for title, fit, score in PROBES[name](task):
        fitted = fit(train, task)
        on_development = {rate: score(predict, train, development, task) for rate, predict in fitted.items()}
        # the first metric chooses
        by_rate = {rate: mean(next(iter(scores.values())).values()) for rate, scores in on_development.items()}
        best = max(by_rate, key=lambda rate: -math.inf if by_rate[rate] is None else by_rate[rate])
        scores = score(fitted[best], train, test, task)
        outcomes.append(Outcome(title, best, on_development[best], scores, {r: v for r, v in by_rate.items() if r}))
    return outcomes


# ---------------------------------------------------------------- standardisation


class Standardize(nn.Module):
    """(x - mean) / std per channel, with statistics of the training features `x` (n, T, C) over crops and rows.

    Args:
        prefix: the first of the T rows, each with statistics of its own.
    """

    def __init__(self, x: Tensor, prefix: int = 0):
        super().__init__()
        stats = torch.var_mean(x[:, prefix:], dim=(0, 1), correction=0)
        variance, mean = (values.repeat(x.shape[1], 1) for values in stats)  # (T, C)
        if prefix:
            variance[:prefix], mean[:prefix] = torch.var_mean(x[:, :prefix], dim=0, correction=0)
        self.register_buffer("mean", mean)
        self.register_buffer("std", (variance + EPS).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


# ---------------------------------------------------------------- trained probes


class ProbeHead(nn.Module):
    """A linear layer on standardised features: tokens (B, P+N, C) -> (B, N, V*K), or (B, K) in classification.

    Args:
        attentive: one cross-attention before it, with the number of heads of the encoder.
    """

    def __init__(self, train: Features, task: ProbeTask, attentive: bool):
        super().__init__()
        self.task, self.prefix = task, train.prefix
        width, classes = train.tokens.shape[-1], task.preset.out_channels
        if task.classifies and not attentive:
            self.standardize = Standardize(summary_of(train.tokens, train.prefix)[:, None])
        else:
            self.standardize = Standardize(train.tokens, train.prefix)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02) if task.classifies and attentive else None
        self.attention = None
        if attentive:
            self.attention = nn.MultiheadAttention(width, task.architecture.num_heads, batch_first=True)
        self.proj = nn.Linear(width, classes if task.classifies else train.targets.shape[-1] * classes)
        nn.init.trunc_normal_(self.proj.weight, std=0.01)
        nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.task.classifies and self.attention is None:
            return self.proj(self.standardize(summary_of(tokens, self.prefix)))
        x = self.standardize(tokens)
        if self.task.classifies:
            return self.proj(self.attend(self.query.expand(len(x), -1, -1), x)[:, 0])
        patches = x[:, self.prefix :]
        return self.proj(patches if self.attention is None else patches + self.attend(patches, x))

    def attend(self, queries: Tensor, x: Tensor) -> Tensor:
        return self.attention(queries, x, x, need_weights=False)[0]

    def patch_logits(self, tokens: Tensor) -> Tensor:
        """Return the logits of the voxels of every patch, (B, K, N, V)."""
        return self(tokens).unflatten(-1, (-1, self.task.preset.out_channels)).movedim(-1, 1)

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """Return logits (B, K, *roi), or (B, K) in classification."""
        return self(tokens) if self.task.classifies else to_voxels(self(tokens), self.task.architecture)


def to_voxels(x: Tensor, a: Architecture) -> Tensor:
    """Return numbers (B, N, V*K) of patches as crops (B, K, *roi)."""
    return unfold_channels(x.unflatten(1, a.grid_size), a.patch_size).movedim(-1, 1)


def fit_heads(train: Features, task: ProbeTask, attentive: bool = False) -> dict[float, Predict]:
    """Return learning rate -> the trained probe.

    Adam without weight decay, 5 % linear warm-up, then half a cosine to 0 (our choice). A batch has `batch_size` crops.
    """
    torch.manual_seed(mix(task.seed, 2))
    first = ProbeHead(train, task, attentive).to(train.tokens.device)
    heads = {rate: copy.deepcopy(first) for rate in task.rates}
    optimizers = {rate: torch.optim.Adam(head.parameters(), lr=rate) for rate, head in heads.items()}
    losses = losses_of(task)
    name = "attentive" if attentive else "linear"
    for update in progress(range(task.updates), desc=name, unit="update"):
        positions = range(update * task.batch_size, (update + 1) * task.batch_size)
        rows = [index_at(position, len(train.cases), task.seed) for position in positions]
        tokens, targets = train.tokens[rows], train.targets[rows]
        # one after another, so that the logits of one head at a time are in memory
        for rate, head in heads.items():
            optimizers[rate].param_groups[0]["lr"] = warmup_cosine(update, task.updates, task.updates // 20, rate)
            optimizers[rate].zero_grad()
            sum(losses(head, {"tokens": tokens, "targets": targets}).values()).backward()
            optimizers[rate].step()
    return {rate: head.eval().predict for rate, head in heads.items()}


def losses_of(task: ProbeTask) -> Losses:
    """Return the losses of fine-tuning for the same preset, on a batch of `tokens` and `targets`."""
    if task.classifies:
        return lambda head, batch: classification_losses(head, {"image": batch["tokens"], "target": batch["targets"]})
    # the Dice loss does not depend on the order of voxels, so that patches need not be put together
    losses = SegmentationLosses(task.preset)
    return lambda head, batch: losses(
        head.patch_logits, {"image": batch["tokens"][None], "label": batch["targets"][None, :, None]}
    )


# ---------------------------------------------------------------- nearest neighbours


def nearest(queries: Tensor, bank: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Return (weights, rows), both (Q, k), of the most similar rows of `bank` (M, C) for each of `queries` (Q, C).

    Rows have length 1. Weights are a softmax of the cosine similarities at `TEMPERATURE`.
    """
    similarity, rows = (queries @ bank.T).topk(min(neighbours, len(bank)), dim=1)
    return (similarity / TEMPERATURE).softmax(dim=1), rows


def fit_patch_neighbours(train: Features, task: ProbeTask) -> dict[None, Predict]:
    """Return a predictor of each patch's labels: the weighted mean of the one-hot label maps of similar patches."""
    standardize = Standardize(train.tokens, train.prefix)
    bank = F.normalize(standardize(train.tokens)[:, train.prefix :].flatten(0, 1), dim=-1)  # (M, C)
    labels, classes = train.targets.flatten(0, 1), len(task.preset.labels)  # (M, V)
    chunk = max(1, CHUNK // max(len(bank), classes * labels.shape[1]))

    def votes(queries: Tensor) -> Tensor:
        weights, rows = nearest(queries, bank, task.neighbours)
        total = queries.new_zeros(len(queries), classes, labels.shape[1])  # (Q, K, V)
        for neighbour in range(rows.shape[1]):
            ids = labels[rows[:, neighbour]].long().unsqueeze(1)  # (Q, 1, V)
            total.scatter_add_(1, ids, weights[:, neighbour, None, None].expand(ids.shape))
        return total

    @torch.no_grad()
    def predict(tokens: Tensor) -> Tensor:
        queries = F.normalize(standardize(tokens)[:, train.prefix :], dim=-1)  # (B, N, C)
        shares = torch.cat([votes(part) for part in queries.flatten(0, 1).split(chunk)])  # (B*N, K, V)
        if task.preset.regions:
            # above 0 where most votes are for one of the ids
            shares = torch.stack([shares[:, list(ids)].sum(dim=1) for ids in task.preset.regions.values()], dim=1) - 0.5
        return to_voxels(shares.transpose(1, 2).flatten(1).unflatten(0, queries.shape[:2]), task.architecture)

    return {None: predict}


def fit_crop_neighbours(train: Features, task: ProbeTask) -> dict[None, Predict]:
    """Return a predictor of each crop's class probabilities, or shares of its voxels, (B, K): the weighted mean of
    those of the crops with a similar CLS token (without one, mean of the patch tokens)."""
    summary = summary_of(train.tokens, train.prefix)
    standardize = Standardize(summary[:, None])
    bank, values = F.normalize(standardize(summary), dim=-1), class_shares(train, task)  # (M, C), (M, K)

    def predict(tokens: Tensor) -> Tensor:
        queries = F.normalize(standardize(summary_of(tokens, train.prefix)), dim=-1)
        weights, rows = nearest(queries, bank, task.neighbours)
        return (weights.unsqueeze(-1) * values[rows]).sum(dim=1)

    return {None: predict}


def class_shares(features: Features, task: ProbeTask) -> Tensor:
    """Return the share of each class in the voxels of a crop, (n, K); in classification its one-hot class."""
    ids = range(len(task.preset.labels))
    rows = features.targets.flatten(1) if features.targets.ndim > 1 else features.targets[:, None]
    return torch.stack([(rows == number).float().mean(dim=1) for number in ids], dim=1)


# ---------------------------------------------------------------- scores


def score_dice(predict: Predict, train: Features, part: HeldOut, task: ProbeTask) -> Scores:
    """Return `Dice`: of each case in the preprocessed space, mean over its classes that have a value."""
    found: dict[str, float | None] = {}
    for case, label in part.labels.items():
        # the windows come in the order of the tiles; their voxels are not needed
        blank, window = torch.zeros(1).expand(1, *label.shape), tiling(task.architecture.roi)
        values = label_dice(in_order(predict, part.features.of([case]).tokens), blank, label, task.preset, window)
        found[case] = mean(value for value in values if value == value)
    return {"Dice": found}


def in_order(predict: Predict, tokens: Tensor) -> Predict:
    """Return a function that ignores its argument but for the length, and predicts the next crops from `tokens`."""
    tiles = iter(tokens)
    return lambda crops: predict(torch.stack([next(tiles) for _ in crops]))


def score_shares(predict: Predict, train: Features, part: HeldOut, task: ProbeTask) -> Scores:
    """Return `R2` of the shares of the foreground classes in the crops: 1 - errors / errors of the training mean.

    Both errors are sums of squares over crops, R2 is the mean over classes that vary. The value of a case is such that
    R2 is the mean over cases: the sum of squares that divides is that of the average case.
    """
    truth, average = class_shares(part.features, task), class_shares(train, task).mean(dim=0)
    squares = torch.stack([(predict(part.features.tokens) - truth).square(), (average - truth).square()])[..., 1:]
    names = list(dict.fromkeys(part.features.cases))
    rows = [[row for row, case in enumerate(part.features.cases) if case == name] for name in names]
    error, total = torch.stack([squares[:, index].sum(dim=1) for index in rows], dim=1).cpu()  # (cases, K-1) each
    varies = total.sum(dim=0) > 0
    values = (1 - error / total.mean(dim=0))[:, varies].mean(dim=1) if varies.any() else torch.full((len(names),), 0.0)
    return {"R2": dict(zip(names, values.tolist()))}


def score_classes(predict: Predict, train: Features, part: HeldOut, task: ProbeTask) -> Scores:
    """Return `balanced accuracy` (mean over classes of the share of their cases that is correct) and `accuracy`.

    The value of a correct case is 1 for the accuracy. For the balanced one it is such that it is the mean over cases.
    """
    targets = part.features.targets
    correct = (predict(part.features.tokens).argmax(dim=1) == targets).float()
    counts = torch.bincount(targets, minlength=len(task.preset.labels))
    weights = len(targets) / (counts[targets] * (counts > 0).sum())
    values = {"balanced accuracy": correct * weights, "accuracy": correct}
    return {metric: dict(zip(part.features.cases, value.tolist())) for metric, value in values.items()}


Fit = Callable[[Features, ProbeTask], Mapping[float | None, Predict]]
Score = Callable[[Predict, Features, HeldOut, ProbeTask], Scores]


def trained(name: str, attentive: bool, task: ProbeTask) -> Sequence[tuple[str, Fit, Score]]:
    """Return the trained probe for the task."""
    return [(name, partial(fit_heads, attentive=attentive), score_classes if task.classifies else score_dice)]


def neighbour_probes(task: ProbeTask) -> Sequence[tuple[str, Fit, Score]]:
    """Return the probes by nearest neighbours for the task."""
    summary = "knn cls" if task.architecture.class_token else "knn mean"
    if task.classifies:
        return [(summary, fit_crop_neighbours, score_classes)]
    return [("knn patches", fit_patch_neighbours, score_dice), (summary, fit_crop_neighbours, score_shares)]


# name -> the (title, fit, score) of its probes
PROBES: dict[str, Callable[[ProbeTask], Sequence[tuple[str, Fit, Score]]]] = {
    "linear": partial(trained, "linear", False),
    "knn": neighbour_probes,
    "attentive": partial(trained, "attentive", True),
}
