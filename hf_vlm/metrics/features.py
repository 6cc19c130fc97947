"""Label-free statistics of features that tell healthy from collapsed encoders."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["alignment", "effective_rank", "feature_std", "mean_cosine", "uniformity"]


def effective_rank(features: Any, *, chunk_size: int = 4096) -> float:
    """Effective number of dimensions (RankMe), from 1 (all features are multiples of one vector) to min(n, D).

    exp of the entropy of the singular values, normalised to sum to 1 (Garrido et al. 2023,
    https://arxiv.org/abs/2210.02885, equation 1, with its 1e-7 added to each fraction). As there, features are neither
    centred nor normalised. The singular values are the square roots of the eigenvalues of the smaller Gram matrix.

    Args:
        features: (n, D) tensor, array or lists.
        chunk_size: Features multiplied at a time, which bounds the memory beside D x D.

    Raises:
        ValueError: Where there are fewer than 2 features, or some that are not finite.
    """
    features = _checked(features)
    num, width = features.shape
    if num <= width:
        features = features.double()
        gram = features @ features.T  # (n, n)
    else:
        gram = torch.zeros(width, width, dtype=torch.float64)
        for chunk in features.split(chunk_size):
            chunk = chunk.double()
            gram += chunk.T @ chunk
    singular_values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # (min(n, D),)
    fractions = singular_values / singular_values.sum().clamp(min=1e-300) + 1e-7
    return float((-fractions * fractions.log()).sum().exp())


def feature_std(features: Any, *, chunk_size: int = 4096) -> float:
    """Standard deviation of L2-normalised features, mean over the dimensions, times sqrt(D).

    1 where features are spread evenly over the sphere, 0 where all have the same direction (Chen and He 2021,
    https://arxiv.org/abs/2011.10566, section 4.1, where 1 / sqrt(D) is the ideal).

    Args:
        features: (n, D) tensor, array or lists.
        chunk_size: Features taken at a time, which bounds the memory.

    Raises:
        ValueError: Where there are fewer than 2 features, or some that are not finite.
    """
    num, width, total, squares = _sums(features, chunk_size)
    variance = (squares / num - (total / num).square()).clamp(min=0)  # (D,); in float64 little cancels
    return float(variance.sqrt().mean() * width**0.5)


def mean_cosine(features: Any, *, chunk_size: int = 4096) -> float:
    """Mean cosine similarity of two different features: 1 for equal directions, near 0 for evenly spread ones.

    Args:
        features: (n, D) tensor, array or lists.
        chunk_size: Features taken at a time, which bounds the memory.

    Raises:
        ValueError: Where there are fewer than 2 features, or some that are not finite.
    """
    num, _, total, squares = _sums(features, chunk_size)
    # The square of a sum holds every pair twice, and each feature with itself.
    return float((total.square().sum() - squares.sum()) / (num * (num - 1)))


def alignment(features: Any, others: Any, *, exponent: float = 2.0) -> float:
    """Mean distance, to a power, of the normalised features of two views of an image: 0 for equal features.

    Wang and Isola 2020, https://arxiv.org/abs/2005.10242, equation 3.

    Args:
        features: (n, D) tensor, array or lists; features of one view of each image.
        others: (n, D) features of another view of the same images, in the same order.
        exponent: Power of the distance, the paper's alpha.

    Raises:
        ValueError: The two differ in shape, there are fewer than 2 features, or some are not finite.
    """
    features, others = _checked(features), _checked(others)
    if features.shape != others.shape:
        raise ValueError(
            f"features {tuple(features.shape)} and others {tuple(others.shape)} must be of the same images."
        )
    difference = _normalized(features.double()) - _normalized(others.double())  # (n, D)
    return float(difference.norm(dim=1).pow(exponent).mean())


def uniformity(features: Any, *, temperature: float = 2.0, chunk_size: int = 1024) -> float:
    """How evenly normalised features cover the sphere: 0 where all are the same, the lower the better.

    log of the mean of exp(-temperature * squared distance) over all pairs of different features (Wang and Isola 2020,
    https://arxiv.org/abs/2005.10242, equation 5; t = 2 as there).

    Args:
        features: (n, D) tensor, array or lists.
        chunk_size: Features compared with all at a time, which bounds the memory to (chunk_size, n) distances.

    Raises:
        ValueError: Where there are fewer than 2 features, or some that are not finite.
    """
    features = _checked(features)
    num = len(features)
    everything = _normalized(features.double())
    squares = everything.square().sum(1)  # (n,): 1, but for features that are zero
    total = torch.zeros((), dtype=torch.float64)
    for chunk, own in zip(everything.split(chunk_size), squares.split(chunk_size), strict=True):
        distances = (own[:, None] + squares - 2 * chunk @ everything.T).clamp(min=0)  # (chunk, n), squared
        total += (-temperature * distances).exp().sum()
    return float(((total - num) / (num * (num - 1))).log())


def _sums(features: Any, chunk_size: int) -> tuple[int, int, Tensor, Tensor]:
    """n, D, and over normalised features (n, D) the sums of values and of squares (D,), in float64."""
    features = _checked(features)
    num, width = features.shape
    total, squares = (torch.zeros(width, dtype=torch.float64) for _ in range(2))
    for chunk in features.split(chunk_size):
        directions = _normalized(chunk.double())
        total += directions.sum(0)
        squares += directions.square().sum(0)
    return num, width, total, squares


def _normalized(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=1)


def _checked(features: Any) -> Tensor:
    features = torch.as_tensor(features).detach().cpu()  # float64 is not known to every accelerator
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (n, D) with n of 2 or more.")
    if not features.isfinite().all():
        raise ValueError("features hold values that are not finite.")
    return features
