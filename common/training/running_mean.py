"""Running means of named scalars on the device, which a checkpoint can hold."""

from typing import Any

import torch
from torch import Tensor

from common import distributed


class RunningMean:
    """Means of named scalars over many updates. Only reading them makes the host wait for the device."""

    def __init__(self) -> None:
        # names that are always added together -> their sums and their count, (names + 1,)
        self.sums: dict[tuple[str, ...], Tensor] = {}

    def clear(self) -> None:
        self.sums = {}

    def add(self, values: dict[str, Tensor], weight: Tensor | None = None) -> None:
        """Add one value of each name. Where `weight` is 0 they do not count, and may be NaN."""
        scalars = [value.detach().float() for value in values.values()]
        row = torch.stack([*scalars, torch.ones_like(scalars[0])])
        if weight is not None:
            row = torch.where(weight > 0, row, 0.0)
        names = tuple(values)
        self.sums[names] = self.sums[names] + row if names in self.sums else row

    def read(self) -> dict[str, float]:
        """Return the means over everything added, on all processes; NaN where nothing counted."""
        if not self.sums:
            return {}
        means = torch.cat([row[:-1] / row[-1] for row in self.sums.values()])
        names = [name for group in self.sums for name in group]
        return dict(zip(names, distributed.all_reduce_mean(means).tolist()))

    def state(self) -> dict[str, Any]:
        """Return the names, and the sums and counts of every rank (ranks, rows). All ranks must call it."""
        if not self.sums:
            return {"names": [], "rows": torch.zeros(1, 0)}
        rows = distributed.all_gather(torch.cat(list(self.sums.values())))
        return {"names": [list(names) for names in self.sums], "rows": rows.cpu()}

    @classmethod
    def from_state(cls, state: dict[str, Any], run: distributed.Run) -> "RunningMean":
        """Return the means that `state` holds. On another number of ranks each takes the mean over the former ranks,
        so that reading gives the same."""
        means, rows = cls(), state["rows"]
        own = rows[run.rank] if len(rows) == run.world_size else rows.mean(dim=0)
        # checkpoints from before the rename of gradient norms
        names = [tuple(name.replace("pull/", "grad_norm/") for name in group) for group in state["names"]]
        means.sums = dict(zip(names, own.to(run.device).split([len(group) + 1 for group in names])))
        return means
