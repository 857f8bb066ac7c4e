"""Fully sharded data parallelism (FSDP2): each process holds some rows of every parameter, of its gradient and of what
the optimizer remembers of it.

A block's parameters are gathered when the block runs, forward and backward, and let go after it, so that a model may be
larger than the memory of one device. ZeRO, https://arxiv.org/abs/1910.02054; FSDP, https://arxiv.org/abs/2304.11277.
"""

import math
import sys

import torch
from torch import Tensor

from acorn.distributed.runtime import Runtime
from model import GPT


def shard(model: GPT, r: Runtime, values: dict | None = None) -> GPT:
    """`model` with its parameters sharded among the processes, on their devices.

    One that stands on the meta device takes no memory as a whole in any of them: here its parameters get their values,
    by name, of which only the rows of this process are asked for; or without `values` they are initialized, one after
    the other, to the numbers that they would have unsharded after the same `torch.manual_seed`.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here: they take a second to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    on_meta = model.transformer.wte.weight.is_meta
    mesh = init_device_mesh(r.device.type, (r.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=r.dtype, reduce_dtype=torch.float32)
    for module in (*model.transformer.h, model):  # the last takes what the blocks leave: embeddings, norm and head
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if on_meta:
        model.to_empty(device=r.device)
        if model.config.tie_weights:
            model.lm_head.weight = model.transformer.wte.weight
        for name, p in model.named_parameters():
            if values is None:
                model.init_parameter(name, value := torch.empty(p.shape))
            else:
                value = values[name]
            local(p.detach()).copy_(value[own_rows(p)])
    return model


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor. There is none before `shard` imports its module, which takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def own_rows(p: Tensor) -> slice:
    """Which rows (dimension 0) of a parameter this process has; all of one that is not sharded."""
    if not is_sharded(p):
        return slice(0, len(p))
    share = math.ceil(len(p) / p.device_mesh.size())  # the last ones have less, or none
    first = min(share * p.device_mesh.get_local_rank(), len(p))
    return slice(first, min(first + share, len(p)))


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor: its rows of a sharded one, or all of it."""
    return x.to_local() if is_sharded(x) else x


def whole(x: Tensor) -> Tensor:
    """A sharded tensor gathered, by all processes; each has the result."""
    return x.full_tensor() if is_sharded(x) else x
