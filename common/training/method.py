"""The interface between a method and the training loop: every hook with its signature and what it does by default."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

Batch = dict[str, Tensor]


class Reconstruction(NamedTuple):
    """Views and what an autoencoder predicts for them, to be drawn and measured.

    M views   N patches   P voxels of a patch (times channels)
    """

    # (M, C, D, H, W) in [0, 1]
    view: Tensor
    # (M, N), 1 = removed (and not only padding, where that is ignored); None when nothing is reconstructed
    mask: Tensor | None
    # (M, N, P); None when nothing is reconstructed
    prediction: Tensor | None


class Method(nn.Module, ABC):
    """A module that the training loop can train. A subclass defines `forward` and the two checkpoint hooks.

    Attributes:
        num_parts: number of backward passes per micro-batch. With more than one, `forward` is called with `part` 0, 1,
            ... in turn, and the graph of a part is freed before the next one is computed. What the parts return under
            one name is added up.
    """

    num_parts: int = 1

    @abstractmethod
    def forward(self, batch: Batch, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        """Return named scalar tensors: the losses, and whatever else is to be logged.

        The loop sums those that have a loss weight, each times its weight, and takes the gradient of the sum.

        Args:
            batch: one micro-batch, on the device of the parameters.
            step: number of optimiser updates made so far.
            part: which backward pass this is, 0 <= part < num_parts.
        """

    @abstractmethod
    def checkpoint_state(self) -> dict[str, Any]:
        """Return the entries of a checkpoint that hold this method's weights: nested dicts of tensors."""

    @abstractmethod
    def load_checkpoint_state(self, content: dict[str, Any]) -> None:
        """Load what `checkpoint_state` returned from the content of a checkpoint.

        Raises:
            KeyError, RuntimeError, ValueError: the checkpoint is not one of this method.
        """

    def before_step(self, step: int) -> None:
        """Called in every update when the gradients are complete, before they are clipped."""

    def after_step(self, step: int) -> dict[str, Tensor] | None:
        """Called in every update after the optimiser: for an average of the weights, for instance.

        It may return named scalars of the update to be logged beside what `forward` reports.
        """

    def discard_passes(self) -> None:
        """Forget what forward passes have left for `after_step`. Called after a trial that no update follows."""

    def schedule_values(self, step: int) -> dict[str, float]:
        """Return scheduled values to be logged beside the learning rate."""
        return {}

    @property
    def grad_norm_parameter(self) -> nn.Parameter | None:
        """A parameter that all losses share. The norm of each loss's gradient at it is logged once per epoch."""
        return None

    def reconstructions(self, batch: Batch) -> dict[str, Reconstruction]:
        """Return what the method predicts for a batch, by kind of view; {} when there is nothing to draw."""
        return {}
