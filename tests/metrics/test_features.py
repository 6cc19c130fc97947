"""Label-free statistics against loops in float64, and where the answer is known."""

import itertools
import math

import numpy as np
import pytest
import torch

from hf_vlm.metrics import alignment, effective_rank, feature_std, mean_cosine, uniformity

ONE_SET = [effective_rank, feature_std, mean_cosine, uniformity]


def random_features(seed, num=40, width=7):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, width)) * np.linspace(0.2, 2, width) + rng.normal(size=width)


def directions(features):
    return [[value / math.hypot(*row) for value in row] for row in features.tolist()]


def squared_distance(one, other):
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def effective_rank_loop(features):
    singular_values = np.linalg.svd(features, compute_uv=False)
    fractions = [value / sum(singular_values) + 1e-7 for value in singular_values]
    return math.exp(-sum(fraction * math.log(fraction) for fraction in fractions))


def feature_std_loop(features):
    rows = directions(features)
    deviations = []
    for column in zip(*rows, strict=True):
        mean = sum(column) / len(column)
        deviations.append(math.sqrt(sum((value - mean) ** 2 for value in column) / len(column)))
    return math.sqrt(len(deviations)) * sum(deviations) / len(deviations)


def mean_cosine_loop(features):
    pairs = list(itertools.combinations(directions(features), 2))
    return sum(sum(a * b for a, b in zip(one, other, strict=True)) for one, other in pairs) / len(pairs)


def uniformity_loop(features):
    pairs = list(itertools.combinations(directions(features), 2))
    return math.log(sum(math.exp(-2 * squared_distance(one, other)) for one, other in pairs) / len(pairs))


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
@pytest.mark.parametrize(
    ("metric", "loop"),
    list(zip(ONE_SET, [effective_rank_loop, feature_std_loop, mean_cosine_loop, uniformity_loop], strict=True)),
)
def test_statistics_equal_the_loops_in_chunks_of_any_size(metric, loop, shape):
    features = random_features(0, *shape)
    expected = loop(features)
    assert metric(features) == pytest.approx(expected, rel=1e-9)
    assert metric(features, chunk_size=3) == pytest.approx(expected, rel=1e-9)
    assert metric(torch.tensor(features, dtype=torch.float32, requires_grad=True)) == pytest.approx(expected, rel=1e-5)


def test_alignment_equals_the_loop():
    features, others = random_features(0), random_features(1)
    pairs = list(zip(directions(features), directions(others), strict=True))
    squared = sum(squared_distance(*pair) for pair in pairs) / len(pairs)
    plain = sum(math.sqrt(squared_distance(*pair)) for pair in pairs) / len(pairs)
    assert alignment(features, others) == pytest.approx(squared)
    assert alignment(features, others, exponent=1) == pytest.approx(plain)
    assert alignment(features, 3 * features) == pytest.approx(0, abs=1e-12)
    assert alignment(features, -features) == pytest.approx(4)


def test_features_along_the_axes_fill_the_space():
    axes = np.concatenate([np.eye(6), -np.eye(6)])
    assert effective_rank(5 * axes) == pytest.approx(6, rel=1e-5)
    assert feature_std(5 * axes) == pytest.approx(1)
    assert mean_cosine(5 * axes) == pytest.approx(-1 / 11)  # each feature has one opposite among eleven others
    assert uniformity(axes) == pytest.approx(math.log((math.exp(-8) + 10 * math.exp(-4)) / 11))


def test_many_random_features_are_isotropic():
    features = np.random.default_rng(0).normal(size=(20_000, 16))
    assert feature_std(features) == pytest.approx(1, abs=1e-3)
    assert mean_cosine(features) == pytest.approx(0, abs=1e-3)
    assert effective_rank(features) == pytest.approx(16, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_that_are_all_the_same_have_collapsed(dtype):
    features = torch.linspace(-1, 2, 300).expand(50, 300).to(dtype) * torch.linspace(1, 2, 50)[:, None].to(dtype)
    same = features[:1].expand(50, 300)
    assert effective_rank(same) == pytest.approx(1, abs=2e-3)
    assert feature_std(same) == pytest.approx(0, abs=1e-6)
    assert mean_cosine(same) == pytest.approx(1)
    assert uniformity(same) == pytest.approx(0, abs=1e-9)
    assert alignment(same, features) < 1e-4


def test_a_common_part_hides_what_differs():
    features = random_features(0)
    shifted = features + 100
    assert effective_rank(shifted) < 2 < effective_rank(features)
    assert feature_std(shifted) < 0.05 < feature_std(features)
    assert mean_cosine(shifted) > 0.99 > mean_cosine(features)


@pytest.mark.parametrize("metric", ONE_SET)
def test_zeros_are_no_direction_and_no_error(metric):
    assert math.isfinite(metric(np.zeros((3, 4))))


@pytest.mark.parametrize("metric", [*ONE_SET, lambda features: alignment(features, features)])
def test_malformed_features_are_named(metric):
    with pytest.raises(ValueError, match=r"features have shape \(1, 7\); expected \(n, D\) with n of 2 or more"):
        metric(random_features(0)[:1])
    with pytest.raises(ValueError, match="not finite"):
        metric(random_features(0) * math.nan)


def test_views_must_be_of_the_same_images():
    with pytest.raises(ValueError, match=r"\(40, 7\) and others \(39, 7\) must be of the same images"):
        alignment(random_features(0), random_features(1)[:-1])
