"""Fine-tuning in the common training loop: the method, its optimizer and its validation."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from common import distributed
from common.cache.volume import CachedVolume
from common.distributed import Run
from common.runlog import progress
from common.training.method import Method
from common.training.optim import build_optimizer
from common.training.parallel import autocast_dtype
from common.training.preemption import until_stopped
from Finetune.architectures import check_dense, load_state
from Finetune.cases import class_of
from Finetune.data import Volumes, resized
from Finetune.evaluation.classification import class_scores, write_scores
from Finetune.evaluation.metrics import dice_of
from Finetune.inference.label_map import largest_channel
from Finetune.inference.sliding_window import Predictor, Window, predictor, slabs
from Finetune.losses import dice_ce, region_dice
from Finetune.presets import Preset

Losses = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


class Finetuning(Method):
    """A network with its losses.

    Args:
        freeze: train only the head.
        head_warmup_steps: updates at the start in which only the head is trained.
    """

    def __init__(self, model: nn.Module, losses: Losses, freeze: bool = False, head_warmup_steps: int = 0):
        super().__init__()
        self.model, self.losses, self.frozen, self.head_warmup_steps = model, losses, freeze, head_warmup_steps
        if freeze:
            model.backbone.freeze_encoder()

    def forward(self, batch: dict[str, Tensor], step: int = 0, part: int = 0) -> dict[str, Tensor]:
        return self.losses(self.model, batch)

    def before_step(self, step: int) -> None:
        """Drop the gradients of the encoder during the warm-up of the head: AdamW skips parameters without one."""
        if step < self.head_warmup_steps:
            for name, parameter in self.model.backbone.named_parameters():
                if name in self.model.backbone.encoder_names:
                    parameter.grad = None

    def train(self, mode: bool = True) -> "Finetuning":
        super().train(mode)
        if self.frozen:
            self.model.backbone.eval()
        return self

    def checkpoint_state(self) -> dict[str, dict[str, Tensor]]:
        return {"state_dict": self.model.state_dict()}

    def load_checkpoint_state(self, content: dict) -> None:
        check_dense(content["state_dict"], "checkpoint")
        load_state(self.model, content["state_dict"], "checkpoint")


class SegmentationLosses(nn.Module):
    """The losses of a batch: `dice` and `ce`, or `dice` alone for overlapping regions.

    A batch holds `image` (B, crops, C, d, h, w) and `label` (B, crops, 1, d, h, w).

    Args:
        weight: (K,) of the classes in the cross-entropy; None: equal. It moves with the method, and is not saved.
    """

    def __init__(self, preset: Preset, weight: Tensor | None = None):
        super().__init__()
        self.regions = preset.regions
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, label = model(batch["image"].flatten(0, 1)), batch["label"].flatten(0, 1)
        return region_dice(logits, label, self.regions) if self.regions else dice_ce(logits, label, self.weight)


def make_optimizer(method: Finetuning, weight_decay: float, layer_decay: float | None) -> torch.optim.AdamW:
    """Return AdamW with betas (0.9, 0.999), and with timm's layer-wise learning rate decay if asked for.

    With `layer_decay` the learning rate of the encoder falls by this factor per block towards the input. The head has
    the full learning rate.
    """
    if layer_decay is None:
        return build_optimizer(method, weight_decay, betas=(0.9, 0.999))
    backbone = method.model.backbone
    groups = param_groups_layer_decay(
        backbone, weight_decay, no_weight_decay_list=backbone.no_weight_decay(), layer_decay=layer_decay
    )
    encoder = {id(p) for p in backbone.parameters()}
    head = [p for p in method.parameters() if id(p) not in encoder and p.requires_grad]
    groups += [
        {"params": [p for p in head if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in head if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)


# ---------------------------------------------------------------- validation


def validate(
    model: nn.Module, volumes: Volumes, preset: Preset, window: Window, run: Run, amp: str = "auto"
) -> dict[str, float]:
    """Return the mean Dice of the validation cases, over the classes of a case, then over cases; and per class.

    It is computed in the preprocessed space, to monitor a run. Finetune.evaluate scores in the space of the files.
    """
    names, predict = list(preset.scored()), predictor(model.eval(), run.device, autocast_dtype(amp, run.device))
    dice = over_cases(volumes, run, len(names), lambda volume: case_dice(predict, volume, preset, window))
    result = {"val/dice": float(dice.nanmean(dim=1).nanmean().nan_to_num())}
    per_class = zip(names, dice.nanmean(dim=0).tolist())
    return result | {f"val/dice {name}": value for name, value in per_class if value == value}


@torch.no_grad()
def over_cases(
    volumes: Volumes, run: Run, columns: int, scores: Callable[[CachedVolume], Sequence[float] | Tensor]
) -> Tensor:
    """Return the scores of every case, (cases, columns), on every rank. Each rank computes those of its own cases."""
    table = torch.zeros(len(volumes), columns, dtype=torch.float64)
    own = range(run.rank, len(volumes), run.world_size)
    for index in until_stopped(progress(own, desc="validate", unit="case"), run):
        table[index] = torch.as_tensor(scores(volumes[index]))
    return (distributed.all_reduce_mean(table.to(run.device)) * run.world_size).cpu()


def case_dice(predict: Predictor, volume: CachedVolume, preset: Preset, window: Window) -> list[float]:
    """Return the Dice of one cached case for each name in `preset.scored()`, NaN where the class is absent."""
    image = volume.read((0, 0, 0), volume.shape)
    return label_dice(predict, image, volume.read_label((0, 0, 0), volume.shape)[0], preset, window)


def label_dice(predict: Predictor, image: Tensor, label: Tensor, preset: Preset, window: Window) -> list[float]:
    """Return the Dice as `case_dice`, of an image (C, D, H, W) with the label map (D, H, W)."""
    predicted = torch.zeros(len(preset.regions) or 1, *label.shape, dtype=torch.uint8)
    for first, logits in slabs(image, predict, window):
        predicted[:, first : first + logits.shape[1]] = decide(logits, preset)
    scores = []
    for position, ids in enumerate(preset.scored().values()):
        mask = predicted[position].bool() if preset.regions else torch.isin(predicted[0], torch.tensor(ids))
        dice = dice_of(mask.numpy(), torch.isin(label, torch.tensor(ids)).numpy())
        scores.append(float("nan") if dice is None else dice)
    return scores


def decide(logits: Tensor, preset: Preset) -> Tensor:
    """Return ids (1, D, H, W) from logits (K, D, H, W), or a mask per region (K, D, H, W), uint8."""
    if preset.regions:
        return (logits > 0).to(torch.uint8)
    return largest_channel(logits)[None]


def validate_classes(
    model: nn.Module, volumes: Volumes, preset: Preset, roi: Sequence[int], run: Run, amp: str, out: Path | None
) -> dict[str, float]:
    """Return accuracy and AUC of the validation cases (see `class_scores`).

    With `out`, rank 0 writes classification.csv and classification.json there.
    """
    predict = predictor(model.eval(), run.device, autocast_dtype(amp, run.device))

    probabilities = over_cases(
        volumes, run, len(preset.labels), lambda volume: predict(resized(volume, roi)[None])[0].float().softmax(dim=0)
    )
    targets = torch.tensor([class_of(preset, volume.source) for volume in volumes])
    scores = class_scores(probabilities, targets, preset)
    if out is not None and run.rank == 0:
        write_scores(out, [volume.name for volume in volumes], probabilities, targets, scores, preset)
    return {f"val/{name}": value for name, value in scores.items()}
