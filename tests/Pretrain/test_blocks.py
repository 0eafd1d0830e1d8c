"""Views made of blocks equal those that are cropped one by one, wherever they are made."""

import itertools
import math

import pytest
import torch
from torch.utils.data import default_collate

from common.cache.build import build_cache
from common.data.datalist import Case
from common.data.loader import Loading, build_loader, micro_batches
from common.data.preprocessing import Preprocessing
from common.data.sampler import StreamSampler, generator
from common.errors import InputError
from Pretrain import loading
from Pretrain.blocks import Block, ViewMaker, collate_blocks, inside, make_views, merge, plan_blocks
from Pretrain.data import BlockDataset, ViewDataset
from Pretrain.views import Box, ViewSettings, ViewSpec, crop, level_box
from tests.helpers import ct, write_nifti

CPU = torch.device("cpu")
# shapes with three resolution levels, and spacings of which the second has thick slices
SCANS = {"a": ((100, 88, 72), (2.0, 2.0, 2.0)), "b": ((96, 80, 24), (1.0, 1.0, 4.0))}
INTENSITIES = {
    "int16": {},
    "uint8": {"dtype": "uint8"},
    "zscore": {"intensity": "zscore", "dtype": "uint8"},
}
SPECS = {
    "resize": {
        "global": ViewSpec(2, (24, 32, 16), (0.5, 1.0), flip_prob=0.5),
        "local": ViewSpec(5, (10, 8, 8), (0.2, 0.5), flip_prob=0.5),
    },
    "fixed": {
        "global": ViewSpec(2, (64, 72, 80), crop_mode="fixed", flip_prob=0.5, placement="random", ignore_padding=True),
        "local": ViewSpec(3, (24, 16, 32), crop_mode="fixed", flip_prob=0.5, ignore_padding=True),
    },
}


def make_volumes(folder):
    """Return the cached volumes of both scans for each of the ways to store intensities."""
    cases = [
        Case(name, write_nifti(folder / f"{name}.nii.gz", ct(shape, seed), spacing))
        for seed, (name, (shape, spacing)) in enumerate(SCANS.items())
    ]
    return {name: build_cache(cases, Preprocessing(**how), folder / "cache") for name, how in INTENSITIES.items()}


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return make_volumes(tmp_path_factory.mktemp("blocks"))


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        # as a share of the window; content boxes and keys must be equal
        limit = 1e-3 if value.is_floating_point() else 0
        assert (found[name] - value).abs().max() <= limit, name


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("intensity", INTENSITIES)
@pytest.mark.parametrize("mode", SPECS)
def test_a_batch_equals_the_views_of_the_loader(cached, mode, intensity, resident):
    samples = ViewDataset(cached[intensity], SPECS[mode], seed=5)
    items, levels = [(position, position % 2) for position in range(8)], set()
    for item in items:
        for kind, boxes in samples.boxes(item).items():
            size = SPECS[mode][kind].size
            levels |= {level_box(samples.volumes[item[1]].levels, box, size)[0] for box in boxes}
    assert levels == ({0} if mode == "fixed" else {0, 1, 2})
    wanted = default_collate([samples[item] for item in items])
    blocks = BlockDataset(samples, resident)
    maker = ViewMaker(samples.specs, loading.load_resident(samples.volumes, CPU) if resident else None)
    batch = collate_blocks([blocks[item] for item in items])
    assert ("numbers" in batch) != resident
    assert_close(maker(batch, CPU), wanted)


def test_a_box_that_is_resized_together_with_padding(cached):
    volume = cached["int16"][0]
    for start, size in [((-3, 0, 4), (40, 90, 60)), ((60, -9, 40), (70, 20, 50)), ((-4, -6, -8), (110, 100, 90))]:
        box = Box(start, size, (False, True, True))
        region = level_box(volume.levels, box, (24, 16, 32))
        planned, views = plan_blocks(volume, [region], 0)
        read = {key: volume.read_numbers(b.start, b.size, b.level) for key, b in planned.items()}
        (made,) = make_views(read, views, (24, 16, 32))
        assert (made - crop(volume, box, (24, 16, 32))).abs().max() <= 1e-3


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_hands_over_stored_numbers_in_order(cached, workers):
    samples = ViewDataset(cached["int16"], SPECS["resize"], seed=5)
    sampler = StreamSampler(2, 2, 1)
    sampler.stop = 3
    how = Loading(BlockDataset(samples), collate_blocks, ViewMaker(samples.specs), by_sample=True)
    for batch, items in zip(micro_batches(build_loader(how, sampler, workers, CPU), how, 2), sampler, strict=True):
        for numbers in batch["numbers"]:
            assert numbers.dtype == torch.int16 and numbers.is_shared() == (workers > 0)
        assert_close(how.prepare(batch, CPU), default_collate([samples[item] for item in items]))


