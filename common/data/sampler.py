"""The order of samples: one endless stream for any number of processes, divided into updates.

The stream repeats the data set, each time in a new order drawn from the seed. Update `u` with a global batch of G takes
the positions [u*G, (u+1)*G), divided among ranks and micro-batches. The randomness of a sample (crop, flip, mask) is
drawn from (seed, position) alone. So the number of ranks, accumulation, workers and restarts change no sample, and
resuming needs no saved state.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
from torch.utils.data import Sampler

_MASK64 = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """Return a 63-bit hash of several numbers, so that seeds that differ by one give unrelated random numbers.

    The finaliser of splitmix64, Steele et al. 2014.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def generator(seed: int, position: int) -> torch.Generator:
    """Return the random generator of the sample at `position` of the stream."""
    return torch.Generator().manual_seed(mix(seed, position))


@lru_cache(maxsize=4)
def _order(seed: int, num_samples: int, repeat: int) -> tuple[int, ...]:
    shuffled = torch.randperm(num_samples, generator=torch.Generator().manual_seed(mix(seed, num_samples, repeat)))
    return tuple(shuffled.tolist())


def index_at(position: int, num_samples: int, seed: int) -> int:
    """Return the data set index at `position` of the stream."""
    repeat, offset = divmod(position, num_samples)
    return _order(seed, num_samples, repeat)[offset]


class StreamSampler(Sampler[list[tuple[int, int]]]):
    """A batch sampler: yields a list of (position, index) per micro-batch of this rank, for updates [`start`, `stop`).

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


@dataclass(frozen=True)
class StreamSamples(Sampler[tuple[int, int]]):
    """The samples of `batches` one by one."""

    batches: StreamSampler

    def __len__(self) -> int:
        return len(self.batches) * self.batches.micro_batch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return chain.from_iterable(self.batches)
