"""Sharded training (FSDP2): each process keeps its part of weights, moments and averages.

The parameters of a Mint layer are gathered when it is their turn, and let go after it; what is
masked of them stays for the backward pass. A checkpoint holds whole tensors, so that a run can be
resumed by another number of processes, sharded or not.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from mintnet_triton.flow import MintNet
from mintnet_triton.mint import MintLayer


def shard(model: nn.Module) -> None:
    """Divide the parameters among all processes, in place.

    As with ``DistributedDataParallel``, they start as those of the first process, whose are the
    buffers at every step (the statistics of a BatchNorm).
    """
    place = next(model.parameters()).device.type
    kept = model.state_dict()  # masks are not, and are the same in all processes
    buffers = [buffer for name, buffer in model.named_buffers() if name in kept]
    for tensor in (*model.parameters(), *buffers):
        distributed.broadcast(tensor.detach(), 0)
    mesh = init_device_mesh(place, (distributed.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, MintLayer):
            fully_shard(module, mesh=mesh)
    # What is left. The average is only ever evaluated, so no backward pass would let it go.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if isinstance(model, MintNet):  # whose layers are called before the flow itself is
        register_fsdp_forward_method(model, "dequantise")
    model.register_forward_pre_hook(partial(_share_buffers, buffers))


def _share_buffers(buffers: list[Tensor], model: nn.Module, _: Any) -> None:
    if model.training:
        for buffer in buffers:
            distributed.broadcast(buffer, 0)


def whole(state: Any, keep: bool = True) -> Any:
    """A state with tensors in one piece, on the CPU; every process has to ask for it.

    A process that does not keep them has None instead, and never more than one at a time.
    """
    if isinstance(state, Mapping):
        return {name: whole(value, keep) for name, value in state.items()}
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    return state


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; of one that is not shared, all."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def shared_out(state: Mapping[str, Any], part: Any) -> Mapping[str, Any]:
    """A state of whole tensors in the shards of what is to load it, a module or an optimiser."""
    if isinstance(part, nn.Module):
        ours = part.state_dict()
        return {name: _like(value, ours[name]) for name, value in state.items()}
    if isinstance(part, Optimizer):
        (group,) = part.param_groups
        moments = {
            index: {name: _like(value, group["params"][index]) for name, value in of_one.items()}
            for index, of_one in state["state"].items()
        }
        return {**state, "state": moments}
    return state


def _like(value: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(
            value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    return value
