"""Scaling of settings with batch size and amount of data, so that one recipe serves a laptop and a cluster."""

import bisect
import math
from itertools import pairwise

__all__ = ["SCALING_RULES", "images_to_see", "scaled_learning_rate", "scaled_momentum"]

# Linear: arXiv 1706.02677, for SGD, and what MAE, DINO, MoCo v3 and SimMIM use with AdamW. Square root: SimCLR's rule
# for small batches, DINOv2's, and what holds for Adam (arXiv 2205.10287).
SCALING_RULES = {"linear": 1.0, "sqrt": 0.5}

# Images in a data set, and images seen in a pretraining that is known to work well: Imagenette, 800 epochs; CIFAR-10,
# 1,000 (solo-learn); ImageNet, 300 (DINO, MoCo v3); LVD-142M, 625,000 steps of 3,072 (DINOv2).
KNOWN_RUNS = ((9_469, 7.6e6), (50_000, 5.0e7), (1_281_167, 3.84e8), (142_109_386, 1.92e9))


def images_to_see(num_images: int) -> int:
    """Images to see in a pretraining on `num_images` different ones, interpolated between runs known to work well.

    The interpolation is log-log. Below the smallest data set the number of epochs is constant, above the largest the
    number of images seen.
    """
    sizes = [size for size, _ in KNOWN_RUNS]
    position = bisect.bisect_left(sizes, num_images)
    if position == 0:
        size, seen = KNOWN_RUNS[0]
        return round(num_images * seen / size)
    if position == len(sizes):
        return round(KNOWN_RUNS[-1][1])
    (size, seen), (next_size, next_seen) = list(pairwise(KNOWN_RUNS))[position - 1]
    fraction = math.log(num_images / size) / math.log(next_size / size)
    return round(seen * (next_seen / seen) ** fraction)


def scaled_learning_rate(learning_rate: float, batch_size: int, reference: int, rule: str) -> float:
    """The learning rate for a batch size, given that for a reference batch size and one of `SCALING_RULES`."""
    return learning_rate * float((batch_size / reference) ** SCALING_RULES[rule])


def scaled_momentum(momentum: float, batch_size: int, reference: int) -> float:
    """The momentum with which a teacher moves as far per image as at the reference batch size (arXiv 2307.13813)."""
    return momentum ** (batch_size / reference)
