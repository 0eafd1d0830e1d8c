"""Features of a frozen encoder for crops of cached volumes: what the probes in probes.py are trained and tested on.

    n crops   P prefix tokens (1 with a CLS token, else 0)   N = d*h*w patches   V voxels of a patch   C width

Features are computed once and stay in memory: n * (P+N) * C * 4 bytes on the encoder's device, and one byte per voxel
of the crops for labels. 24 CT volumes of 18 crops of 96^3 voxels with a ViT-B of patch 16 take 290 MB and 380 MB.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.cache.volume import CachedVolume
from common.data.sampler import generator
from common.files import digest
from common.runlog import progress
from common.training.parallel import autocast, autocast_dtype
from Finetune.cases import class_of
from Finetune.data import Volumes, crop_start, resized
from Finetune.encoder3d import grid_of
from Finetune.inference.sliding_window import Window, window_starts
from Finetune.presets import Preset

Grid = tuple[int, int, int]
Reader = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Features:
    """Tokens of crops with their targets.

    Attributes:
        tokens: (n, P+N, C) float32, after the encoder's final norm, prefix first.
        targets: ids of the voxels of every patch (n, N, V) uint8, as `to_patches` orders them; in classification the
            class numbers (n,).
        cases: the case of each crop.
        prefix: P.
    """

    tokens: Tensor
    targets: Tensor
    cases: tuple[str, ...]
    prefix: int

    @property
    def patches(self) -> Tensor:
        """The tokens of the patches, (n, N, C)."""
        return self.tokens[:, self.prefix :]

    def of(self, names: Iterable[str]) -> "Features":
        """Return the features of these cases, in their order here."""
        wanted = set(names)
        rows = [row for row, case in enumerate(self.cases) if case in wanted]
        if len(rows) == len(self.cases):
            return self
        index = torch.tensor(rows, device=self.tokens.device)
        return Features(self.tokens[index], self.targets[index], tuple(self.cases[row] for row in rows), self.prefix)


def summary_of(tokens: Tensor, prefix: int) -> Tensor:
    """Return the CLS token (B, C) of tokens (B, P+N, C); without one, the mean of the patch tokens."""
    return tokens[:, 0] if prefix else tokens.mean(dim=1)


def to_patches(label: Tensor, patch: Sequence[int]) -> Tensor:
    """Return label maps (B, 1, D, H, W) as the voxels of their patches (B, N, V), both in raster order."""
    d, h, w = grid_of(label.shape[2:], patch)
    p, q, r = patch
    parts = label.view(len(label), d, p, h, q, w, r).permute(0, 1, 3, 5, 2, 4, 6)
    return parts.reshape(len(label), d * h * w, p * q * r)


# ---------------------------------------------------------------- crops


def tiling(roi: Grid, batch: int = 2) -> Window:
    """Return the sliding window without overlap. Where its last crop of an axis overlaps the one before, logits are
    averaged."""
    return Window(tuple(roi), overlap=0.0, blending="constant", batch=batch)


def tile_starts(shape: Sequence[int], roi: Grid) -> list[Grid]:
    """Return the first voxels of crops that cover a volume, in the order of `tiling`.

    On an axis shorter than the crop the volume is in the middle of it. On a longer one crops are side by side from the
    first voxel on, and the last one ends at the last voxel.
    """
    before = [max(size - have, 0) // 2 for have, size in zip(shape, roi)]
    starts = window_starts(shape, tiling(roi))
    return [tuple(first - margin for first, margin in zip(start, before)) for start in starts]


def crops_of(volume: CachedVolume, preset: Preset, roi: Grid, patch: Grid, extra: int) -> tuple[Tensor, Tensor]:
    """Return the crops (n, C, *roi) of a volume with their targets, as in `Features`.

    A segmentation preset has the tiling, then `extra` random crops as in fine-tuning, which depend on the name of the
    case only. A classification preset has one: the whole volume, resized.
    """
    if preset.task == "classification":
        return resized(volume, roi)[None], torch.tensor([class_of(preset, volume.source)])
    rng = generator(int(digest([volume.name]), 16), 0)
    starts = [*tile_starts(volume.shape, roi), *(crop_start(volume, roi, rng) for _ in range(extra))]
    images = torch.stack([volume.read(start, roi) for start in starts])
    labels = torch.stack([volume.read_label(start, roi) for start in starts])
    return images, to_patches(labels, patch)


# ---------------------------------------------------------------- features


def token_reader(encoder: nn.Module, device: torch.device, amp: str = "auto") -> Reader:
    """Return a function from crops (B, in_chans, D, H, W) to the tokens (B, P+N, C) of the frozen encoder, float32."""
    encoder, dtype = encoder.eval().to(device), autocast_dtype(amp, device)

    @torch.no_grad()
    def read(crops: Tensor) -> Tensor:
        # all patches are kept: both encoders then return all their tokens after the final norm
        count = math.prod(grid_of(crops.shape[2:], encoder.patch_size))
        with autocast(device, dtype):
            ids = torch.arange(count, device=device).expand(len(crops), -1)
            return encoder(crops.to(device), ids_keep=ids).float()

    return read


def extract(
    encoder: nn.Module,
    volumes: Volumes,
    preset: Preset,
    roi: Grid,
    device: torch.device,
    extra: int = 0,
    batch: int = 4,
    amp: str = "auto",
) -> Features:
    """Return the features of the crops of all volumes, see `crops_of`. `batch` is the number of crops per pass."""
    read = token_reader(encoder, device, amp)
    tokens, targets, cases = [], [], []
    for volume in progress(volumes, desc="features", unit="case"):
        images, target = crops_of(volume, preset, roi, encoder.patch_size, extra)
        tokens += [read(part) for part in images.split(batch)]
        targets.append(target.to(device))
        cases += [volume.name] * len(images)
    return Features(torch.cat(tokens), torch.cat(targets), tuple(cases), encoder.num_prefix_tokens)
