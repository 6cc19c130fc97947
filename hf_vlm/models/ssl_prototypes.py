"""Parts of DINO and its successors: prototype head, targets that cannot collapse, cross entropy, KoLeo."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .ranks import sum_over_ranks
from .self_initialised import SelfInitialised
from .ssl_layers import HeadLinear
from .ssl_state import Float32State


class PrototypeHead(nn.Module):
    """DINO's head (arXiv 2104.14294): an MLP, L2 normalisation, cosines to learned prototypes.

    Takes (rows, input_size), gives (rows, num_prototypes) float32 in -1..1. Prototypes are directions, as in DINO with
    `norm_last_layer`; DINOv2's official code learns their lengths too, from 1 on. The directions are initialised as
    there, by torch's rule: with shorter vectors Adam's steps would turn them faster.

    Args:
        num_layers: Layers of the MLP, with GELU between them.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bottleneck_size: int, num_prototypes: int, *, num_layers: int = 3
    ):
        super().__init__()
        sizes = [input_size, *[hidden_size] * (num_layers - 1), bottleneck_size]
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.prototypes = HeadLinear(bottleneck_size, num_prototypes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        embedded = self.mlp(features)
        # bfloat16 would resolve cosines near 1 to 0.004, a tenth of the teacher's temperature.
        with torch.autocast(embedded.device.type, enabled=False):
            embedded = F.normalize(embedded.float(), dim=-1, eps=1e-6)
            return F.linear(embedded, F.normalize(self.prototypes.weight.float(), dim=-1))


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: Tensor, num_iterations: int = 3) -> Tensor:
    """Soft assignments (rows, prototypes) that use all prototypes equally (SwAV, arXiv 2006.09882).

    `logits` are cosines (rows, prototypes) of this rank; the balance is over the rows of all ranks. Rows sum to 1.
    """
    rows, prototypes = logits.shape
    assignments = ((logits.float() - 1) / temperature).exp()  # cosines are at most 1, so nothing overflows
    count = sum_over_ranks(torch.full((), float(rows), device=logits.device))
    for _ in range(num_iterations):
        columns = sum_over_ranks(assignments.sum(0))  # (prototypes,)
        assignments = assignments * (count / prototypes / columns.clamp(min=1e-30))
        assignments = assignments / assignments.sum(1, keepdim=True)
    return assignments


class Centering(Float32State, SelfInitialised):
    """DINO's targets: softmax of logits (rows, prototypes) less a running mean of them.

    The mean is over the rows of all ranks, and moves by 1 - momentum per call in training. It is saved.
    """

    def __init__(self, num_prototypes: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes, dtype=torch.float32))

    def init_parameters(self) -> None:
        init.zeros_(self.center)

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: Tensor) -> Tensor:
        logits = logits.float()
        targets = ((logits - self.center) / temperature).softmax(dim=-1)
        if self.training:
            count = sum_over_ranks(torch.full((), float(logits.shape[0]), device=logits.device))
            self.center.lerp_(sum_over_ranks(logits.sum(0, keepdim=True)) / count, 1 - self.momentum)
        return targets

    center: Tensor


def cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross entropy of soft targets (..., prototypes), each summing to 1, without the logarithm of each probability.

    -sum(t x log softmax(z)) = logsumexp(z) - sum(t x z) with z = logits / temperature. Targets broadcast against
    logits; returns (...).
    """
    scaled = logits.float() / temperature
    return scaled.logsumexp(-1) - (targets * scaled).sum(-1)


def koleo_loss(features: Tensor, all_features: Tensor, offset: int) -> Tensor:
    """KoLeo (arXiv 1806.03198): minus the mean log distance to the nearest other row; rows spread over the sphere.

    Args:
        features: (rows, dim) of this rank, L2-normalised, float32.
        all_features: (world x rows, dim), those of all ranks.
        offset: Where this rank's rows begin in it.

    Returns:
        (); finite where two rows are the same.
    """
    with torch.no_grad():
        similarities = features @ all_features.T
        own = torch.arange(features.shape[0], device=features.device)
        similarities[own, own + offset] = -2.0
        nearest = similarities.argmax(dim=1)
    squared = (features - all_features[nearest]).square().sum(1)
    return -0.5 * (squared + 1e-8).log().mean()


def entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of rows (rows, prototypes) over the largest possible one."""
    return -torch.xlogy(probabilities, probabilities).sum(-1).mean() / math.log(probabilities.shape[-1])


__all__ = ["Centering", "PrototypeHead", "cross_entropy", "entropy", "koleo_loss", "sinkhorn"]
