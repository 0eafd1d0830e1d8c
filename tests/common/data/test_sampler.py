"""The stream of samples: complete, shuffled, the same for any number of processes and after any restart."""

from common.data.sampler import StreamSampler, generator, index_at, mix


def updates(world_size=1, micro_batch=4, accum=1, start=0, stop=6, num_samples=10, seed=0):
    """The positions of each update, over all ranks and micro-batches, in global order."""
    result = [[] for _ in range(start, stop)]
    per_rank = []
    for rank in range(world_size):
        sampler = StreamSampler(num_samples, micro_batch, accum, rank, world_size, seed)
        sampler.start, sampler.stop = start, stop
        batches = list(sampler)
        assert len(batches) == len(sampler)
        per_rank.append(batches)
    for u in range(stop - start):
        for micro in range(accum):
            for rank in range(world_size):
                result[u] += per_rank[rank][u * accum + micro]
    return result


def test_every_cut_gives_the_same_updates():
    reference = updates()
    assert updates(world_size=2, micro_batch=2) == reference
    assert updates(world_size=1, micro_batch=1, accum=4) == reference
    assert updates(world_size=2, micro_batch=1, accum=2) == reference


def test_a_restart_goes_on_where_it_stopped():
    assert updates(start=3) == updates()[3:]


def test_every_round_visits_every_sample_once_in_a_new_order():
    rounds = [[index_at(r * 10 + i, 10, seed=5) for i in range(10)] for r in range(20)]
    assert all(sorted(r) == list(range(10)) for r in rounds)
    assert len({tuple(r) for r in rounds}) == 20
    assert rounds[0] != [index_at(i, 10, seed=6) for i in range(10)]


def test_no_sample_is_dropped_at_the_end_of_a_round():
    seen = [
        index for update in updates(stop=5, num_samples=10) for _, index in update
    ]  # 20 positions: two rounds of 10
    assert sorted(seen) == sorted(list(range(10)) * 2)


def test_seeds_and_positions_share_no_randomness():
    draws = {tuple(generator(s, p).get_state()[:16].tolist()) for s in range(20) for p in range(20)}
    assert len(draws) == 400
    assert len({mix(a, b) for a in range(100) for b in range(100)}) == 10_000
    assert all(0 <= mix(a) < 2**63 for a in (-1, 0, 2**70))
