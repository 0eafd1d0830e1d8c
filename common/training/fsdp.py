"""FSDP2: each process holds a shard of the weights, of their gradients and of AdamW's state.

The rest of the code is not aware of it. Methods see full weights in `forward`, and full tensors in what they load. A
checkpoint holds full tensors, the same as without sharding, so a run can be resumed with or without it, on another
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
    """Shard the weights in place: each block is gathered when it runs, everything else with the method.

    In full precision, also in the reduction: autocast decides about the arithmetic, as it does under DDP.
    """
    mesh = init_device_mesh(run.device.type, (run.world_size,))
    for module in [*blocks, method]:
        fully_shard(module, mesh=mesh)
    for module in method.modules():
        module.register_load_state_dict_pre_hook(_shard_weights)


def shard_loaded_state(optimizer: torch.optim.Optimizer) -> None:
    """Let `optimizer.load_state_dict` accept the full tensors of a checkpoint."""
    optimizer.register_load_state_dict_pre_hook(_shard_moments)


def meta_copy(method: nn.Module) -> nn.Module:
    """Return a copy of a method that is not sharded yet, with its parameters on the meta device (no memory)."""
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in method.parameters()}
    return copy.deepcopy(method, parameters)


def full_copy(method: nn.Module, unsharded: nn.Module) -> nn.Module:
    """Return a sharded method as a plain module with full weights, on every process. All processes must call it.

    For what each process does on its own, such as validation: FSDP2 requires all processes to run the same passes.
    `unsharded` is what `meta_copy` returned before sharding.
    """
    twin = copy.deepcopy(unsharded)
    twin.load_state_dict({name: full_tensor(tensor) for name, tensor in method.state_dict().items()}, assign=True)
    return twin


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one (then all processes must call it), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a full tensor. A copy, since a view would keep the full tensor in memory."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone()


def _shard_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if prefix + name in state_dict:
            state_dict[prefix + name] = _shard_like(state_dict[prefix + name], parameter)


def _shard_moments(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    state = dict(state_dict["state"])
    for number, parameter in zip(numbers, parameters):
        if number in state:
            state[number] = {name: _shard_like(value, parameter) for name, value in state[number].items()}
    return state_dict | {"state": state}
