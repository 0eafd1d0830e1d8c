"""Logits from the preprocessed grid onto a file's own grid, a few rows at a time.

The two grids are related by their affines: index on the file's grid -> mm -> index on the preprocessed grid.
Orienting, resampling and cropping only permute, flip, scale and shift axes, so this map takes each axis to one axis,
and trilinear interpolation is three interpolations along one axis each. A sheared file (gantry tilt) is not of that
kind: for it the logits of the whole volume are held and sampled in space.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 8


@dataclass(frozen=True)
class Grid:
    """Voxels and where they lie: shape (D, H, W) and the affine (4, 4) from index to mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm per voxel along each axis."""
        return tuple(float(x) for x in np.linalg.norm(self.affine[:3, :3], axis=0))


def regrid(
    slabs: Iterator[tuple[int, Tensor]],
    source: Grid,
    target: Grid,
    emit: Callable[[tuple[slice, slice, slice], Tensor], None],
) -> None:
    """Hand logits on the target grid to `emit(where, logits)`, piece by piece.

    Args:
        slabs: (first row, logits (K, rows, H, W)) of the source grid, in order, as `sliding.slabs` yields them.
        emit: called with slices of the target array and logits (K, d, h, w) for them. What lies more than half a voxel
            outside the source is not emitted (or as background); within that margin the nearest voxel counts.
    """
    matrix = np.linalg.inv(source.affine) @ target.affine  # target index -> source index
    axes = one_to_one(matrix[:3, :3])
    if axes is None:
        _regrid_oblique(slabs, source, target, matrix, emit)
        return
    # order[a]: the target axis that runs along the source axis a
    order = [axes.index(axis) for axis in range(3)]
    coordinates = [_coordinates(matrix, a, order[a], target.shape[order[a]], source.shape[a]) for a in range(3)]
    if any(len(inside) == 0 for inside, _ in coordinates):
        return
    held: Tensor | None = None  # rows of the source that are still needed, the first of them is `base`
    base = 0
    rows, wanted = coordinates[0]
    pending = torch.arange(len(rows))  # in the order in which the source brings them
    if matrix[0, order[0]] < 0:
        pending = pending.flip(0)
    done = 0
    for first, logits in slabs:
        held = logits if held is None else torch.cat([held, logits], dim=1)
        last = first + logits.shape[1] - 1
        while done < len(pending):
            stop = min(done + ROWS, len(pending))
            part = pending[done:stop]
            if wanted[part[-1]].ceil() > last:
                part = part[wanted[part].ceil() <= last]
                if len(part) == 0:
                    break
            part = part.sort().values  # contiguous in the target
            piece = _along(held, 1, wanted[part] - base)
            piece = _along(_along(piece, 2, coordinates[1][1]), 3, coordinates[2][1])
            where = [slice(0)] * 3
            for a, index in enumerate((rows[part], coordinates[1][0], coordinates[2][0])):
                where[order[a]] = slice(int(index[0]), int(index[-1]) + 1)
            emit(tuple(where), piece.permute(0, *(1 + axes[t] for t in range(3))))
            done += len(part)
        if done < len(pending):
            drop = min(int(wanted[pending[done]].floor()) - base, held.shape[1])
            if drop > 0:
                held, base = held[:, drop:].clone(), base + drop


def one_to_one(matrix: np.ndarray) -> list[int] | None:
    """For each column of a 3x3 matrix the row of its only entry; None when a column has another entry that counts."""
    size = np.abs(matrix)
    axes = size.argmax(axis=0).tolist()
    rest = size.copy()
    rest[axes, range(3)] = 0
    clean = (rest * 1000 <= size.max(axis=0)).all()  # less than a voxel of drift over a thousand
    return axes if clean and sorted(axes) == [0, 1, 2] else None


def _coordinates(matrix: np.ndarray, row: int, column: int, length: int, extent: int) -> tuple[Tensor, Tensor]:
    """Indices of the target axis that fall into the source axis, and where they fall (clamped to its voxel centres)."""
    where = torch.arange(length, dtype=torch.float64) * float(matrix[row, column]) + float(matrix[row, 3])
    inside = ((where >= -0.5 - 1e-4) & (where <= extent - 0.5 + 1e-4)).nonzero().flatten()
    return inside, where[inside].clamp(0, extent - 1)


def _along(x: Tensor, axis: int, where: Tensor) -> Tensor:
    """Linear interpolation of `x` at the coordinates `where` of one axis."""
    lower = where.floor().long().clamp(0, x.shape[axis] - 1)
    upper = (lower + 1).clamp(max=x.shape[axis] - 1)
    share = (where - lower).to(x.dtype)
    if not share.any():
        return x.index_select(axis, lower)
    share = share.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return torch.lerp(x.index_select(axis, lower), x.index_select(axis, upper), share)


def _regrid_oblique(
    slabs: Iterator[tuple[int, Tensor]],
    source: Grid,
    target: Grid,
    matrix: np.ndarray,
    emit: Callable[[tuple[slice, slice, slice], Tensor], None],
) -> None:
    logits = torch.cat([part for _, part in slabs], dim=1)[None]  # (1, K, D, H, W)
    extent = torch.tensor(source.shape, dtype=torch.float64)
    m = torch.from_numpy(matrix)
    for first in range(0, target.shape[0], ROWS):
        rows = range(first, min(first + ROWS, target.shape[0]))
        axes = [torch.tensor(rows), torch.arange(target.shape[1]), torch.arange(target.shape[2])]
        index = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).double()
        where = index @ m[:3, :3].T + m[:3, 3]  # (rows, H, W, 3) source indices
        inside = ((where >= -0.5) & (where <= extent - 0.5)).all(dim=-1)
        scaled = (2 * where + 1) / extent - 1  # grid_sample's, align_corners False; it wants the last axis first
        piece = F.grid_sample(logits, scaled.flip(-1)[None].float(), padding_mode="border", align_corners=False)[0]
        piece[:, ~inside] = float("-inf")  # outside the source no region, and of the classes the first, background
        piece[0, ~inside] = 0.0
        emit((slice(rows.start, rows.stop), slice(0, target.shape[1]), slice(0, target.shape[2])), piece)
