"""Running means of named scalars on the device, which can be stopped and taken up again."""

from typing import Any

import torch
from torch import Tensor

from common import distributed


class RunningMean:
    """Running means of named scalars, kept on the device: reading them is the only time the host waits for it."""

    def __init__(self) -> None:
        self.groups: dict[
            tuple[str, ...], Tensor
        ] = {}  # names that come together -> their sums, and how many: (names + 1,)

    def clear(self) -> None:
        self.groups = {}

    def add(self, values: dict[str, Tensor], made: Tensor | None = None) -> None:
        """`made`: 0 for values that are not to count, as those of an update that was not made; they may be NaN."""
        scalars = [value.detach().float() for value in values.values()]
        row = torch.stack([*scalars, torch.ones_like(scalars[0])])
        if made is not None:
            row = torch.where(made > 0, row, 0.0)
        names = tuple(values)
        self.groups[names] = self.groups[names] + row if names in self.groups else row

    def read(self) -> dict[str, float]:
        """Means over what was added and over all processes; NaN where nothing counted."""
        if not self.groups:
            return {}
        means = torch.cat([row[:-1] / row[-1] for row in self.groups.values()])
        names = [name for group in self.groups for name in group]
        return dict(zip(names, distributed.all_reduce_mean(means).tolist()))

    def state(self) -> dict[str, Any]:
        """Names, and the sums and counts of every rank (ranks, rows); all ranks must call it."""
        if not self.groups:
            return {"names": [], "rows": torch.zeros(1, 0)}
        rows = distributed.all_gather(torch.cat(list(self.groups.values())))
        return {"names": [list(names) for names in self.groups], "rows": rows.cpu()}

    @classmethod
    def from_state(cls, state: dict[str, Any], rank: int, world_size: int, device: torch.device) -> "RunningMean":
        """What `state` kept. With another number of ranks each takes the mean over the old ones: reading gives the
        same."""
        means, rows = cls(), state["rows"]
        own = rows[rank] if len(rows) == world_size else rows.mean(dim=0)
        split = own.to(device).split([len(names) + 1 for names in state["names"]])
        means.groups = {tuple(names): row for names, row in zip(state["names"], split)}
        return means
