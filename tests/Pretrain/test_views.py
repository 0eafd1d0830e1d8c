"""Views: where boxes fall, and what is cut."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from common.cache.storage import trilinear
from common.data.sampler import generator
from Pretrain.data import ViewDataset
from Pretrain.views import Box, ViewSpec, content_box, crop, draw_box


class Ramp:
    """A volume whose value tells its place: 0..1 along `axis`; with anti-aliased half and quarter levels, as the cache
    keeps them."""

    def __init__(self, shape=(64, 48, 80), axis=0):
        line = (torch.arange(shape[axis]) + 0.5) / shape[axis]
        full = line.reshape([-1 if a == axis else 1 for a in range(3)]).expand(shape).clone().unsqueeze(0)
        self.arrays = [full, F.avg_pool3d(full, 2), F.avg_pool3d(full, 4)]
        self.levels = [tuple(a.shape[1:]) for a in self.arrays]
        self.reads = []

    def read(self, start, size, level=0, out_size=None):
        self.reads.append((level, tuple(start), tuple(size)))
        out = torch.zeros(1, *size)
        array = self.arrays[level]
        low = [max(0, s) for s in start]
        high = [min(s + e, n) for s, e, n in zip(start, size, array.shape[1:])]
        source = array[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        to = [slice(a - s, b - s) for a, b, s in zip(low, high, start)]
        out[:, to[0], to[1], to[2]] = source
        return out if out_size is None else trilinear(out, out_size)


def boxes(spec, shape, count=400):
    return [draw_box(shape, spec, generator(0, i)) for i in range(count)]


def test_resized_boxes_cover_their_share_and_stay_inside():
    shape, spec = (100, 200, 300), ViewSpec(1, (32, 32, 32), (0.5, 1.0))
    drawn = boxes(spec, shape)
    for box in drawn:
        shares = [e / n for e, n in zip(box.size, shape)]
        assert all(0.45 - 0.01 <= s <= 1.0 for s in shares)
        assert max(shares) / min(shares) < 1.1 / 0.9 + 0.03
        assert all(s >= 0 and s + e <= n for s, e, n in zip(box.start, box.size, shape))
    mean = sum(b.size[2] for b in drawn) / len(drawn) / 300
    assert abs(mean - 0.75) < 0.03
    starts = torch.tensor([b.start[0] / (100 - b.size[0]) for b in drawn if b.size[0] < 100])
    assert abs(starts.mean() - 0.5) < 0.06 and starts.min() < 0.05 and starts.max() > 0.95


def test_flips_have_their_probability():
    drawn = boxes(ViewSpec(1, (8, 8, 8), flip_prob=0.2), (30, 30, 30), 1500)
    for axis in range(3):
        assert abs(sum(b.flips[axis] for b in drawn) / 1500 - 0.2) < 0.05


def test_fixed_boxes_pad_a_short_axis_on_both_sides():
    spec = ViewSpec(1, (32, 32, 32), crop_mode="fixed", flip_prob=0.0)
    for box in boxes(spec, (20, 100, 32), 50):
        assert box.size == (32, 32, 32) and box.start[0] == -6 and 0 <= box.start[1] <= 68 and box.start[2] == 0
    volume = Ramp((20, 100, 32))
    view = crop(volume, draw_box((20, 100, 32), spec, generator(0, 0)), (32, 32, 32))
    assert view[:, :6].abs().max() == 0 and view[:, 26:].abs().max() == 0 and view[:, 6:26].min() > 0


def test_random_placement_is_uniform_over_all_starts():
    spec = ViewSpec(1, (32, 32, 32), crop_mode="fixed", placement="random")
    drawn = boxes(spec, (28, 31, 20), 2600)
    for axis, starts in enumerate((5, 2, 13)):
        counts = torch.tensor([-box.start[axis] for box in drawn]).bincount(minlength=starts)
        assert len(counts) == starts
        # five standard deviations of a binomial count
        assert (counts - 2600 / starts).abs().max() < 5 * (2600 / starts) ** 0.5


def test_placement_changes_no_view_without_padding():
    for spec, shape in (
        (ViewSpec(1, (16, 24, 32), crop_mode="fixed"), (16, 40, 33)),
        (ViewSpec(1, (32, 32, 32), (0.5, 1.0)), (20, 100, 30)),
    ):
        assert boxes(spec, shape) == boxes(dataclasses.replace(spec, placement="random"), shape)
    # along a long axis of a volume that is padded along another one, neither
    spec, shape = ViewSpec(1, (32, 32, 32), crop_mode="fixed"), (20, 100, 32)
    for a, b in zip(boxes(spec, shape), boxes(dataclasses.replace(spec, placement="random"), shape)):
        assert a.start[1:] == b.start[1:] and a.flips == b.flips


@pytest.mark.parametrize("placement", ["center", "random"])
def test_the_content_box_is_where_a_view_is_not_zero(placement):
    spec = ViewSpec(1, (32, 24, 16), crop_mode="fixed", flip_prob=0.5, placement=placement)
    shape = (19, 24, 40)
    volume = Ramp(shape)
    flipped = set()
    for box in boxes(spec, shape, 40):
        found = crop(volume, box, spec.size)[0].nonzero()
        expected = torch.stack([found.amin(dim=0), found.amax(dim=0) + 1], dim=1)
        assert content_box(shape, box, spec.size) == expected.tolist()
        flipped.add(box.flips)
    assert len(flipped) == 8


def test_the_content_box_of_a_resized_view_is_rounded_outwards():
    box = Box((-3, 0, 4), (10, 20, 6), (False, False, True))
    assert content_box((20, 20, 8), box, (8, 32, 8)) == [[2, 8], [0, 32], [2, 8]]


def test_a_view_shows_its_box_along_every_axis():
    for axis in range(3):
        volume = Ramp(axis=axis)
        shape = volume.levels[0]
        box = Box((8, 4, 12), (48, 32, 40), (False, False, False))
        view = crop(volume, box, (24, 24, 24))
        assert view.shape == (1, 24, 24, 24)
        profile = view[0].movedim(axis, 0).reshape(24, -1)
        places = (box.start[axis] + (torch.arange(24) + 0.5) * box.size[axis] / 24) / shape[axis]
        assert (profile[1:-1] - places[1:-1, None]).abs().max() < 1.0 / shape[axis]
        mirrored = crop(volume, Box(box.start, box.size, tuple(a == axis for a in range(3))), (24, 24, 24))
        assert torch.equal(mirrored, view.flip(axis + 1))


def test_the_coarsest_level_that_is_fine_enough_is_read():
    volume = Ramp((128, 128, 128))
    for extent, level in [(128, 2), (127, 1), (64, 1), (63, 0), (32, 0), (16, 0)]:
        volume.reads.clear()
        crop(volume, Box((0, 0, 0), (extent,) * 3, (False,) * 3), (32, 32, 32))
        assert volume.reads[0][0] == level, extent


def test_a_sample_is_a_function_of_seed_and_position_alone():
    specs = {
        "global": ViewSpec(2, (32, 32, 32), (0.5, 1)),
        "local": ViewSpec(3, (16, 16, 16), (0.2, 0.5)),
        "none": ViewSpec(0, (1, 1, 1)),
    }
    volumes = [Ramp(axis=0), Ramp(axis=1)]
    a, b = ViewDataset(volumes, specs, 3), ViewDataset(volumes, specs, 3)
    b[(7, 1)], torch.rand(5)
    one, two = a[(4, 1)], b[(4, 1)]
    assert set(one) == {"global", "local", "key"} and one["global"].shape == (2, 1, 32, 32, 32)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert one["key"] != a[(5, 1)]["key"] and not torch.equal(one["local"], a[(5, 1)]["local"])
    assert not torch.equal(one["local"][0], one["local"][1])
    assert one["key"] != ViewDataset(volumes, specs, 4)[(4, 1)]["key"]
