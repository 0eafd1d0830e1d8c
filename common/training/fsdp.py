"""FSDP2: each process holds its share of the weights, of their gradients and of AdamW's state.

The rest of the code does not know. Methods see whole weights in `forward` and whole tensors in what they load; a
checkpoint holds whole tensors, the same as without sharding, so a run may go on with it or without it, on another
number of processes, and every reader of checkpoints reads it.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common.distributed import Run


def shard(method: nn.Module, blocks: list[nn.Module], run: Run) -> None:
    """Cut the weights in place: each of `blocks` is gathered when it runs, what is outside of them with the method.

    In full precision, forward and reduction too: autocast decides about the arithmetic, as it does under DDP.
    """
    mesh = init_device_mesh(run.device.type, (run.world_size,))
    for module in [*blocks, method]:
        fully_shard(module, mesh=mesh)
    for module in method.modules():
        module.register_load_state_dict_pre_hook(_cut_weights)


def shard_loaded_state(optimizer: torch.optim.Optimizer) -> None:
    """Let `optimizer.load_state_dict` take the whole tensors of a checkpoint."""
    optimizer.register_load_state_dict_pre_hook(_cut_moments)


def meta_copy(method: nn.Module) -> nn.Module:
    """A copy of a method that is not sharded yet, without memory for its weights."""
    weightless = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in method.parameters()}
    return copy.deepcopy(method, weightless)


def full_copy(method: nn.Module, meta_copy: nn.Module) -> nn.Module:
    """The sharded method as a plain module, on every process: for what the processes do each for itself.

    FSDP2 wants all processes to run the same passes; validation gives each its own cases. All must call this.
    """
    twin = copy.deepcopy(meta_copy)
    twin.load_state_dict({name: full_tensor(tensor) for name, tensor in method.state_dict().items()}, assign=True)
    return twin


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or the whole one of which each process holds a share: then all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _share(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, cut as `like` is. A copy: a view would keep the whole in memory."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone()


def _cut_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if prefix + name in state_dict:
            state_dict[prefix + name] = _share(state_dict[prefix + name], parameter)


def _cut_moments(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    state = dict(state_dict["state"])
    for number, parameter in zip(numbers, parameters):
        if number in state:
            state[number] = {name: _share(value, parameter) for name, value in state[number].items()}
    return state_dict | {"state": state}
