"""How long a process waits for its batches."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Waiting:
    """Iterates over batches, and measures the time in which the process waits for the next one.

    It does not wait for the device. On CUDA the host runs ahead of the device, so a part of the wait may be hidden
    behind its work: the share is an upper bound of what faster loading can gain.
    """

    def __init__(self, batches: Iterable[T]):
        self.batches, self.waited, self.began = batches, 0.0, time.monotonic()

    def __iter__(self) -> Iterator[T]:
        stream = iter(self.batches)
        while True:
            asked = time.monotonic()
            try:
                batch = next(stream)
            except StopIteration:
                return
            finally:
                self.waited += time.monotonic() - asked
            yield batch

    def speed(self, volumes: int) -> dict[str, float]:
        """Return what is logged when `volumes` were trained on: `volumes_per_second` over all processes, and
        `data_wait`, the share of the time since the start in which this process waited.

        {} without volumes: an epoch that was stopped after its last update has none left when it is resumed.
        """
        if not volumes:
            return {}
        seconds = max(time.monotonic() - self.began, 1e-9)
        return {"volumes_per_second": round(volumes / seconds, 3), "data_wait": round(self.waited / seconds, 4)}
