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
    if axes is None:
        _resample_sheared(slabs, source, target, matrix, emit)
        return
    # order[a]: the target axis along the source axis a
    order = [axes.index(axis) for axis in range(3)]
    coordinates = [_coordinates(matrix, a, order[a], target.shape[order[a]], source.shape[a]) for a in range(3)]
    if any(len(inside) == 0 for inside, _ in coordinates):
        return
    rows, wanted = coordinates[0]
    blocks = _blocks(len(rows), falling=matrix[0, order[0]] < 0)
    needed = [(int(wanted[block].min().floor()), int(wanted[block].max().ceil())) for block in blocks]
    for block, (base, held) in zip(blocks, _held(slabs, needed)):
        piece = _along(held, 1, wanted[block] - base)
        piece = _along(_along(piece, 2, coordinates[1][1]), 3, coordinates[2][1])
        where = [slice(0)] * 3
        for a, index in enumerate((rows[block], coordinates[1][0], coordinates[2][0])):
            where[order[a]] = slice(int(index[0]), int(index[-1]) + 1)
        emit(tuple(where), piece.permute(0, *(1 + axes[t] for t in range(3))))


def _blocks(length: int, falling: bool) -> list[slice]:
    """Return blocks of up to `ROWS` target rows, in the order in which the source yields the rows they need."""
    blocks = [slice(first, min(first + ROWS, length)) for first in range(0, length, ROWS)]
    return blocks[::-1] if falling else blocks


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


def _coordinates(matrix: np.ndarray, row: int, column: int, length: int, extent: int) -> tuple[Tensor, Tensor]:
    """Return the indices of a target axis inside the source axis, and their source coordinates, clamped to centres."""
    where = torch.arange(length, dtype=torch.float64) * float(matrix[row, column]) + float(matrix[row, 3])
    inside = ((where >= -0.5 - 1e-4) & (where <= extent - 0.5 + 1e-4)).nonzero().flatten()
    return inside, where[inside].clamp(0, extent - 1)


def _along(x: Tensor, axis: int, where: Tensor) -> Tensor:
    """Interpolate `x` linearly at the coordinates `where` of one axis."""
    lower = where.floor().long().clamp(0, x.shape[axis] - 1)
    upper = (lower + 1).clamp(max=x.shape[axis] - 1)
    share = (where - lower).to(x.dtype)
    if not share.any():
        return x.index_select(axis, lower)
    share = share.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return torch.lerp(x.index_select(axis, lower), x.index_select(axis, upper), share)


def _resample_sheared(slabs: Slabs, source: Space, target: Space, matrix: np.ndarray, emit: Emit) -> None:
    extent = torch.tensor(source.shape, dtype=torch.float64)
    m = torch.from_numpy(matrix)
    # the target axis that is nearly parallel to the first source axis
    lead = int(np.abs(matrix[0, :3]).argmax())
    spread = [matrix[0, t] * (target.shape[t] - 1) for t in range(3) if t != lead]
    blocks, needed = _blocks(target.shape[lead], falling=matrix[0, lead] < 0), []
    for block in blocks:
        ends = matrix[0, lead] * np.array([block.start, block.stop - 1]) + matrix[0, 3]
        rows = ends.min() + np.minimum(spread, 0).sum(), ends.max() + np.maximum(spread, 0).sum()
        rows = np.clip([np.floor(rows[0]), np.ceil(rows[1])], 0, source.shape[0] - 1)
        needed.append((int(rows[0]), int(rows[1])))
    for block, (base, held) in zip(blocks, _held(slabs, needed)):
        where = [slice(0, n) for n in target.shape]
        where[lead] = block
        axes = [torch.arange(part.start, part.stop) for part in where]
        index = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).double()
        place = index @ m[:3, :3].T + m[:3, 3]  # (d, h, w, 3)
        inside = ((place >= -0.5) & (place <= extent - 0.5)).all(dim=-1)
        place[..., 0] -= base
        size = torch.tensor(held.shape[1:], dtype=torch.float64)
        # grid_sample's coordinates for align_corners=False, last axis first
        scaled = (2 * place + 1) / size - 1
        piece = F.grid_sample(held[None], scaled.flip(-1)[None].float(), padding_mode="border", align_corners=False)[0]
        # outside the source: no region, or of the classes the first, background
        piece[:, ~inside] = float("-inf")
        piece[0, ~inside] = 0.0
        emit(tuple(where), piece)
