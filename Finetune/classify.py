"""Classification of whole volumes (CC-CCII): a ViT, the mean of its patch tokens, one linear layer; accuracy and AUC.

Fine-tuned as a whole, or linear: `--freeze` trains the last layer alone. The volume is resized to the preset's roi.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.metrics import compute_roc_auc
from torch import Tensor, nn
from torch.utils.data import Dataset

from common import distributed
from common.agreement import until_stopped
from common.cache import Entry
from common.distributed import Run
from common.files import save_bytes
from common.logging import progress
from common.parallel import autocast_dtype
from common.sampling import generator
from Finetune.cases import class_of
from Finetune.metrics import bootstrap_interval
from Finetune.presets import Preset


class Classifier(nn.Module):
    """(B, C, D, H, W) -> logits (B, K). The authors pool before the encoder's norm, here it is after it (our choice),
    so that the pretrained norm sees what it was trained on."""

    def __init__(self, backbone: nn.Module, classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x, return_features=True)["patch_features"].mean(dim=1))


class VolumeDataset(Dataset):
    """Whole volumes at one size: {"image": (C, *roi), "target": class number}. Flips are drawn from (seed, position)
    alone."""

    def __init__(self, entries: Sequence[Entry], preset: Preset, roi: tuple[int, int, int], seed: int = 0):
        self.entries, self.preset, self.roi, self.seed = list(entries), preset, tuple(roi), seed
        self.targets = [class_of(preset, entry.source) for entry in entries]

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return self.entries[index].name

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        position, index = key
        image = resized(self.entries[index], self.roi)
        draws = torch.rand(3, generator=generator(self.seed, position))
        axes = [axis + 1 for axis in range(3) if draws[axis] < self.preset.augmentation.flip]
        return {"image": image.flip(axes), "target": torch.tensor(self.targets[index])}


def resized(entry: Entry, roi: Sequence[int]) -> Tensor:
    """The whole volume (C, *roi), trilinearly."""
    image = entry.read((0, 0, 0), entry.shape)
    return F.interpolate(image[None], size=tuple(roi), mode="trilinear", align_corners=False)[0]


def classification_losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """{`ce`} of `image` (B, C, *roi) and `target` (B,)."""
    return {"ce": F.cross_entropy(model(batch["image"]).float(), batch["target"])}


@torch.no_grad()
def validate_classes(
    model: nn.Module,
    entries: Sequence[Entry],
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


def class_scores(shares: Tensor, targets: Tensor, preset: Preset) -> dict[str, float]:
    """Probabilities (N, K) and classes (N) -> accuracy, AUC per class, and `auc`, their mean. A class that all or none
    of the cases have has no AUC and is left out."""
    scores = {"accuracy": float((shares.argmax(dim=1) == targets).float().mean())}
    for number, name in preset.labels.items():
        positive = (targets == number).float()
        if 0 < positive.sum() < len(positive):
            scores[f"auc {name}"] = float(compute_roc_auc(shares[:, number], positive))
    values = [value for name, value in scores.items() if name.startswith("auc ")]
    return scores | ({"auc": sum(values) / len(values)} if values else {})


def write_scores(
    out: Path, entries: Sequence[Entry], shares: Tensor, targets: Tensor, scores: dict[str, float], preset: Preset
) -> None:
    """classification.csv and classification.json in `out`."""
    found = shares.argmax(dim=1)
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["case", "class", "predicted", *(f"probability {name}" for name in preset.labels.values())])
    for entry, target, guess, row in zip(entries, targets.tolist(), found.tolist(), shares.tolist()):
        writer.writerow([entry.name, preset.labels[target], preset.labels[guess], *(f"{value:.4f}" for value in row)])
    interval = bootstrap_interval((found == targets).float().tolist())
    absent = [name for number, name in preset.labels.items() if not (targets == number).any()]
    card = {"preset": preset.name, "cases": len(entries), "scores": scores, "accuracy_ci95": interval, "absent": absent}
    save_bytes(out / "classification.csv", buffer.getvalue().encode())
    save_bytes(out / "classification.json", json.dumps(card, indent=2).encode())
