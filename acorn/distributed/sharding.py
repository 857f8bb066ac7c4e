"""Fully sharded data parallelism (FSDP2): each rank holds some rows of every parameter, gradient and optimizer moment.

A block's parameters are gathered for its forward and backward pass and freed afterwards, so a model may be larger than
the memory of one device. ZeRO, https://arxiv.org/abs/1910.02054; FSDP, https://arxiv.org/abs/2304.11277.
"""

import math
import sys
import warnings
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from acorn.distributed.runtime import Runtime
from model import GPT

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(model: GPT, dist: Runtime, values: dict | None = None) -> GPT:
    """Shard the parameters of `model` over the ranks, on their devices, and return it.

    If the model is on the meta device, no rank ever holds the whole model in memory. Each rank copies its own rows from
    `values`, which maps parameter names to tensors. Without `values`, the parameters are initialized one by one, to the
    same values as without sharding after the same `torch.manual_seed`.
    """
    from torch.distributed.device_mesh import init_device_mesh  # imported here because it takes a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    on_meta = model.transformer.wte.weight.is_meta
    mesh = init_device_mesh(dist.device.type, (dist.world_size,))
    # the model returns views, which nothing changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(param_dtype=dist.dtype, reduce_dtype=torch.float32)
    for module in (*model.transformer.h, model):  # `model` last: it shards embeddings, final norm and head
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if on_meta:
        model.to_empty(device=dist.device)
        if model.config.tie_weights:
            model.lm_head.weight = model.transformer.wte.weight
        for name, p in model.named_parameters():
            if values is None:
                model.init_parameter(name, value := torch.empty(p.shape))
            else:
                value = values[name]
            local(p.detach()).copy_(value[own_rows(p)])
    return model


def is_sharded(x: Tensor) -> "TypeGuard[DTensor]":
    """Return whether x is a DTensor, without importing its module, which takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def own_rows(p: Tensor) -> slice:
    """Return the slice of rows (dimension 0) of a parameter that this rank holds: all, unless it is sharded."""
    if not is_sharded(p):
        return slice(0, len(p))
    share = math.ceil(len(p) / p.device_mesh.size())  # the last ranks may have fewer rows, or none
    first = min(share * p.device_mesh.get_local_rank(), len(p))
    return slice(first, min(first + share, len(p)))


def local(x: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, or the whole tensor if it is not sharded."""
    return x.to_local() if is_sharded(x) else x


def whole(x: Tensor) -> Tensor:
    """Gather a sharded tensor on every rank. A collective: all ranks must call it."""
    return x.full_tensor() if is_sharded(x) else x
