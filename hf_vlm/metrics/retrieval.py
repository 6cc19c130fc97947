"""Retrieval: how far up the right items of a query stand among all, in both directions of a pairing."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["recall_at", "retrieval_recall"]

CHUNK_SIZE = 1024  # queries compared with all items at a time


def recall_at(queries: Tensor, items: Tensor, pairs: Tensor, ks: Sequence[int] = (1, 5, 10)) -> list[float]:
    """For each k, the fraction of the queries that have a right item among the k most similar ones.

    Wrong items that are as similar as the best right one count as more similar: features that are all the same are
    not right by chance of the order.

    Args:
        queries: (n, dim) features.
        items: (m, dim) features.
        pairs: (p, 2) int64, index of a query and of an item that is right for it; each query has one or more.
        ks: Numbers of items to look at.
    """
    ranks = []
    order = pairs[:, 0].argsort(stable=True)
    of_query, of_item = pairs[order].T.contiguous()
    starts = torch.searchsorted(of_query, torch.arange(len(queries) + 1))
    for first in range(0, len(queries), CHUNK_SIZE):
        last = min(first + CHUNK_SIZE, len(queries))
        similarities = queries[first:last] @ items.T  # (chunk, m)
        rows = slice(int(starts[first]), int(starts[last]))
        is_right = torch.zeros_like(similarities, dtype=torch.bool)
        is_right[of_query[rows] - first, of_item[rows]] = True
        best = similarities.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((similarities >= best) & ~is_right).sum(dim=1))
    rank = torch.cat(ranks)
    return [(rank < k).double().mean().item() for k in ks]


def retrieval_recall(images: Tensor, texts: Tensor, pairs: Tensor, ks: Iterable[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall of texts by images and of images by texts, R@1, R@5 and R@10 as usual.

    Args:
        images: (n, dim) features, L2-normalised.
        texts: (m, dim) features of different texts, L2-normalised.
        pairs: (p, 2) int64, index of an image and of a text of it.

    Returns:
        `image_to_text_r<k>` and `text_to_image_r<k>` for each k.
    """
    ks = tuple(ks)
    found = {
        "image_to_text": recall_at(images, texts, pairs, ks),
        "text_to_image": recall_at(texts, images, pairs.flip(1), ks),
    }
    return {f"{name}_r{k}": value for name, values in found.items() for k, value in zip(ks, values)}
