"""Resampling of logits from the preprocessed space to the space of a file, a few rows at a time.

The two spaces are related by their affines: index in the file -> mm -> index in the preprocessed volume. Preprocessing
permutes, flips, scales and shifts axes only, so this map takes each axis to one axis, and trilinear interpolation is
three interpolations along one axis each. A file with a slight shear (common.data.geometry allows it) breaks that: it is
sampled in 3D, from the source rows that each block of its rows crosses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from Finetune.inference.sliding_window import ROWS

Slabs = Iterator[tuple[int, Tensor]]
Where = tuple[slice, slice, slice]
Emit = Callable[[Where, Tensor], None]


@dataclass(frozen=True)
class Space:
    """The shape (D, H, W) of a volume and its affine (4, 4) from index to mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray


def resample_logits(slabs: Slabs, source: Space, target: Space, emit: Emit) -> None:
    """Resample logits and pass them to `emit` piece by piece.

    Args:
        slabs: (first row, logits (K, rows, H, W)) in the source space, in order, as `sliding_window.slabs` yields them.
        emit: called with slices of the target array and their logits (K, d, h, w). Voxels more than half a voxel
            outside the source are not emitted, or emitted as background; within that margin the nearest voxel counts.
    """
    # target index -> source index
    matrix = np.linalg.inv(source.affine) @ target.affine
    axes = one_to_one(matrix[:3, :3])
    # the target axis along the first source axis, and blocks of it in the order in which the source yields their rows
    lead = int(np.abs(matrix[0, :3]).argmax())
    starts = range(0, target.shape[lead], ROWS)[:: 1 if matrix[0, lead] > 0 else -1]
    blocks = []
    for first in starts:
        where = [slice(0, n) for n in target.shape]
        where[lead] = slice(first, min(first + ROWS, target.shape[lead]))
        blocks.append(tuple(where))
    needed = [_source_rows(matrix, where, source.shape[0]) for where in blocks]
    for where, (base, held) in zip(blocks, _held(slabs, needed)):
        if axes:
            _emit_by_axis(held, base, source, matrix, axes, where, emit)
        else:
            _emit_sheared(held, base, source, matrix, where, emit)


def _source_rows(matrix: np.ndarray, where: Where, extent: int) -> tuple[int, int]:
    """Return the first and last source row that the target voxels in `where` need."""
    ends = matrix[0, :3, None] * [[part.start, part.stop - 1] for part in where]  # (3, 2)
    low, high = (side.sum() + matrix[0, 3] for side in (ends.min(axis=1), ends.max(axis=1)))
    return int(np.clip(np.floor(low), 0, extent - 1)), int(np.clip(np.ceil(high), 0, extent - 1))


def _held(slabs: Slabs, needed: Sequence[tuple[int, int]]) -> Slabs:
    """Yield, for each ascending (first, last) source row in `needed`, (base, logits (K, rows, H, W)) that start at row
    `base` <= first and reach at least `last`. Rows before `first` are dropped."""
    base, held = next(slabs)
    for first, last in needed:
        while True:
            drop = min(max(first - base, 0), held.shape[1])
            base, held = base + drop, held[:, drop:]
            if base + held.shape[1] > last:
                break
            held = torch.cat([held, next(slabs)[1]], dim=1)
        yield base, held


def one_to_one(matrix: np.ndarray) -> list[int] | None:
    """Return for each column of a 3x3 matrix the row of its only entry; None if a column has another large one."""
    size = np.abs(matrix)
    axes = size.argmax(axis=0).tolist()
    rest = size.copy()
    rest[axes, range(3)] = 0
    # less than a voxel of drift over a thousand voxels
    clean = (rest * 1000 <= size.max(axis=0)).all()
    return axes if clean and sorted(axes) == [0, 1, 2] else None


def _emit_by_axis(
    held: Tensor, base: int, source: Space, matrix: np.ndarray, axes: Sequence[int], where: Where, emit: Emit
) -> None:
    """Interpolate along one axis after the other, and emit the target voxels in `where` that are inside the source."""
    where, piece = list(where), held
    for a, extent in enumerate(source.shape):
        t = axes.index(a)
        index = torch.arange(where[t].start, where[t].stop)
        place = index.double() * float(matrix[a, t]) + float(matrix[a, 3])
        inside = (place >= -0.5 - 1e-4) & (place <= extent - 0.5 + 1e-4)
        if not inside.any():
            return
        where[t] = slice(int(index[inside][0]), int(index[inside][-1]) + 1)
        piece = _along(piece, 1 + a, place[inside].clamp(0, extent - 1) - (base if a == 0 else 0))
    emit(tuple(where), piece.permute(0, *(1 + a for a in axes)))


def _along(x: Tensor, axis: int, where: Tensor) -> Tensor:
    """Interpolate `x` linearly at the coordinates `where` of one axis."""
    lower = where.floor().long().clamp(0, x.shape[axis] - 1)
    upper = (lower + 1).clamp(max=x.shape[axis] - 1)
    share = (where - lower).to(x.dtype)
    if not share.any():
        return x.index_select(axis, lower)
    share = share.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return torch.lerp(x.index_select(axis, lower), x.index_select(axis, upper), share)


def _emit_sheared(held: Tensor, base: int, source: Space, matrix: np.ndarray, where: Where, emit: Emit) -> None:
    """Interpolate in 3D, and emit the target voxels in `where`, as background outside the source."""
    axes = (torch.arange(part.start, part.stop, dtype=torch.float64) for part in where)
    index, m = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1), torch.from_numpy(matrix)
    place = index @ m[:3, :3].T + m[:3, 3]  # (d, h, w, 3)
    inside = ((place >= -0.5) & (place <= torch.tensor(source.shape) - 0.5)).all(dim=-1)
    place[..., 0] -= base
    # grid_sample's coordinates for align_corners=False, last axis first
    scaled = (2 * place + 1) / torch.tensor(held.shape[1:]) - 1
    piece = F.grid_sample(held[None], scaled.flip(-1)[None].float(), padding_mode="border", align_corners=False)[0]
    # outside the source: no region, or of the classes the first, background
    piece[:, ~inside] = float("-inf")
    piece[0, ~inside] = 0.0
    emit(where, piece)
