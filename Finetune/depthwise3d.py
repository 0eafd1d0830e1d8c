"""Depthwise 3D convolution of maps, and of those voxels of a map that are visible, with a fast backward pass on a CPU.

    B batch   K kept tokens   n = B*K   s voxels per axis of a token   (D, H, W) voxels   C channels   k kernel size

A map is (B, D, H, W, C). Visible voxels are cubes, one for each kept token: (n, s, s, s, C). Around both the
convolution sees a margin of (k - 1)/2 voxels: zeros around a map; the voxels of visible neighbours, and zeros for
removed ones, around a cube. So the result at visible voxels is that of a map in which all others are 0.

Needs torch, nothing else of this repository.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Where the gradient to the weights is a product of matrices instead of PyTorch's. It was made for CPUs, and has not
# been measured on another device.
MATRIX_PRODUCT_ON = {"cpu"}
# Where maps are convolved as they lie in memory, with the channels last. PyTorch has a depthwise kernel for GPUs that
# takes the channels first; neither layout has been measured on one (python -m benchmarks --only layout).
CHANNELS_LAST_ON = {"cpu"}
# Larger blocks of memory go back to the system and are slow to get again (glibc's largest mmap threshold is 32 MB).
CPU_BLOCK_BYTES = 1 << 24
# elements of a tensor that kernels with 32-bit indices can address
MAX_ELEMENTS = (1 << 31) - 1


def blocks_of(x: Tensor, row_size: int) -> int:
    """Return how many rows of `row_size` elements like those of `x` to compute at once: on a GPU as many as it can."""
    elements = CPU_BLOCK_BYTES // x.element_size() if x.device.type == "cpu" else MAX_ELEMENTS
    return max(1, elements // row_size)


# ---------------------------------------------------------------- margins


def neighbour_cubes(ids_keep: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Return the cubes around every kept token: (n, 3, 3, 3), rows of (n, s, s, s, C), or n where there is none.

    Args:
        ids_keep: (B, K) raster indices of the kept tokens in the grid (d, h, w).
    """
    batch, kept = ids_keep.shape
    _, h, w = grid
    places = torch.stack([ids_keep // (h * w), ids_keep // w % h, ids_keep % w])  # (3, B, K)
    steps = torch.arange(3, device=ids_keep.device)
    # in a grid with one more token at either end
    d_place, h_place, w_place = (place.reshape(-1, 1) + steps for place in places)  # (n, 3) each
    padded = [size + 2 for size in grid]
    cubes = torch.full((batch, math.prod(padded)), batch * kept, device=ids_keep.device)
    own = torch.arange(batch * kept, device=ids_keep.device)
    raster = (d_place[:, :, None, None] * padded[1] + h_place[:, None, :, None]) * padded[2] + w_place[:, None, None, :]
    cubes.scatter_(1, raster[:, 1, 1, 1].view(batch, kept), own.view(batch, kept))
    return cubes.gather(1, raster.view(batch, -1)).view(-1, 3, 3, 3)


def margin_rows(cubes: Tensor, size: int, margin: int) -> Tensor:
    """Return where the voxels of each cube with its margin lie: (n, (s + 2*margin)^3), rows of (n*s^3, C).

    n*s^3, one row more than there are, stands for a voxel of zeros.

    Args:
        cubes: of `neighbour_cubes`.
        size, margin: s, and the voxels on each side of it, at most s.
    """
    if margin > size:
        raise ValueError(f"margin {margin}: must be at most {size}, the voxels of a cube")
    place = torch.arange(-margin, size + margin, device=cubes.device)
    cube, voxel = place // size + 1, place % size
    inside = (voxel[:, None, None] * size + voxel[:, None]) * size + voxel  # (s + 2*margin, ...) three times
    rows = cubes[:, cube[:, None, None], cube[:, None], cube] * size**3 + inside
    return rows.clamp(max=len(cubes) * size**3).flatten(1)


# ---------------------------------------------------------------- convolution


def depthwise_conv3d(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the convolution of every channel with its own kernel, in the shape of x.

    Args:
        x: a map (B, D, H, W, C), or with `rows` the cubes (n, s, s, s, C) of visible voxels.
        weight, bias: (C, 1, k, k, k) with k odd, and (C,), those of an `nn.Conv3d` with C groups.
        rows: of `margin_rows` with a margin of (k - 1)/2. None: x is a map.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return _DepthwiseConv3d.apply(x, weight, bias, rows)


class _DepthwiseConv3d(torch.autograd.Function):
    """The margins are made again in the backward pass, as they are several times as large as the cubes."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, rows)
        return _convolve(x, weight, bias, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        # the gradient to x is the convolution of the gradient with the mirrored kernel
        grad_x = _convolve(grad, weight.flip(2, 3, 4), None, rows) if need_x else None
        grad_weight = _weight_gradient(x, grad, weight, rows) if need_weight else None
        return grad_x, grad_weight, grad.flatten(0, 3).sum(dim=0) if need_bias else None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
    chans, side = len(weight), weight.shape[-1]
    if rows is None:
        return F.conv3d(_channels_second(x), weight, bias, padding=side // 2, groups=chans).movedim(1, -1)
    parts = [F.conv3d(_channels_second(part), weight, bias, groups=chans) for part in _with_margin(x, side, rows)]
    return torch.cat(parts).movedim(1, -1)


def _channels_second(x: Tensor) -> Tensor:
    """Return maps (B, D, H, W, C) as (B, C, D, H, W), in memory as `CHANNELS_LAST_ON` says."""
    x = x.movedim(-1, 1)
    return x if x.device.type in CHANNELS_LAST_ON else x.contiguous()


def _with_margin(x: Tensor, side: int, rows: Tensor | None) -> Iterator[Tensor]:
    """Yield blocks of x with their margins, (m, D+k-1, H+k-1, W+k-1, C)."""
    if rows is None:
        margin = side // 2
        yield F.pad(x, (0, 0) + (margin,) * 6)
        return
    size, chans = x.shape[1] + side - 1, x.shape[-1]
    voxels = F.pad(x.reshape(-1, chans), (0, 0, 0, 1))
    for block in rows.split(blocks_of(x, rows.shape[1] * chans)):
        yield voxels.index_select(0, block.flatten()).view(-1, size, size, size, chans)


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, rows: Tensor | None) -> Tensor:
    chans, side = len(weight), weight.shape[-1]
    total, start = 0, 0
    for part in _with_margin(x, side, rows):
        part_grad = grad[start : start + len(part)]
        start += len(part)
        if x.device.type in MATRIX_PRODUCT_ON:
            total = total + _correlate(part, part_grad, side)
        else:
            part, part_grad = _channels_second(part), _channels_second(part_grad)
            how = [chans], [1] * 3, [0] * 3, [1] * 3, False, [0] * 3, chans, [False, True, False]
            total = total + torch.ops.aten.convolution_backward(part_grad, part, weight, *how)[1]
    return total.to(weight.dtype)


def _correlate(x: Tensor, grad: Tensor, side: int) -> Tensor:
    """Return the sums over all voxels of grad (m, D, H, W, C) times x (m, D+k-1, ...) shifted, (C, 1, k, k, k).

    For each shift along H a product of matrices has the sums over m and H for all pairs of a column (d, w) of a block
    of the gradient with one of x. Those pairs that are apart by the same (d, w) are then added up. That is about six
    times the multiplications of a direct sum, and still faster.
    """
    _, depth, height, width, chans = grad.shape
    deep, wide = _divisor(depth), _divisor(width)
    x, grad = (t.flatten(0, 3).t().contiguous().view(chans, *t.shape[:4]) for t in (x, grad))
    total = 0
    for first in range(0, depth, deep):
        # (C, H+k-1, m*W/wide, columns of x)
        columns = x[:, :, first : first + deep + side - 1].unfold(4, wide + side - 1, wide)
        columns = columns.permute(0, 3, 1, 4, 2, 5).reshape(
            chans, height + side - 1, -1, (deep + side - 1) * (wide + side - 1)
        )
        own = grad[:, :, first : first + deep].unfold(4, wide, wide)
        own = own.permute(0, 3, 1, 4, 2, 5).reshape(chans, -1, deep * wide).mT  # (C, columns of grad, H*m*W/wide)
        products = [own @ columns[:, shift : shift + height].flatten(1, 2) for shift in range(side)]
        products = torch.stack(products, dim=1).view(chans, side, deep, wide, deep + side - 1, wide + side - 1)
        c, h, d, w, d_apart, w_apart = products.stride()
        pairs = products.as_strided(
            (chans, side, side, side, deep, wide), (c, d_apart, h, w_apart, d + d_apart, w + w_apart)
        )
        total = total + pairs.sum(dim=(4, 5), dtype=torch.promote_types(x.dtype, torch.float32))
    return total.unsqueeze(1)


def _divisor(size: int) -> int:
    """Return the largest divisor of `size` up to 8, the side of a block of which the products above are fast."""
    return max(n for n in range(1, 9) if size % n == 0)
