"""Masks: counts, inverses, uniformity, and independence of who draws them."""

import pytest
import torch
import torch.nn.functional as F

from Pretrain.masking import choose_removed, content_patches, derive, num_keep, random_masking, uniform, unit_masking


def test_counts_of_the_recipes_and_the_float_trap():
    assert num_keep(1000, 0.6) == 400 and num_keep(216, 0.6) == 86 and num_keep(216, 0.5) == 108
    assert num_keep(1000, 0.9) == 100  # int(1000 * (1 - 0.9)) is 99
    for n in (8, 27, 216, 1000):
        for percent in range(0, 100, 5):
            assert num_keep(n, percent / 100) == max(1, n * (100 - percent) // 100)


def test_kept_and_removed_partition_the_patches():
    ids_keep, ids_restore, mask, ids_removed = random_masking(torch.rand(5, 50), 20)
    for b in range(5):
        kept = set(ids_keep[b].tolist())
        assert len(kept) == 20
        assert kept == set((mask[b] == 0).nonzero().flatten().tolist())
        assert sorted(ids_restore[b].tolist()) == list(range(50))
        assert all(ids_restore[b, token] == place for place, token in enumerate(ids_keep[b].tolist()))


def test_a_samples_mask_does_not_depend_on_its_neighbours():
    keys = torch.tensor([5, 9, 2**62, -3])
    together = uniform(keys, 100)
    for i in range(4):
        assert torch.equal(uniform(keys[i : i + 1], 100)[0], together[i])
    assert torch.equal(uniform(keys, 30), together[:, :30])


def test_noise_is_uniform_and_keys_are_unrelated():
    noise = uniform(torch.arange(1000), 1000)
    assert 0 <= noise.min() and noise.max() < 1
    assert abs(noise.mean() - 0.5) < 1e-3 and abs(noise.var() - 1 / 12) < 1e-3
    counts = torch.histc(noise, 20, 0, 1)
    assert (counts - 50_000).abs().max() < 5 * 50_000**0.5
    centred = noise[:200] - 0.5
    correlation = centred @ centred.T / (1000 / 12)
    assert (correlation - torch.eye(200)).abs().fill_diagonal_(0).max() < 0.2  # 6 sigma at 1000 draws


def test_noise_is_pinned():
    """The same on every machine and device: a checkpoint resumed elsewhere sees the same masks. Reference: splitmix64
    in Python."""

    def splitmix64(z):
        m = (1 << 64) - 1
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & m
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & m
        return z ^ (z >> 31)

    for key in (0, 7, -1, 2**63 - 1):
        expected = [splitmix64((key + i * 0x9E3779B97F4A7C15) % (1 << 64)) >> 40 for i in range(1, 9)]
        assert (uniform(torch.tensor([key]), 8)[0] * 2**24).long().tolist() == expected


def test_derived_keys_differ_and_are_unrelated_to_the_noise():
    keys = torch.arange(500)
    derived = torch.stack([derive(keys, s) for s in range(8)])
    assert len(derived.unique()) == 4000
    a, b = uniform(keys, 1).flatten(), uniform(derived[0], 1).flatten()
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.2


def random_boxes(size, count, seed=0):
    """Content boxes (count, 3, 2) that are not empty, in views of `size`."""
    rng = torch.Generator().manual_seed(seed)
    ends = [torch.stack([torch.randperm(n + 1, generator=rng)[:2] for _ in range(count)]) for n in size]
    return torch.stack(ends, dim=1).sort(dim=2).values


def test_patches_with_content_are_those_that_hold_a_voxel():
    size, patch, grid = (16, 12, 24), (4, 3, 8), (4, 4, 3)
    boxes = random_boxes(size, 200)
    expected = torch.zeros(200, *size)
    for row, ((a, b), (c, d), (e, f)) in enumerate(boxes.tolist()):
        expected[row, a:b, c:d, e:f] = 1
    expected = F.max_pool3d(expected.unsqueeze(1), patch).flatten(1) > 0
    assert torch.equal(content_patches(boxes, patch, grid), expected)
    empty = torch.tensor([[[0, 0], [0, 12], [0, 24]], [[0, 16], [12, 12], [0, 24]]])
    assert not content_patches(empty, patch, grid).any()


def test_padding_is_visible_only_for_want_of_content():
    noise, keep = uniform(torch.arange(300), 64), 24
    content = content_patches(random_boxes((32, 32, 32), 300), (8, 8, 8), (4, 4, 4))
    ids_keep, ids_restore, mask, ids_removed = random_masking(noise, keep, content)
    visible = content.gather(1, ids_keep).sum(dim=1)
    assert torch.equal(visible, content.sum(dim=1).clamp(max=keep))
    assert (visible < keep).any() and (visible == keep).any()
    # what is removed and has content is in the mask, nothing else
    kept = torch.zeros_like(content).scatter(1, ids_keep, True)
    assert torch.equal(mask, (content & ~kept).float())
    assert all(sorted(row) == list(range(64)) for row in ids_restore.tolist())


def test_visible_patches_are_uniform_among_those_with_content():
    content = torch.arange(20).expand(20_000, -1) % 2 == 0
    ids_keep = random_masking(uniform(torch.arange(20_000), 20), 4, content).ids_keep
    counts = ids_keep.flatten().bincount(minlength=20) / 8000
    assert (counts[1::2] == 0).all() and (counts[::2] - 1).abs().max() < 0.05


def test_content_everywhere_changes_no_mask():
    noise, units = uniform(torch.arange(6), 216), uniform(torch.arange(6), 8)
    everywhere = torch.ones(6, 216, dtype=torch.bool)
    for a, b in zip(random_masking(noise, 86), random_masking(noise, 86, everywhere)):
        assert torch.equal(a, b)
    (a, unit_a), (b, unit_b) = (
        unit_masking(units, 4, (6, 6, 6), *content) for content in ((), (everywhere[:, :8], everywhere))
    )
    assert torch.equal(unit_a, unit_b) and all(torch.equal(x, y) for x, y in zip(a, b))
    assert torch.equal(choose_removed(units, unit_a, 3), choose_removed(units, unit_a, 3, everywhere[:, :8]))


@pytest.mark.parametrize("group", [2, 3])
def test_units_of_padding_come_last(group):
    side, keep = 6 // group, num_keep(group**3, 0.5)
    boxes = random_boxes((96, 96, 96), 100)
    content = content_patches(boxes, (16, 16, 16), (6, 6, 6))
    units = content_patches(boxes, (16 * side,) * 3, (group,) * 3)
    masking, unit_mask = unit_masking(uniform(torch.arange(100), group**3), keep, (6, 6, 6), units, content)
    kept = torch.zeros_like(content).scatter(1, masking.ids_keep, True)
    cubes = kept.view(100, group, side, group, side, group, side).float().mean(dim=(2, 4, 6)).flatten(1)
    assert set(cubes.unique().tolist()) == {0.0, 1.0} and (cubes.sum(dim=1) == keep).all()
    assert torch.equal((cubes.bool() & units).sum(dim=1), units.sum(dim=1).clamp(max=keep))
    assert torch.equal(unit_mask, (units & ~cubes.bool()).float())
    assert torch.equal(masking.mask, (content & ~kept).float())


def test_removed_places_without_content_are_chosen_last():
    content = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]).bool().expand(100, -1)
    mask = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]).expand(100, -1)
    noise = uniform(torch.arange(100), 8)
    for count, removed, visible in ((1, 1, 0), (2, 2, 0), (3, 2, 1), (4, 2, 2), (6, 2, 2)):
        chosen = choose_removed(noise, mask, count, content)
        assert ((chosen < 2).sum(dim=1) == removed).all()
        assert (((chosen >= 2) & (chosen < 4)).sum(dim=1) == visible).all()


