"""What self-supervised methods share: collectives with gradients, batch norm over all ranks, the projection head."""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .self_initialised import SelfInitialised


def world_size() -> int:
    """Number of ranks; 1 where no process group runs."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this rank; 0 where no process group runs."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks, without a gradient."""
    if world_size() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
    return tensor


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks; every rank's result depends on every rank's input, so gradients sum as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient)


class _GatherFromRanks(torch.autograd.Function):
    """Tensors (n, ...) of all ranks, joined (world x n, ...); torch's own gather with a gradient is deprecated."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        joined = tensor.new_empty(world_size(), *tensor.shape)
        dist.all_gather(list(joined), tensor.contiguous())
        return joined.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient).chunk(world_size())[rank()]


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Joins tensors (n, ...) of all ranks in rank order: (world x n, ...).

    The backward pass sums the gradients of all ranks. DDP averages them, so a loss that is a mean over the local rows
    gives the gradient of the joined batch without further scaling.
    """
    return tensor if world_size() == 1 else _GatherFromRanks.apply(tensor)


class SyncedBatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation of (batch, features) with the statistics of all ranks, on any device.

    torch's own synchronised layer runs on accelerators only; two CPU processes must train as one process does.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(inputs)
        count = inputs.shape[0] * world_size()
        mean = _SumOverRanks.apply(inputs.float().sum(0)) / count  # (features,)
        centred = inputs - mean  # before squaring: features of a fresh encoder hardly differ, and their squares cancel
        variance = _SumOverRanks.apply(centred.square().sum(0)) / count  # (features,)
        with torch.no_grad():
            for running, value in (self.running_mean, mean), (self.running_var, variance * count / (count - 1)):
                running.lerp_(value.to(running.dtype), self.momentum)
        normalised = centred * torch.rsqrt(variance + self.eps)
        if self.affine:
            normalised = normalised * self.weight + self.bias
        return normalised.to(inputs.dtype)


class HeadLinear(SelfInitialised, nn.Linear):
    """A linear layer initialised by its number of inputs, as torch does and transformers does not.

    Relative to a weight, AdamW's steps are the larger the smaller it is: small weights, whose scale batch norm
    removes, learn so fast that the encoder learns less (measured for SimCLR: benchmarks/RESULTS.md).
    """

    def init_parameters(self) -> None:
        self.reset_parameters()


class ProjectionHead(nn.Sequential):
    """MLP with batch norm between the layers: (batch, input_size) to (batch, output_size).

    Args:
        last_norm: Whether batch norm without gain and bias follows the last layer, which then has no bias either.
    """

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, *, num_layers: int = 2, last_norm: bool = False
    ):
        sizes = [input_size, *[hidden_size] * (num_layers - 1), output_size]
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes[:-1]):
            layers += [HeadLinear(size_in, size_out, bias=False), SyncedBatchNorm1d(size_out), nn.ReLU(inplace=True)]
        layers.append(HeadLinear(sizes[-2], output_size, bias=not last_norm))
        if last_norm:
            layers.append(SyncedBatchNorm1d(output_size, affine=False))
        super().__init__(*layers)


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Spread () of features (rows, dim): the mean deviation of their directions x sqrt(dim).

    It is 1 where they lie evenly in all directions, and 0 where all are the same: a collapse.
    """
    return F.normalize(features.float(), dim=-1).std(dim=0).mean() * features.shape[1] ** 0.5


def check_views(pixel_values: Tensor, num_views: int | None = None) -> Tensor:
    """Checks a batch of views (batch, views, channels, height, width) and returns it; ValueError otherwise."""
    if pixel_values.ndim != 5 or (num_views is not None and pixel_values.shape[1] != num_views):
        wanted = "views" if num_views is None else f"{num_views} views"
        raise ValueError(
            f"pixel_values must be (batch, {wanted}, channels, height, width), but are {tuple(pixel_values.shape)}."
        )
    return pixel_values


def check_local_views(local_pixel_values: Tensor | None, batch: int) -> list[Tensor]:
    """Small views of a batch of `batch` images, checked, as a list: empty where there are none."""
    if local_pixel_values is None:
        return []
    if local_pixel_values.ndim != 5 or local_pixel_values.shape[0] != batch:
        raise ValueError(
            f"local_pixel_values must be ({batch} images as pixel_values, views, channels, height, width), but are "
            f"{tuple(local_pixel_values.shape)}."
        )
    return [local_pixel_values]


def flatten_views(pixel_values: Tensor) -> Tensor:
    """Images (images, ...) of a batch with views (batch, views, channels, height, width) or without."""
    return flatten_views_view_major(pixel_values) if pixel_values.ndim == 5 else pixel_values


def flatten_views_view_major(pixel_values: Tensor) -> Tensor:
    """Flattens (batch, views, ...) to (views x batch, ...): all first views, then all second views."""
    return pixel_values.transpose(0, 1).flatten(0, 1)


__all__ = [
    "ProjectionHead",
    "SyncedBatchNorm1d",
    "check_local_views",
    "check_views",
    "feature_std",
    "flatten_views",
    "flatten_views_view_major",
    "gather_with_gradient",
    "rank",
    "sum_over_ranks",
    "world_size",
]
