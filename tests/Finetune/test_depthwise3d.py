"""The depthwise convolution of visible voxels against `F.conv3d` on a map in which the others are 0."""

import math

import pytest
import torch
import torch.nn.functional as F

from Finetune import depthwise3d
from Finetune.depthwise3d import depthwise_conv3d, margin_rows, neighbour_cubes

GRID = (2, 3, 2)


def parameters(chans, side=5, **kwargs):
    weight, bias = torch.randn(chans, 1, side, side, side, **kwargs), torch.randn(chans, **kwargs)
    return weight.requires_grad_(), bias.requires_grad_()


def on_the_map(cubes, ids_keep, weight, bias):
    """The same with all voxels of the map."""
    (batch, kept), (size, chans) = ids_keep.shape, (cubes.shape[1], cubes.shape[-1])
    places = ids_keep.view(batch, kept, 1, 1, 1, 1).expand(-1, -1, size, size, size, chans)
    full = torch.zeros(batch, math.prod(GRID), size, size, size, chans, dtype=cubes.dtype)
    full = full.scatter(1, places, cubes.view(batch, kept, size, size, size, chans)).unflatten(1, GRID)
    voxels = full.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, chans, *(n * size for n in GRID))
    y = F.conv3d(voxels, weight, bias, padding=weight.shape[-1] // 2, groups=chans)
    y = y.view(batch, chans, GRID[0], size, GRID[1], size, GRID[2], size).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return y.reshape(full.flatten(1, 3).shape).gather(1, places).flatten(0, 1)


def assert_same(ours, theirs, inputs, **tolerance):
    torch.testing.assert_close(ours, theirs, **tolerance)
    grad = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad)):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("product", [True, False])
@pytest.mark.parametrize("size, kept", [(2, 7), (4, 5), (8, 12)])
def test_visible_voxels_are_those_of_a_map_with_zeros(monkeypatch, product, size, kept):
    monkeypatch.setattr(depthwise3d, "MATRIX_PRODUCT_ON", {"cpu"} if product else set())
    # a cube with its margin at a time
    monkeypatch.setattr(depthwise3d, "CPU_BLOCK_BYTES", 1)
    ids_keep = torch.stack([torch.randperm(12)[:kept] for _ in range(2)])
    x = torch.randn(2 * kept, size, size, size, 3, dtype=torch.double, requires_grad=True)
    weight, bias = parameters(3, dtype=torch.double)
    ours = depthwise_conv3d(x, weight, bias, margin_rows(neighbour_cubes(ids_keep, GRID), size, 2))
    assert_same(ours, on_the_map(x, ids_keep, weight, bias), (x, weight, bias))


@pytest.mark.parametrize("shape", [(6, 4, 22), (1, 16, 7), (11, 1, 3)])
@pytest.mark.parametrize("side", [3, 5])
def test_maps_of_any_size(shape, side):
    x = torch.randn(2, *shape, 3, dtype=torch.double, requires_grad=True)
    weight, bias = parameters(3, side, dtype=torch.double)
    theirs = F.conv3d(x.movedim(-1, 1), weight, bias, padding=side // 2, groups=3).movedim(1, -1)
    assert_same(depthwise_conv3d(x, weight, bias), theirs, (x, weight, bias))


@pytest.mark.parametrize("masked", [False, True])
def test_in_bfloat16_under_autocast(masked):
    x = torch.randn(3, 4, 4, 4, 8, requires_grad=True)
    weight, bias = parameters(8)
    rows = margin_rows(neighbour_cubes(torch.tensor([[0, 5, 2]]), GRID), 4, 2) if masked else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = depthwise_conv3d(x, weight, bias, rows)
    assert ours.dtype == torch.bfloat16
    grads = torch.autograd.grad(ours.float().square().mean(), (x, weight, bias))
    expected = torch.autograd.grad(depthwise_conv3d(x, weight, bias, rows).square().mean(), (x, weight, bias))
    for a, b in zip(grads, expected):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


def test_gradients_that_nobody_needs_are_not_computed():
    x = torch.randn(1, 4, 4, 4, 2)
    weight, bias = parameters(2)
    depthwise_conv3d(x, weight, bias.detach()).sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None


def test_a_margin_wider_than_a_cube_is_refused():
    with pytest.raises(ValueError, match="margin 2.*at most 1"):
        margin_rows(neighbour_cubes(torch.tensor([[0]]), GRID), 1, 2)
