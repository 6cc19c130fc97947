"""Clusters of images in levels, of about equal volume (arXiv 2405.15613), and the images of each.

The smallest clusters serve twice: near duplicates are looked for within them, and images are chosen evenly over them.
"""

from typing import Any

import numpy as np

from hf_vlm.curation.duplicates import dropped_rows, num_exact_units
from hf_vlm.curation.measure import priority
from hf_vlm.curation.work import Work

__all__ = ["assign_shard", "find_clusters", "num_levels"]

Array = np.ndarray[Any, Any]

MAX_CLUSTERS = 2**14
MAX_SAMPLE = 2**18  # images that clusters are found in
MAX_SAMPLED_SHARDS = 1024
RATIO = 8  # clusters of a level per cluster of the next
MIN_CLUSTERS = 4  # of the highest level, where there are as many below it
NUM_RESAMPLINGS = 3
CLUSTERS_PER_IMAGE = 2  # in which copies are looked for: two of them at a boundary would be apart in one
CHUNK = 4096  # images compared with the centroids at a time


def find_clusters(work: Work, unit: int) -> None:
    """Write the levels of clusters: `centroids` (clusters, D) float32 of the smallest, and for each level below the
    highest `parents_0`, `parents_1`, ... the cluster above each.

    Raises:
        ValueError: No image has passed the filters.
    """
    features, num_images = _sample(work)
    if not num_images:
        raise ValueError(f"{work.data}: no image of split {work.split!r} passes the filters; see --min_side and so on")
    wanted = work.options.num_clusters or min(round(num_images**0.5), MAX_CLUSTERS)
    levels, points = list[Array](), features
    parents = list[Array]()
    while True:
        centroids = _balanced_centroids(points, min(wanted, len(points)), work.options.seed)
        if levels:
            parents.append(_nearest(points, centroids, 1)[:, 0])
        levels.append(centroids)
        points, wanted = centroids, len(centroids) // RATIO
        if wanted < MIN_CLUSTERS:
            break
    arrays = {f"parents_{level}": array.astype(np.int32) for level, array in enumerate(parents)}
    work.save("cluster", unit, {"centroids": levels[0], **arrays})


def num_levels(num_clusters: int) -> int:
    """Number of levels above `num_clusters` of the smallest clusters."""
    count = 0
    while (num_clusters := num_clusters // RATIO) >= MIN_CLUSTERS:
        count += 1
    return count


def _candidates(work: Work, shard: int) -> Array:
    """Rows of a shard that pass the filters and are no exact duplicates (n,)."""
    (reason,) = work.load("measure", shard, "reason")
    is_candidate = reason == 0
    is_candidate[dropped_rows(work, "exact", num_exact_units(work), shard)[0]] = False
    return np.flatnonzero(is_candidate)


def _sample(work: Work) -> tuple[Array, int]:
    """Features (n, D) float32 of images sampled evenly, and the number of all candidates."""
    num_read = min(work.num_shards, MAX_SAMPLED_SHARDS)
    counts = [len(_candidates(work, shard)) for shard in range(work.num_shards)]
    shards = [index * work.num_shards // num_read for index in range(num_read)]
    fraction = min(1.0, MAX_SAMPLE / max(1, sum(counts[shard] for shard in shards)))
    parts = []
    for shard in shards:
        rows = _candidates(work, shard)
        generator = np.random.default_rng((work.options.seed, shard))
        rows = np.sort(generator.choice(rows, round(fraction * len(rows)), replace=False)) if fraction < 1 else rows
        parts.append(work.load("measure", shard, "features")[0][rows].astype(np.float32))
    return np.concatenate(parts), sum(counts)


def _balanced_centroids(points: Array, num_clusters: int, seed: int) -> Array:
    """Centroids (clusters, D) float32 of length 1, spread by volume more than by density.

    k-means spends its clusters where points are dense. Here it runs again on the points nearest to each centroid, as
    many of each cluster, a few times; see section 3 of arXiv 2405.15613.
    """
    centroids = _k_means(points, num_clusters, seed)
    per_cluster = max(1, len(points) // (2 * num_clusters))
    for _ in range(NUM_RESAMPLINGS):
        similarities, labels = _similarity(points, centroids)
        order = np.lexsort([-similarities, labels])  # (n,) by cluster, the nearest first
        starts = np.searchsorted(labels[order], np.arange(num_clusters))
        rank = np.arange(len(points)) - starts[labels[order]]
        resampled = points[order[rank < per_cluster]]
        if len(resampled) <= num_clusters:
            break
        centroids = _k_means(resampled, num_clusters, seed)
    return centroids


def _k_means(points: Array, num_clusters: int, seed: int) -> Array:
    from sklearn.cluster import MiniBatchKMeans  # takes a second to import, which other stages need not wait for

    if num_clusters >= len(points):
        return points.astype(np.float32)
    found = MiniBatchKMeans(num_clusters, random_state=seed, n_init=1, batch_size=4096, compute_labels=False).fit(
        points
    )
    centroids = found.cluster_centers_.astype(np.float32)
    return centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-6)  # type: ignore[no-any-return]


def _similarity(points: Array, centroids: Array) -> tuple[Array, Array]:
    """Cosine (n,) of the points and the centroid nearest to each, and which it is (n,)."""
    labels = _nearest(points, centroids, 1)[:, 0]
    return np.einsum("nd,nd->n", points, centroids[labels]), labels


def _nearest(points: Array, centroids: Array, count: int) -> Array:
    """The centroids nearest to each point (n, count), the nearest first."""
    parts = [np.zeros((0, count), np.int64)]
    for start in range(0, len(points), CHUNK):
        similarities = points[start : start + CHUNK] @ centroids.T  # (chunk, clusters)
        chosen = np.argpartition(-similarities, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(similarities, chosen, axis=1), axis=1, kind="stable")
        parts.append(np.take_along_axis(chosen, order, axis=1))
    return np.concatenate(parts)


def assign_shard(work: Work, unit: int) -> None:
    """Write the images of a shard that pass and are no exact duplicates, in the order of their clusters.

    The columns are `row`, `priority` and `features`, of each image once for each of its nearest clusters; `starts`
    (clusters + 1,) where each cluster begins; and `nearest` (rows of the shard,) the nearest one, -1 of other images.
    """
    (centroids,) = work.load("cluster", 0, "centroids")
    rows = _candidates(work, unit)
    height, width, num_bytes = work.load("measure", unit, "height", "width", "num_bytes")  # (rows of the shard,)
    features = work.load("measure", unit, "features")[0][rows]  # (n, D)
    clusters = _nearest(features.astype(np.float32), centroids, min(CLUSTERS_PER_IMAGE, len(centroids)))  # (n, 2)
    order = np.argsort(clusters.ravel(), kind="stable")
    images = order // clusters.shape[1]  # of each entry
    nearest = np.full(len(height), -1, np.int32)
    nearest[rows] = clusters[:, 0]
    arrays = {
        "row": rows[images].astype(np.int32),
        "priority": priority(height, width, num_bytes)[rows[images]],
        "features": features[images],
        "starts": np.searchsorted(clusters.ravel()[order], np.arange(len(centroids) + 1)),
        "nearest": nearest,
    }
    work.save("assign", unit, arrays)
