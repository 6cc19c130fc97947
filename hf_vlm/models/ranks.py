"""The ranks that have images of their own, and the collectives among them, with gradients where a loss needs them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Groups of the models whose forward pass is running, innermost last; None stands for all ranks.
_GROUPS: list[Any] = []


def data_group(model: nn.Module) -> Any:
    """The process group among which images are divided; None for all ranks.

    Ranks that divide layers among them by transformers' tensor parallelism have the same images: of these, a group
    has one each.
    """
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    config: Any = model.config.distributed_config  # type: ignore[union-attr]
    replicated = ("dp_replicate", "fsdp") if config.dp_replicate_size > 1 else "fsdp"
    mesh = model._mesh_manager.get_mesh(replicated)  # type: ignore[union-attr, operator]
    return (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()


@contextmanager
def data_ranks_of(model: nn.Module) -> Iterator[None]:
    """A context in which the functions of this module speak of the ranks that divide the images of a model."""
    _GROUPS.append(data_group(model))
    try:
        yield
    finally:
        _GROUPS.pop()


def among_data_ranks(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a model's `forward`, which then runs in the context `data_ranks_of`."""

    @wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if world_size() == 1 or data_group(self) is None:
            return forward(self, *args, **kwargs)
        with data_ranks_of(self):
            return forward(self, *args, **kwargs)

    return wrapper


def _group() -> Any:
    return _GROUPS[-1] if _GROUPS else None


def world_size() -> int:
    """Number of ranks with images of their own; 1 where no process group runs."""
    return dist.get_world_size(_group()) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this rank among those with images of their own; 0 where no process group runs."""
    return dist.get_rank(_group()) if world_size() > 1 else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks with images of their own, without a gradient."""
    return _sum(tensor, _group()) if world_size() > 1 else tensor


def _sum(tensor: Tensor, group: Any) -> Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor, group=group)
    return tensor


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks; every rank's result depends on every rank's input, so gradients sum as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.group = _group()  # the backward pass runs outside of the model's context
        return _sum(tensor, ctx.group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _sum(gradient, ctx.group)


class _GatherFromRanks(torch.autograd.Function):
    """Tensors (n, ...) of all ranks, joined (world x n, ...); torch's own gather with a gradient is deprecated."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.group = _group()
        ctx.place = rank(), world_size()
        joined = tensor.new_empty(world_size(), *tensor.shape)
        dist.all_gather(list(joined), tensor.contiguous(), group=ctx.group)
        return joined.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        index, count = ctx.place
        return _sum(gradient, ctx.group).chunk(count)[index]


def sum_with_gradient(tensor: Tensor) -> Tensor:
    """The sum over all ranks with images of their own; the backward pass sums the gradients of these ranks."""
    return _SumOverRanks.apply(tensor) if world_size() > 1 else tensor  # type: ignore[no-any-return]


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Joins tensors (n, ...) of all ranks with images of their own, in rank order: (world x n, ...).

    The backward pass sums the gradients of these ranks. DDP averages them, so a loss that is a mean over the local
    rows gives the gradient of the joined batch without further scaling.
    """
    return tensor if world_size() == 1 else _GatherFromRanks.apply(tensor)  # type: ignore[no-any-return]


__all__ = [
    "among_data_ranks",
    "data_group",
    "data_ranks_of",
    "gather_with_gradient",
    "rank",
    "sum_over_ranks",
    "sum_with_gradient",
    "world_size",
]
