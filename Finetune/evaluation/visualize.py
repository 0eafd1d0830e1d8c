"""Pictures of segmentations: label maps side by side in three planes, one colour per class, in radiological view (the
patient's right is on the left)."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from common.files import replacing
from Finetune.presets import Preset

# pixels: width of the column of a label map, and of the gap between planes
COLUMN, GAP = 480, 4
# mm around the labels that a picture shows
MARGIN = 25
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
    """Draw each label map over the image in a column of its own: axial, below it coronal and sagittal; and a legend.

    The planes are cropped to the labels and a margin, and fill the column. The coronal and the sagittal plane of a
    thick scan are beside each other, those of a thin one below each other.

    Args:
        image: (D, H, W) in [0, 1], RAS.
        labels: label maps (D, H, W) in the space of the image. The planes are those with most labelled voxels in the
            first label map that is not empty.
        spacing: mm per voxel.
        names: id -> name in the legend.
        titles: one per label map.
    """
    box = labelled_box(labels, spacing)
    image, labels = image[box], [label[box] for label in labels]
    reference = next((label for label in labels if label.any()), labels[0])
    cuts = [(axis, most_labelled(reference, axis)) for axis in (2, 1, 0)]
    columns = [_titled(_column(image, label, cuts, spacing), title) for label, title in zip(labels, titles)]
    present = {number: name for number, name in names.items() if any((label == number).any() for label in labels)}
    return _legend(_join(columns, axis=1), present)


def _column(image: np.ndarray, label: np.ndarray, cuts: Sequence[tuple[int, int]], spacing: Sequence[float]) -> Pixels:
    """Draw the planes `cuts` (axis, index), axial, coronal and sagittal, in a column."""
    width, depth, height = np.multiply(image.shape, spacing)
    if 2 * height < width:
        return _join([panel(image, label, *cut, spacing, COLUMN) for cut in cuts], axis=0)
    # the two other planes have the same height, and together the width of the axial one
    left = round((COLUMN - GAP) * width / (width + depth))
    axial, *beside = (
        panel(image, label, *cut, spacing, pixels) for cut, pixels in zip(cuts, (COLUMN, left, COLUMN - GAP - left))
    )
    return _join([axial, _join(beside, axis=1)], axis=0)


def labelled_box(labels: Sequence[np.ndarray], spacing: Sequence[float]) -> tuple[slice, ...]:
    """Return the box of the voxels that label maps (D, H, W) label, with MARGIN; all of the image if there are none.

    Args:
        spacing: mm of a voxel along D, H, W.
    """
    labelled = np.any([label > 0 for label in labels], axis=0)
    box = []
    for axis, (length, mm) in enumerate(zip(labelled.shape, spacing)):
        found = np.flatnonzero(labelled.any(axis=tuple(a for a in range(3) if a != axis)))
        if not len(found):
            return (slice(None),) * 3
        margin = round(MARGIN / mm)
        box.append(slice(max(0, found[0] - margin), min(length, found[-1] + margin + 1)))
    return tuple(box)


def colour(number: int) -> tuple[int, int, int]:
    """Return the colour of class `number` (from 1), far from those of its neighbours."""
    hue = (0.61803 * number) % 1.0
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.75 if number % 2 else 0.95, 1.0))


def most_labelled(label: np.ndarray, axis: int) -> int:
    """Return the index along `axis` of the plane of a label map (D, H, W) with most labelled voxels.

    It is the middle one if there are none.
    """
    counts = (label > 0).sum(axis=tuple(a for a in range(3) if a != axis))
    return int(counts.argmax()) if counts.any() else label.shape[axis] // 2


def panel(image: np.ndarray, label: np.ndarray, axis: int, index: int, spacing: Sequence[float], width: int) -> Pixels:
    """Draw one plane upright, `width` pixels wide, with square pixels and the classes blended over it.

    Args:
        image, label: (D, H, W); the image is shown from 0 to 1.
        axis, index: the plane.
        spacing: mm of a voxel along each axis.

    Returns:
        (H, W, 3) uint8.
    """
    grey = np.clip(image.take(index, axis), 0, 1).T[::-1, ::-1]
    classes = label.take(index, axis).T[::-1, ::-1]
    columns, rows = (s for a, s in enumerate(spacing) if a != axis)
    size = (width, max(1, round(width * grey.shape[0] * rows / (grey.shape[1] * columns))))
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


def _join(parts: Sequence[Pixels], axis: int) -> Pixels:
    """Join pictures side by side (axis 1) or one below the other (axis 0), padded with black to the same length."""
    extent = max(part.shape[1 - axis] for part in parts)
    joined = []
    for number, part in enumerate(parts):
        padding = [(0, 0)] * 3
        padding[axis] = (GAP if number else 0, 0)
        padding[1 - axis] = (0, extent - part.shape[1 - axis])
        joined.append(np.pad(part, padding))
    return np.concatenate(joined, axis=axis)


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
