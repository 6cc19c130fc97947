"""Clusters, and a choice that is even over them, against loops."""

import numpy as np
import pytest

from hf_vlm.curation import clusters, selection
from hf_vlm.curation.selection import split_evenly
from hf_vlm.curation.work import CurationOptions


def one_by_one(wanted, available):
    """Parts that grow in turns, as a sorted list: who gets what is left over is left to chance."""
    parts = [0] * len(available)
    while wanted:
        for index in sorted(range(len(parts)), key=lambda index: parts[index]):
            if (
                wanted
                and parts[index] < available[index]
                and parts[index] == min(part for part, limit in zip(parts, available) if part < limit)
            ):
                parts[index], wanted = parts[index] + 1, wanted - 1
    return sorted(parts)


def test_parts_are_as_equal_as_they_can_be():
    rng = np.random.default_rng(0)
    for _ in range(50):
        available = rng.integers(0, 9, rng.integers(1, 8))
        wanted = int(rng.integers(0, available.sum() + 1))
        parts = split_evenly(wanted, available, rng)
        assert parts.sum() == wanted
        assert (parts <= available).all()
        assert sorted(parts.tolist()) == one_by_one(wanted, available.tolist())
    with pytest.raises(ValueError, match="9 of 8"):
        split_evenly(9, np.array([3, 5]), rng)


class Tables:
    """Tables in memory in place of files."""

    def __init__(self, options, **tables):
        self.options, self.tables, self.num_shards = options, tables, len(tables["decide"])

    def load(self, stage, unit, *names, rows=None):
        return [self.tables[stage][unit][name] for name in names]

    def save(self, stage, unit, arrays):
        self.tables[stage] = {unit: arrays}


def test_images_are_chosen_evenly_at_every_level():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 40, (5, 32))  # of five shards, in 32 clusters below 4
    counts[:, :8] *= 20  # the first of these has most images
    parents = np.arange(32) // 8
    tables = Tables(
        CurationOptions(num_images=2000),
        decide={shard: {"counts": counts[shard]} for shard in range(5)},
        cluster={0: {"parents_0": parents}},
    )
    selection.balance(tables, 0)
    quotas = tables.tables["balance"][0]["quotas"]
    assert (quotas <= counts).all()
    assert quotas.sum() == 2000 == tables.tables["balance"][0]["kept"].sum()
    assert np.bincount(parents, quotas.sum(axis=0)).tolist() == [500] * 4
    for top in range(4):
        below, available = quotas.sum(axis=0)[parents == top], counts.sum(axis=0)[parents == top]
        assert sorted(below.tolist()) == one_by_one(500, available.tolist())
    expected = counts * quotas.sum(axis=0) / np.maximum(counts.sum(axis=0), 1)
    assert np.abs(quotas - expected).max() < 1  # each shard gives in proportion


@pytest.mark.slow
def test_centroids_follow_volume_more_than_density():
    """Nine tenths of the points are in one of eight directions, and the other directions still get centroids."""
    rng = np.random.default_rng(0)
    directions = np.eye(8)[np.repeat(np.arange(8), [630, *[10] * 7])]
    points = directions + 0.15 * rng.normal(size=directions.shape)
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    centroids = clusters._balanced_centroids(points, 16, seed=0)
    assert set(centroids.argmax(axis=1).tolist()) == set(range(8))
    nearest = clusters._nearest(points, centroids, 2)
    expected = np.argsort(-(points.astype(np.float64) @ centroids.T.astype(np.float64)), axis=1)[:, :2]
    assert (nearest == expected).mean() > 0.999
    plain = clusters._k_means(points, 16, seed=0)
    in_largest = [int((found.argmax(axis=1) == 0).sum()) for found in (centroids, plain)]
    assert in_largest[0] < in_largest[1]


def test_options_out_of_range():
    for options in ({"num_images": 0}, {"similarity": 1.5}, {"min_entropy": 9}, {"max_aspect": 0.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            CurationOptions(**options)
    assert CurationOptions(encoder="runs/mae").min_similarity == 0.96 != CurationOptions().min_similarity
