"""Probes against loops in float64 and against a separable problem."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hf_vlm.metrics import knn_accuracy, linear_accuracy


def clusters(seed, num, *, num_classes=4, width=8, spread=1.0):
    centres = np.random.default_rng(99).normal(size=(num_classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num)
    return centres[labels] + spread * rng.normal(size=(num, width)), labels


def knn_loop(train, train_labels, test, test_labels, num_neighbors, temperature):
    right = 0
    for feature, label in zip(test, test_labels, strict=True):
        similarities = [
            sum(a * b for a, b in zip(feature, other, strict=True)) / math.hypot(*feature) / math.hypot(*other)
            for other in train
        ]
        nearest = sorted(range(len(train)), key=lambda i: -similarities[i])[:num_neighbors]
        votes = dict.fromkeys(range(max(train_labels) + 1), 0.0)
        for i in nearest:
            votes[train_labels[i]] += math.exp(similarities[i] / temperature)
        right += max(votes, key=votes.get) == label
    return right / len(test)


@pytest.mark.parametrize(("num_neighbors", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 10.0), (60, 0.5)])
def test_knn_equals_the_loop(num_neighbors, temperature):
    train, test = clusters(0, 60), clusters(1, 45)
    expected = knn_loop(*train, *test, num_neighbors, temperature)
    result = knn_accuracy(*train, *test, num_neighbors=num_neighbors, temperature=temperature, chunk_size=7)
    assert result == expected
    assert 0.3 < result < 1


def test_knn_is_finite_at_a_low_temperature():
    train, test = clusters(0, 60), clusters(1, 45)
    assert knn_accuracy(*train, *test, temperature=0.001) == knn_accuracy(*train, *test, num_neighbors=1)


def test_knn_takes_tensors_on_a_graph():
    train, test = clusters(0, 60), clusters(1, 45)
    tensors = [torch.tensor(train[0], requires_grad=True), torch.tensor(train[1]), *map(torch.tensor, test)]
    assert knn_accuracy(*tensors) == knn_accuracy(*train, *test)


def test_linear_separates_what_is_separable():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 6))
    labels = (features @ [1.0, -2, 0.5, 0, 0, 1] > 0).astype(int)
    scales = np.array([1e-3, 1, 1e3, 1, 1, 1])  # standardising makes the scale of a feature irrelevant
    result = linear_accuracy(features[:300] * scales, labels[:300], features[300:] * scales, labels[300:])
    assert result >= 0.95
    shuffled = rng.permutation(labels[:300])
    assert 0.3 < linear_accuracy(features[:300], shuffled, features[300:], labels[300:]) < 0.7


def test_linear_equals_scikit_learn_on_standardised_features():
    (train, train_labels), (test, test_labels) = clusters(0, 80), clusters(1, 60)
    train = train * 5 + 3
    test = test * 5 + 3
    mean, deviation = train.mean(0), train.std(0)
    model = LogisticRegression(C=0.2, max_iter=500).fit((train - mean) / deviation, train_labels)
    expected = model.score((test - mean) / deviation, test_labels)
    assert linear_accuracy(train, train_labels, test, test_labels, inverse_regularization=0.2) == expected
    assert 0.4 < expected < 1


@pytest.mark.parametrize("probe", [knn_accuracy, linear_accuracy])
def test_malformed_inputs_are_named(probe):
    (train, train_labels), (test, test_labels) = clusters(0, 30), clusters(1, 10)
    with pytest.raises(ValueError, match=r"test_features has shape \(10, 7\); expected \(n, 8\)"):
        probe(train, train_labels, test[:, :7], test_labels)
    with pytest.raises(ValueError, match=r"train_labels has shape \(29,\) for 30"):
        probe(train, train_labels[:-1], test, test_labels)
    with pytest.raises(ValueError, match="train_labels must be integers from 0"):
        probe(train, train_labels - 5, test, test_labels)
    with pytest.raises(ValueError, match="test_features holds values that are not finite"):
        probe(train, train_labels, test * math.nan, test_labels)


def test_too_few_features_or_classes_are_refused():
    (train, train_labels), (test, test_labels) = clusters(0, 30), clusters(1, 10)
    with pytest.raises(ValueError, match="num_neighbors is 31; it must be from 1 to 30"):
        knn_accuracy(train, train_labels, test, test_labels, num_neighbors=31)
    with pytest.raises(ValueError, match="at least 2 classes"):
        linear_accuracy(train, train_labels * 0, test, test_labels)
