"""Logits to label maps and probabilities, and the files that hold them, in the space of the image file."""

import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage
from torch import Tensor

from common.data.nifti import write_nifti
from common.files import replacing
from Finetune.inference.resample import Emit, Space, Where
from Finetune.presets import Preset

# first byte of the values in a NIfTI file without extensions
DATA_OFFSET = 352


def file_space(image: MetaTensor) -> Space:
    """Return the space of the file that `image` was read from."""
    return Space(tuple(map(int, image.meta["spatial_shape"])), np.asarray(image.meta["original_affine"], np.float64))


def label_map(logits: Tensor, preset: Preset) -> Tensor:
    """Return ids (d, h, w) uint8 from logits (K, d, h, w).

    Overlapping regions are painted from the largest to the smallest: a voxel gets the id that is in its region and in
    none of the smaller ones.
    """
    if not preset.regions:
        return largest_channel(logits)
    ids = torch.zeros(logits.shape[1:], dtype=torch.uint8)
    order = sorted(enumerate(preset.regions.values()), key=lambda item: -len(item[1]))
    for position, (channel, members) in enumerate(order):
        smaller = {number for _, other in order[position + 1 :] for number in other if set(other) < set(members)}
        ids[logits[channel] > 0] = min(set(members) - smaller or members)
    return ids


def keep_largest_components(labels: np.ndarray, ids: Collection[int], foreground: bool = False) -> None:
    """Remove from a label map (D, H, W), in place, all but the largest connected component of each class in `ids`.

    With `foreground`, first all but the largest connected component of all classes together. Voxels are connected
    through faces. What is removed becomes the background.
    """
    if foreground:
        keep_largest(labels, labels > 0)
    for number in ids:
        keep_largest(labels, labels == number)


def keep_largest(labels: np.ndarray, mask: np.ndarray) -> None:
    """Set a label map (D, H, W) to 0, in place, in all but the largest connected component of a mask (D, H, W)."""
    components, count = ndimage.label(mask)
    if count > 1:
        largest = 1 + np.bincount(components.ravel())[1:].argmax()
        labels[mask & (components != largest)] = 0


def largest_channel(logits: Tensor) -> Tensor:
    """Return the channel of the largest logit (d, h, w) uint8 from logits (K, d, h, w), the first of equal ones.

    Equal to `argmax(dim=0)`, which took four times as long on a CPU (torch 2.14.1, 14 channels).
    """
    largest = logits.amax(dim=0)
    found = torch.zeros(logits.shape[1:], dtype=torch.uint8, device=logits.device)
    # the first channel comes last, so that it wins where it is equal to others
    for channel in reversed(range(len(logits))):
        found.masked_fill_(logits[channel] == largest, channel)
    return found


def write_label_map(path: Path, labels: np.ndarray, space: Space, source: Path) -> None:
    """Write a label map (D, H, W), with the axes of `source`, as NIfTI.

    The header is that of `source` where that is NIfTI; otherwise it has the affine alone.
    """
    if source.name.endswith((".nii", ".nii.gz")):
        image = nib.Nifti1Image(labels, None, nib.load(source).header.copy())
        image.header.set_data_dtype(np.uint8)
        image.header["cal_min"] = image.header["cal_max"] = 0
    else:
        image = nib.Nifti1Image(labels, space.affine)
        image.header.set_xyzt_units("mm")
    write_nifti(path, image)


@contextmanager
def probability_map(path: Path, space: Space, preset: Preset) -> Iterator[Emit]:
    """Yield a function that writes logits (K, d, h, w) at slices of the image as probabilities.

    They are 8-bit numbers in a NIfTI file (D, H, W, K), memory-mapped, so that they need not fit in memory. `path`
    exists after the block, unless it raises.
    """
    shape = (*space.shape, preset.out_channels)
    header = nib.Nifti1Image(np.zeros((1, 1, 1, 1), np.uint8), space.affine).header
    header.set_data_shape(shape)
    header.set_slope_inter(1 / 255, 0)
    header["vox_offset"] = DATA_OFFSET
    to_probability: Callable[[Tensor], Tensor] = torch.sigmoid if preset.regions else lambda x: x.softmax(dim=0)
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(header.binaryblock + b"\0" * 4)
            # a full disk is an error here, not a SIGBUS later
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, DATA_OFFSET + math.prod(shape))
        values = np.memmap(temporary, np.uint8, "r+", offset=DATA_OFFSET, shape=shape, order="F")
        # voxels that are never written are background
        values[..., 0] = 0 if preset.regions else 255

        def write(where: Where, logits: Tensor) -> None:
            values[where] = (to_probability(logits) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()

        yield write
        values.flush()
