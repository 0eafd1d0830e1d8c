"""The running statistics of batch norm, which a forward pass changes: the same on all ranks, and out of the reach of
updates that are not made."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.distributed import all_reduce_mean


class RunningStatistics:
    """Means and variances of a method's batch norms. Empty, and without cost, for methods that have none."""

    def __init__(self, method: nn.Module):
        norms = [m for m in method.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self.buffers = [buffer for m in norms for buffer in (m.running_mean, m.running_var)]
        self.differ = any(not isinstance(m, nn.SyncBatchNorm) for m in norms)  # between the ranks
        self.before: list[Tensor] = []

    def keep(self) -> None:
        """Before the forward passes of an update."""
        self.before = [buffer.clone() for buffer in self.buffers]

    def settle(self, skip: Tensor) -> None:
        """After them: the means over the ranks, or what was before where `skip` is not 0."""
        if not self.buffers:
            return
        sizes = [buffer.numel() for buffer in self.buffers]
        after = torch.cat([buffer.flatten() for buffer in self.buffers])
        if self.differ:
            after = all_reduce_mean(after)
        for buffer, before, now in zip(self.buffers, self.before, after.split(sizes)):
            buffer.copy_(torch.where(skip > 0, before, now.view_as(before)))
