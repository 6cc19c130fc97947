"""Recall against a loop over all queries and items."""

import pytest
import torch

from hf_vlm.metrics import retrieval
from hf_vlm.metrics.retrieval import recall_at, retrieval_recall


def slow_recall(queries, items, right, k):
    hits = 0
    for query, own in zip(queries, right):
        order = sorted(range(len(items)), key=lambda item: -float(query @ items[item]))
        hits += any(item in own for item in order[:k])
    return hits / len(queries)


def test_recall_is_that_of_a_loop(monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK_SIZE", 4)
    torch.manual_seed(0)
    images, texts = torch.randn(11, 5), torch.randn(17, 5)
    right = [set(torch.randperm(17)[: 1 + i % 3].tolist()) for i in range(11)]
    missing = set(range(17)) - set().union(*right)
    right[0] |= missing  # each text has an image
    pairs = torch.tensor([(i, j) for i, own in enumerate(right) for j in own])[torch.randperm(sum(map(len, right)))]
    found = retrieval_recall(images, texts, pairs, (1, 3))
    images_of = [{i for i, own in enumerate(right) if j in own} for j in range(17)]
    for k in (1, 3):
        assert found[f"image_to_text_r{k}"] == pytest.approx(slow_recall(images, texts, right, k))
        assert found[f"text_to_image_r{k}"] == pytest.approx(slow_recall(texts, images, images_of, k))


def test_features_that_are_all_the_same_find_nothing():
    same, pairs = torch.ones(4, 3), torch.arange(4)[:, None].expand(4, 2)
    assert recall_at(same, same, pairs, (1, 3, 4)) == [0, 0, 1]