@pytest.mark.parametrize("group", [2, 3, 6])
def test_unit_mask_removes_whole_cubes(group):
    side = 6 // group
    keep = num_keep(group**3, 0.5)
    masking, units = unit_masking(uniform(torch.arange(5), group**3), keep, (6, 6, 6))
    tokens = masking.mask.view(5, group, side, group, side, group, side)
    cubes = tokens.mean(dim=(2, 4, 6)).flatten(1)  # the share of each cube that is removed: all or nothing
    assert torch.equal(cubes, units) and set(cubes.unique().tolist()) == {0.0, 1.0}
    assert (units.sum(1) == group**3 - keep).all()
    assert torch.equal(masking.mask.scatter(1, masking.ids_keep, 7.0) == 7.0, masking.mask == 0)
    assert len({tuple(row) for row in units.tolist()}) > 1


def test_equal_noise_still_removes_whole_cubes():
    masking, units = unit_masking(torch.zeros(1, 8), 4, (6, 6, 6))
    cubes = masking.mask.view(2, 3, 2, 3, 2, 3).mean(dim=(1, 3, 5)).flatten()
    assert torch.equal(cubes, units[0]) and units.sum() == 4


def test_removed_places_are_chosen_first_and_uniformly():
    mask = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 0]).expand(4000, -1)
    chosen = choose_removed(uniform(torch.arange(4000), 8), mask, 2)
    counts = chosen.flatten().bincount(minlength=8) / 8000
    assert (counts[mask[0] == 0] == 0).all() and (counts[mask[0] == 1] - 0.25).abs().max() < 0.02
    assert (chosen[:, 0] != chosen[:, 1]).all()
    more = choose_removed(uniform(torch.arange(50), 8), mask[:50], 6)  # four are removed: two visible ones fill up
    assert (mask[0][more].sum(1) == 4).all()
