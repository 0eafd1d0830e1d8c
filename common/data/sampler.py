"""Which sample comes when, for any number of processes: one endless stream of samples, cut into updates.

The stream runs through the data set again and again, each time in a new order drawn from the seed. Update `u` with a
global batch of G takes the positions [u*G, (u+1)*G); a rank and a micro-batch take their share of these. A sample's
randomness (crop, flip, mask) is drawn from (seed, position) alone. So ranks, accumulation, workers and restarts change
nothing, and nothing has to be saved to resume.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.utils.data import Sampler

_MASK64 = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A well-mixed 63-bit number from several (the finaliser of splitmix64, Steele et al. 2014), so that seeds that
    differ by one share nothing."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def generator(seed: int, position: int) -> torch.Generator:
    """All the randomness that the sample at `position` of the stream may use."""
    return torch.Generator().manual_seed(mix(seed, position))


@lru_cache(maxsize=4)
def _order(seed: int, num_samples: int, round_: int) -> tuple[int, ...]:
    shuffled = torch.randperm(num_samples, generator=torch.Generator().manual_seed(mix(seed, num_samples, round_)))
    return tuple(shuffled.tolist())


def index_at(position: int, num_samples: int, seed: int) -> int:
    """The data set index at `position` of the stream."""
    round_, offset = divmod(position, num_samples)
    return _order(seed, num_samples, round_)[offset]


class StreamSampler(Sampler[list[tuple[int, int]]]):
    """A batch sampler: one list of (position, index) per micro-batch of this rank, for the updates [`start`, `stop`).

    Set `start` and `stop` before iterating; `len` is the number of micro-batches between them.
    """

    def __init__(
        self, num_samples: int, micro_batch: int, accum: int, rank: int = 0, world_size: int = 1, seed: int = 0
    ):
        self.num_samples, self.micro_batch, self.accum = num_samples, micro_batch, accum
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.start, self.stop = 0, 0

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accum * self.world_size

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accum

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for update in range(self.start, self.stop):
            for micro in range(self.accum):
                first = update * self.global_batch + (micro * self.world_size + self.rank) * self.micro_batch
                positions = range(first, first + self.micro_batch)
                yield [(p, index_at(p, self.num_samples, self.seed)) for p in positions]
