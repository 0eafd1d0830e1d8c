"""What fine-tuning adds to the common training loop: the method, its optimiser, and validation by sliding window."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from common import distributed, watchdog
from common.cache.volume import CachedVolume
from common.distributed import Run
from common.errors import InputError
from common.runlog import progress
from common.training.method import Method
from common.training.optim import build_optimizer
from common.training.parallel import autocast_dtype
from common.training.preemption import until_stopped
from Finetune.architectures import load_state
from Finetune.cases import class_of
from Finetune.data import resized
from Finetune.evaluation.classification import class_scores, write_scores
from Finetune.evaluation.metrics import dice_of
from Finetune.inference.sliding_window import Window, slabs
from Finetune.losses import DiceCE, RegionDice
from Finetune.presets import Preset

Losses = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


class Finetuning(Method):
    """A network and what it is trained for: forward(batch, step) -> named losses, `losses(model, batch)`."""

    def __init__(self, model: nn.Module, losses: Losses, freeze: bool = False):
        super().__init__()
        self.model, self.losses, self.frozen = model, losses, freeze
        if freeze:
            model.backbone.freeze_encoder()

    def forward(self, batch: dict[str, Tensor], step: int = 0, part: int = 0) -> dict[str, Tensor]:
        return self.losses(self.model, batch)

    def train(self, mode: bool = True) -> "Finetuning":
        super().train(mode)
        if self.frozen:
            self.model.backbone.eval()
        return self

    def checkpoint_state(self) -> dict[str, dict[str, Tensor]]:
        return {"state_dict": self.model.state_dict()}

    def load_checkpoint_state(self, content: dict) -> None:
        load_state(self.model, content["state_dict"], "checkpoint")


def segmentation_losses(preset: Preset) -> Losses:
    """{`dice`, `ce`}, or {`dice`} for overlapping regions, of `image` (B, crops, C, d, h, w) and `label` (B, crops, 1,
    d, h, w)."""
    criterion = RegionDice(preset.regions) if preset.regions else DiceCE()

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return criterion(model(batch["image"].flatten(0, 1)), batch["label"].flatten(0, 1))

    return losses


def make_optimizer(method: Finetuning, weight_decay: float, layer_decay: float | None) -> torch.optim.AdamW:
    """AdamW (0.9, 0.999). With `layer_decay` d, the learning rate of the encoder falls by d per block towards the
    input; the head's is whole."""
    if layer_decay is None:
        return build_optimizer(method, weight_decay, betas=(0.9, 0.999))
    if not 0 < layer_decay <= 1:
        raise InputError(f"layer_decay: found {layer_decay}, needs more than 0 and at most 1")
    backbone = method.model.backbone
    groups = param_groups_layer_decay(
        backbone, weight_decay, no_weight_decay_list=backbone.no_weight_decay(), layer_decay=layer_decay
    )
    inside = {id(p) for p in backbone.parameters()}
    head = [p for p in method.parameters() if id(p) not in inside and p.requires_grad]
    groups += [
        {"params": [p for p in head if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in head if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)


@torch.no_grad()
def validate(
    model: nn.Module, entries: Sequence[CachedVolume], preset: Preset, window: Window, run: Run, amp: str = "auto"
) -> dict[str, float]:
    """Mean Dice of the validation cases on the preprocessed grid, over the classes of a case, then over cases; each
    rank takes its share of the cases. For watching a run: the score card is made by Finetune.evaluate, on the files'
    own grids."""
    model.eval()
    dtype = autocast_dtype(amp, run.device)
    names = list(preset.scored())
    sums, counts = (
        torch.zeros(len(names) + 1),
        torch.zeros(len(names) + 1),
    )  # one per class, the last for the mean of a case
    for entry in until_stopped(progress(entries[run.rank :: run.world_size], desc="validate", unit="case"), run):
        values = case_dice(model, entry, preset, window, run.device, dtype)
        present = [value for value in values if value is not None]
        for position, value in enumerate([*values, sum(present) / len(present) if present else None]):
            if value is not None:
                sums[position] += value
                counts[position] += 1
    sums, counts = (distributed.all_reduce_mean(t.to(run.device)).cpu() for t in (sums, counts))
    result = {"val/dice": float(sums[-1] / counts[-1].clamp(min=1e-9))}
    for name, total, count in zip(names, sums, counts):
        if count > 0:
            result[f"val/dice {name}"] = float(total / count)
    return result


def case_dice(
    model: nn.Module,
    entry: CachedVolume,
    preset: Preset,
    window: Window,
    device: torch.device,
    dtype: torch.dtype | None,
) -> list[float | None]:
    """Dice of one cached case, one value for each name of `preset.scored()`."""
    image = entry.read((0, 0, 0), entry.shape)
    label = entry.read_label((0, 0, 0), entry.shape)[0]
    found = torch.zeros(len(preset.regions) or 1, *entry.shape, dtype=torch.uint8)
    for first, logits in slabs(image, predictor(model, device, dtype), window, device):
        found[:, first : first + logits.shape[1]] = decide(logits, preset)
    scores = []
    for position, ids in enumerate(preset.scored().values()):
        prediction = found[position].bool() if preset.regions else torch.isin(found[0], torch.tensor(ids))
        scores.append(dice_of(prediction.numpy(), torch.isin(label, torch.tensor(ids)).numpy()))
    return scores


def decide(logits: Tensor, preset: Preset) -> Tensor:
    """Logits (K, D, H, W) -> ids (1, D, H, W), or one map of 0 and 1 per region, uint8."""
    if preset.regions:
        return (logits > 0).to(torch.uint8)
    return logits.argmax(dim=0, keepdim=True).to(torch.uint8)


def predictor(model: nn.Module, device: torch.device, dtype: torch.dtype | None):
    """The model as the sliding window calls it, under autocast where `dtype` says so."""

    def predict(crops: Tensor) -> Tensor:
        watchdog.reset()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return model(crops)

    return predict


@torch.no_grad()
def validate_classes(
    model: nn.Module,
    entries: Sequence[CachedVolume],
    preset: Preset,
    roi: tuple[int, int, int],
    run: Run,
    amp: str = "auto",
    out: Path | None = None,
) -> dict[str, float]:
    """Accuracy and AUC (one class against the others, mean over classes) of the validation cases; each rank takes its
    share.

    With `out`, classification.csv (a row per case) and classification.json (with intervals by bootstrap over cases)
    are written there.
    """
    model.eval()
    dtype = autocast_dtype(amp, run.device)
    shares = torch.zeros(len(entries), len(preset.labels), device=run.device)
    share = range(run.rank, len(entries), run.world_size)
    for index in until_stopped(progress(share, desc="validate", unit="case"), run):
        with torch.autocast(run.device.type, dtype=dtype, enabled=dtype is not None):
            logits = model(resized(entries[index], roi)[None].to(run.device))
        shares[index] = logits[0].float().softmax(dim=0)
    shares = (distributed.all_reduce_mean(shares) * run.world_size).cpu()
    targets = torch.tensor([class_of(preset, entry.source) for entry in entries])
    scores = class_scores(shares, targets, preset)
    if out is not None and run.rank == 0:
        write_scores(out, entries, shares, targets, scores, preset)
    return {f"val/{name}": value for name, value in scores.items()}
