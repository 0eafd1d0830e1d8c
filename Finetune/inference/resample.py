"""Logits from the preprocessed grid onto a file's own grid, a few rows at a time.

The two grids are related by their affines: index on the file's grid -> mm -> index on the preprocessed grid.
Orienting, resampling and cropping only permute, flip, scale and shift axes, so this map takes each axis to one axis,
and trilinear interpolation is three interpolations along one axis each. A file with a slight shear
(common.data.geometry allows it) is not of that kind: it is sampled in space, from the rows that a few of its rows cut
through.
"""

from collections.abc import Callable, Iterator, Sequence
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


def resample_logits(
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
        _regrid_sheared(slabs, source, target, matrix, emit)
        return
    # order[a]: the target axis that runs along the source axis a
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
    """Up to `ROWS` target rows each, in the order in which the source, whose rows rise, brings what they need."""
    blocks = [slice(first, min(first + ROWS, length)) for first in range(0, length, ROWS)]
    return blocks[::-1] if falling else blocks


def _held(slabs: Iterator[tuple[int, Tensor]], needed: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
    """For each (first, last) source row of `needed`, which rise: (base, logits (K, rows, H, W) from row `base` <= first
    to at least `last`). Rows that nothing needs any more are let go."""
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


def _regrid_sheared(
    slabs: Iterator[tuple[int, Tensor]],
    source: Grid,
    target: Grid,
    matrix: np.ndarray,
    emit: Callable[[tuple[slice, slice, slice], Tensor], None],
) -> None:
    extent = torch.tensor(source.shape, dtype=torch.float64)
    m = torch.from_numpy(matrix)
    lead = int(np.abs(matrix[0, :3]).argmax())  # the target axis that runs along the source's rows, roughly
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
        place = index @ m[:3, :3].T + m[:3, 3]  # (d, h, w, 3) source indices
        inside = ((place >= -0.5) & (place <= extent - 0.5)).all(dim=-1)
        place[..., 0] -= base
        size = torch.tensor(held.shape[1:], dtype=torch.float64)
        scaled = (2 * place + 1) / size - 1  # grid_sample's, align_corners False; it wants the last axis first
        piece = F.grid_sample(held[None], scaled.flip(-1)[None].float(), padding_mode="border", align_corners=False)[0]
        piece[:, ~inside] = float("-inf")  # outside the source no region, and of the classes the first, background
        piece[0, ~inside] = 0.0
        emit(tuple(where), piece)