def test_merged_blocks_contain_all_blocks_and_never_more_voxels():
    for seed in range(40):
        rng = generator(1, seed)
        low = torch.randint(0, 40, (9, 3), generator=rng)
        high = low + torch.randint(1, 40, (9, 3), generator=rng)
        blocks = [Block(i % 2, tuple(a), tuple(b)) for i, (a, b) in enumerate(zip(low.tolist(), high.tolist()))]
        merged = merge(blocks)
        assert all(any(b.level == m.level and m.union(b) == m for m in merged) for b in blocks)
        assert sum(m.voxels for m in merged) <= sum(b.voxels for b in blocks)
        for a, b in itertools.combinations(merged, 2):
            assert a.level != b.level or a.union(b).voxels >= a.voxels + b.voxels


def test_overlapping_boxes_are_read_once(cached):
    volume = cached["int16"][0]
    near = [Box((i, 0, 0), (40, 40, 40), (False,) * 3) for i in range(8)]
    blocks, views = plan_blocks(volume, [(0, box) for box in near], 7)
    assert [(key, block.size) for key, block in blocks.items()] == [((7, 0), (47, 40, 40))]
    assert [view.box.start[0] for view in views] == list(range(8))
    apart = [Box((0, 0, 0), (8, 8, 8), (False,) * 3), Box((80, 70, 60), (8, 8, 8), (False,) * 3)]
    assert len(plan_blocks(volume, [(0, box) for box in apart], 7)[0]) == 2
    # not of different levels
    assert len(plan_blocks(volume, [(0, near[0]), (1, near[1])], 7)[0]) == 2


def test_a_block_is_the_part_of_a_box_in_the_volume():
    block = inside((20, 30, 40), 1, Box((-5, 3, 30), (32, 8, 20), (False,) * 3))
    assert (block.start, block.stop, block.voxels) == ((0, 3, 30), (20, 11, 40), 20 * 8 * 10)


# ---------------------------------------------------------------- where

CUDA = torch.device("cuda", 0)


def chosen(cached, device=CPU, **settings):
    samples = ViewDataset(cached["int16"], SPECS["resize"])
    how = loading.choose_loading(samples, ViewSettings(**settings), device)
    return "loader" if how.dataset is samples else "resident" if how.dataset.resident else "device"


@pytest.mark.parametrize(
    "settings, on_cpu, on_cuda",
    [
        ({}, "loader", "resident"),
        ({"resident": "off"}, "loader", "device"),
        ({"resident": "on"}, "resident", "resident"),
        ({"views_on": "device"}, "device", "resident"),
        ({"views_on": "device", "resident": "off"}, "device", "device"),
        ({"views_on": "loader"}, "loader", "loader"),
    ],
)
def test_where_views_are_made_and_volumes_are_kept(cached, monkeypatch, settings, on_cpu, on_cuda):
    monkeypatch.setattr(loading, "load_resident", lambda volumes, device: {})
    monkeypatch.setattr(loading, "free_memory", lambda device: 1e12)
    assert chosen(cached, **settings) == on_cpu and chosen(cached, CUDA, **settings) == on_cuda


def test_volumes_that_do_not_fit_stay_on_disk(cached, monkeypatch, capsys):
    volumes = cached["int16"]
    needed = loading.stored_bytes(volumes)
    assert needed == 2 * sum(math.prod(shape) for volume in volumes for shape in volume.levels)
    assert loading.stored_bytes(cached["uint8"]) == needed // 2
    monkeypatch.setattr(loading, "load_resident", lambda volumes, device: {})
    monkeypatch.setattr(loading, "free_memory", lambda device: 2 * needed - 1)
    assert chosen(cached, CUDA) == "device" and "more than 50% of" in capsys.readouterr().out
    monkeypatch.setattr(loading, "free_memory", lambda device: 2 * needed)
    assert chosen(cached, CUDA) == "resident" and "each process has its own copy" in capsys.readouterr().out
    monkeypatch.setattr(loading, "free_memory", lambda device: needed - 1)
    with pytest.raises(InputError, match="--resident on: 2 volumes take .* GB are free on cuda:0"):
        chosen(cached, CUDA, resident="on")


def test_resident_volumes_need_views_on_the_device(cached):
    with pytest.raises(InputError, match="--resident on: needs --views_on device or auto, found loader"):
        chosen(cached, views_on="loader", resident="on")


def test_free_memory_of_this_machine_is_known():
    assert 1e6 < loading.free_memory(CPU) < 1e15
