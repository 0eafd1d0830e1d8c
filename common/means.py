"""Running means of named scalars on the device, which can be stopped and taken up again."""

from typing import Any

import torch
from torch import Tensor

from common import distributed


class Means:
    """Running means of named scalars, kept on the device: reading them is the only time the host waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def clear(self) -> None:
        self.sums, self.counts = {}, {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Means over what was added and over all processes."""
        if not self.sums:
            return {}
        stacked = torch.stack([self.sums[name] / self.counts[name] for name in self.sums])
        return dict(zip(self.sums, distributed.all_reduce_mean(stacked).tolist()))

    def state(self) -> dict[str, Any]:
        """Names, counts, and the sums of every rank (ranks, names); all ranks must call it."""
        if not self.sums:
            return {"counts": {}, "sums": torch.zeros(1, 0)}
        stacked = torch.stack(list(self.sums.values()))
        return {"counts": dict(self.counts), "sums": distributed.all_gather(stacked).cpu()}

    @classmethod
    def restored(cls, state: dict[str, Any], rank: int, world_size: int, device: torch.device) -> "Means":
        """What `state` kept. With another number of ranks each takes the mean of the sums, so that reading gives the same."""
        means, sums = cls(), state["sums"]
        own = sums[rank] if len(sums) == world_size else sums.mean(dim=0)
        means.counts = dict(state["counts"])
        means.sums = dict(zip(means.counts, own.to(device)))
        return means
