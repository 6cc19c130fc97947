"""What self-supervised methods share: batch norm over all ranks, the projection head, views."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ranks import sum_with_gradient, world_size
from .self_initialised import SelfInitialised


class SyncedBatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation of (batch, features) with the statistics of all ranks, on any device.

    torch's own synchronised layer runs on accelerators only; two CPU processes must train as one process does.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(inputs)
        count = inputs.shape[0] * world_size()
        mean = sum_with_gradient(inputs.float().sum(0)) / count  # (features,)
        centred = inputs - mean  # before squaring: features of a fresh encoder hardly differ, and their squares cancel
        variance = sum_with_gradient(centred.square().sum(0)) / count  # (features,)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
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
]
