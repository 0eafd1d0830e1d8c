"""Pictures of segmentations: three planes, one colour per class, in radiological view (the patient's right is on the
left)."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from common.files import replacing
from Finetune.presets import Preset

# pixels of the longer side of a plane
PANEL = 320
# (H, W, 3) uint8
Pixels = np.ndarray


def to_grey(image: Tensor, preset: Preset) -> np.ndarray:
    """Return the first channel of an image (C, D, H, W) scaled to [0, 1], in half precision."""
    pixels = image.as_tensor()[0]
    if preset.intensity == "window":
        low, high = preset.low, preset.high
    else:
        sample = pixels.flatten()[:: max(1, pixels.numel() // 100_000)]
        low, high = torch.quantile(sample, torch.tensor([0.005, 0.995])).tolist()
    return ((pixels - low) / max(high - low, 1e-6)).clamp(0, 1).half().numpy()


def overlay(
    image: np.ndarray,
    labels: Sequence[np.ndarray],
    spacing: Sequence[float],
    names: dict[int, str],
    titles: Sequence[str],
) -> Pixels:
    """Draw each label map over the image in a row of its own: axial, beside it coronal above sagittal; and a legend.

    Args:
        image: (D, H, W) in [0, 1], RAS.
        labels: label maps (D, H, W) in the space of the image. The planes are those with most labelled voxels in the
            first label map that is not empty.
        spacing: mm per voxel.
        names: id -> name in the legend.
        titles: one per label map.
    """
    reference = next((label for label in labels if label.any()), labels[0])
    planes = [most_labelled(reference, axis) for axis in (2, 1, 0)]
    rows = []
    for label, title in zip(labels, titles):
        axial, coronal, sagittal = (panel(image, label, *cut, spacing) for cut in zip((2, 1, 0), planes))
        # planes of thick scans fit beside the axial plane at half the size
        if len(coronal) + len(sagittal) > len(axial):
            coronal, sagittal = coronal[::2, ::2], sagittal[::2, ::2]
        rows.append(_titled(_join([axial, _join([coronal, sagittal], axis=0)], axis=1), title))
    present = {number: name for number, name in names.items() if any((label == number).any() for label in labels)}
    return _legend(_join(rows, axis=0), present)


def colour(number: int) -> tuple[int, int, int]:
    """Return the colour of class `number` (from 1), far from those of its neighbours."""
    hue = (0.61803 * number) % 1.0
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.75 if number % 2 else 0.95, 1.0))


def most_labelled(label: np.ndarray, axis: int) -> int:
    """Return the index along `axis` of the plane with most labelled voxels, the middle one if there are none."""
    counts = (label > 0).sum(axis=tuple(a for a in range(3) if a != axis))
    return int(counts.argmax()) if counts.any() else label.shape[axis] // 2


def panel(image: np.ndarray, label: np.ndarray, axis: int, index: int, spacing: Sequence[float]) -> Pixels:
    """Draw one plane upright, with square pixels and the classes blended over it."""
    grey = np.clip(image.take(index, axis), 0, 1).T[::-1, ::-1]
    classes = label.take(index, axis).T[::-1, ::-1]
    columns, rows = (s for a, s in enumerate(spacing) if a != axis)
    extent = np.array([grey.shape[1] * columns, grey.shape[0] * rows])
    size = tuple(np.maximum(1, np.round(extent * PANEL / extent.max())).astype(int).tolist())
    base = np.asarray(Image.fromarray((grey * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR))
    mask = np.asarray(Image.fromarray(classes.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
    pixels = np.repeat(base[..., None], 3, axis=2).astype(np.float32)
    for number in np.unique(mask[mask > 0]).tolist():
        where = mask == number
        pixels[where] = 0.55 * pixels[where] + 0.45 * np.array(colour(number), np.float32)
    return pixels.round().astype(np.uint8)


def save_png(path: Path, pixels: Pixels) -> None:
    """Write a picture as PNG."""
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, "png")


def _join(parts: Sequence[Pixels], axis: int, gap: int = 4) -> Pixels:
    """Join pictures side by side (axis 1) or one above the other (axis 0), padded with black to the same length."""
    extent = max(part.shape[1 - axis] for part in parts)
    padding = [[(0, gap), (0, extent - part.shape[1 - axis])][:: 1 if axis == 0 else -1] for part in parts]
    return np.concatenate([np.pad(part, [*pad, (0, 0)]) for part, pad in zip(parts, padding)], axis=axis)


def _titled(row: Pixels, title: str) -> Pixels:
    canvas = Image.fromarray(np.pad(row, ((16, 0), (0, 0), (0, 0))))
    ImageDraw.Draw(canvas).text((4, 2), title, fill=(255, 255, 255))
    return np.asarray(canvas)


def _legend(pixels: Pixels, names: Mapping[int, str]) -> Pixels:
    per_row = max(1, pixels.shape[1] // 200)
    canvas = Image.fromarray(np.pad(pixels, ((0, 16 * -(-len(names) // per_row)), (0, 0), (0, 0))))
    draw = ImageDraw.Draw(canvas)
    for position, (number, name) in enumerate(names.items()):
        x, y = 200 * (position % per_row) + 4, pixels.shape[0] + 16 * (position // per_row) + 2
        draw.rectangle((x, y, x + 10, y + 10), fill=colour(number))
        draw.text((x + 16, y), name, fill=(255, 255, 255))
    return np.asarray(canvas)
