"""Cross entropy of similarities: the plain formula, and the same with its gradient written out, for speed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def contrastive_cross_entropy(
    queries: Tensor, keys: Tensor, own: Tensor, partners: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each query's similarities to the keys, its target being its partner: the plain formula.

    Args:
        queries: (queries, dim), L2-normalised.
        keys: (keys, dim), L2-normalised.
        own: (queries,) index of each query among the keys, which is left out.
        partners: (queries,) index of each query's positive among the keys.
        temperature: Temperature of the similarities.

    Returns:
        Mean loss () over the queries, and the fraction () of them whose nearest key is their partner.
    """
    logits = queries @ keys.T / temperature  # (queries, keys)
    logits = logits.scatter(1, own[:, None], float("-inf"))
    return F.cross_entropy(logits, partners), (logits.argmax(dim=1) == partners).float().mean()


def fast_contrastive_cross_entropy(
    queries: Tensor, keys: Tensor, own: Tensor, partners: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`contrastive_cross_entropy` with its gradient written out: 1.4 to 1.7 times as fast.

    Measured forward and backward on one CPU thread for 512 to 2,048 views of 128 dimensions: autograd passes over the
    matrix of similarities three times as often.
    """
    keys = keys.view_as(keys)  # a function that is given one tensor twice would not compile
    return _ContrastiveCrossEntropy.apply(queries, keys, own, partners, temperature)  # type: ignore[no-any-return]


class _ContrastiveCrossEntropy(torch.autograd.Function):
    """The formula, and its gradient d loss / d logits = (softmax(logits) - one_hot(partners)) / queries."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, own: Tensor, partners: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logits = (queries / temperature) @ keys.T  # (queries, keys)
        logits.scatter_(1, own[:, None], float("-inf"))
        best, nearest = logits.max(dim=1)
        weights = logits.softmax(dim=1)  # (queries, keys)
        # The largest weight is exp(best - logsumexp).
        normaliser = best - weights.gather(1, nearest[:, None])[:, 0].log()
        loss = (normaliser - logits.gather(1, partners[:, None])[:, 0]).mean()
        ctx.save_for_backward(queries, keys, partners, weights)
        ctx.scale = 1 / (temperature * queries.shape[0])
        accuracy = (nearest == partners).float().mean()
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        queries, keys, partners, weights = ctx.saved_tensors
        scale = gradient * ctx.scale
        of_queries = (weights @ keys - keys[partners]) * scale  # (queries, dim)
        of_keys = (weights.T @ queries).index_add_(0, partners, queries, alpha=-1) * scale  # (keys, dim)
        return of_queries, of_keys, None, None, None


__all__ = ["contrastive_cross_entropy", "fast_contrastive_cross_entropy"]
