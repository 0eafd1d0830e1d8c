"""Resampling to the space of a file: against MONAI's SpatialResample, and against coordinates in closed form."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing, SpatialResample

from Finetune.inference.resample import Space, _held, one_to_one, resample_logits
from tests.Finetune.predicting import ROTATION

FILES = {
    "plain": np.diag([1.0, 1.5, 2.0, 1.0]),
    "flipped": np.diag([-0.9, -1.1, 2.5, 1.0]),
    "permuted": np.array([[0, 0, 2.0, 5], [-1.2, 0, 0, -9], [0, 0.8, 0, 40], [0, 0, 0, 1]]),
    "oblique": np.block(
        [[ROTATION * [0.8, -1.1, 3.0], np.array([[7], [8], [-9]])], [np.zeros((1, 3)), np.ones((1, 1))]]
    ),
    "sheared": np.array([[1.0, 0, 0, 0], [0, 1.2, 0.3, 0], [0, 0, 2.0, 0], [0, 0, 0, 1]]),
    "sheared rows": np.array([[-1.0, 0.2, 0.1, 0], [0, 1.2, 0.1, 0], [0, 0, 2.0, 0], [0, 0, 0, 1]]),
    "sheared and permuted": np.array([[0, 0.1, 2.0, 5], [-1.2, 0, 0.1, -9], [0.1, 0.8, 0, 40], [0, 0, 0, 1]]),
}


def pieces(logits, sizes=(5, 3)):
    """Yield the volume as slabs of changing thickness."""
    first = 0
    while first < logits.shape[1]:
        rows = sizes[first % len(sizes)]
        yield first, logits[:, first : first + rows]
        first += rows


def collect(logits, source, target):
    found = torch.full((logits.shape[0], *target.shape), float("nan"))

    def emit(where, values):
        # no voxel is emitted twice
        assert torch.isnan(found[(slice(None), *where)]).all()
        found[(slice(None), *where)] = values

    resample_logits(pieces(logits), source, target, emit)
    return found


@pytest.mark.parametrize("kind", FILES)
def test_equals_spatial_resample(kind):
    torch.manual_seed(0)
    shape = (20, 17, 13)
    image = MetaTensor(torch.randn(1, *shape), affine=torch.from_numpy(FILES[kind]))
    resampled = Spacing((1.7, 1.3, 1.9))(Orientation("RAS", labels=None)(image))
    crop = resampled[:, 1:, 2:-1, 1:-2]
    affine = resampled.affine.numpy().copy()
    affine[:3, 3] += affine[:3, :3] @ [1, 2, 1]
    source, target = Space(tuple(crop.shape[1:]), affine), Space(shape, FILES[kind])
    logits = torch.randn(3, *source.shape)
    found = collect(logits, source, target)
    reference = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False)(
        MetaTensor(logits, affine=torch.from_numpy(affine)),
        dst_affine=torch.from_numpy(FILES[kind]),
        spatial_size=shape,
    )
    emitted = torch.isfinite(found).all(dim=0)
    assert 0.4 < emitted.float().mean() < 1
    torch.testing.assert_close(found[:, emitted], reference.as_tensor()[:, emitted].float(), atol=2e-4, rtol=0)
    assert (one_to_one((np.linalg.inv(affine) @ FILES[kind])[:3, :3]) is None) == ("sheared" in kind)


@pytest.mark.parametrize("kind", [k for k in FILES if "sheared" not in k])
def test_voxels_keep_their_coordinates_in_mm(kind):
    """Logits that are mm coordinates become the mm coordinates of the file's voxels; nothing is emitted outside."""
    image = MetaTensor(torch.zeros(1, 24, 20, 18), affine=torch.from_numpy(FILES[kind]))
    small = Spacing((1.0, 1.0, 1.5))(Orientation("RAS", labels=None)(image))
    source, target = Space(tuple(small.shape[1:]), small.affine.numpy()), Space((24, 20, 18), FILES[kind])
    index = np.stack(np.meshgrid(*map(np.arange, source.shape), indexing="ij"), axis=-1)
    logits = torch.from_numpy((index @ source.affine[:3, :3].T + source.affine[:3, 3]).transpose(3, 0, 1, 2)).float()
    found = collect(logits, source, target).numpy()
    index = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"), axis=-1)
    expected = (index @ target.affine[:3, :3].T + target.affine[:3, 3]).transpose(3, 0, 1, 2)
    inner = (slice(None), *(slice(2, -2),) * 3)
    np.testing.assert_allclose(found[inner], expected[inner], atol=1e-3)

    far = Space(target.shape, target.affine + np.array([[0, 0, 0, 1e4], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert np.isnan(collect(logits, source, far).numpy()).all()


@pytest.mark.parametrize("kind", FILES)
def test_few_rows_are_held_for_any_length(kind):
    image = MetaTensor(torch.zeros(1, 64, 9, 8), affine=torch.from_numpy(FILES[kind]))
    if "permuted" in kind:
        image = MetaTensor(torch.zeros(1, 9, 8, 64), affine=torch.from_numpy(FILES[kind]))
    small = Spacing((1.0, 1.0, 1.0))(Orientation("RAS", labels=None)(image))
    source = Space(tuple(small.shape[1:]), small.affine.numpy())
    read = [0]

    def rows():
        for first, logits in pieces(torch.zeros(1, *source.shape)):
            read[0] = first + logits.shape[1]
            yield first, logits

    # rows read when a piece was emitted, and the last one that it needed
    seen = []
    matrix = np.linalg.inv(source.affine) @ FILES[kind]

    def emit(where, values):
        corners = np.array([[a, b, c, 1] for a, b, c in np.ndindex(2, 2, 2)])
        for t, part in enumerate(where):
            corners[:, t] = np.where(corners[:, t], part.stop - 1, part.start)
        seen.append((read[0], np.ceil((corners @ matrix.T)[:, 0].max())))

    resample_logits(rows(), source, Space(tuple(image.shape[1:]), FILES[kind]), emit)
    assert len(seen) > 4
    # at most one slab ahead
    assert all(have <= max(needed, 0) + 6 for have, needed in seen)


def test_rows_that_are_not_needed_are_dropped():
    needed = [(first, first + 3) for first in range(0, 60, 6)]
    source = torch.arange(64.0).reshape(1, 64, 1, 1)
    for (first, last), (base, held) in zip(needed, _held(pieces(source), needed), strict=True):
        rows = held.flatten().tolist()
        # four rows and a slab
        assert rows[0] == base == first and last in rows and len(rows) <= 4 + 5
