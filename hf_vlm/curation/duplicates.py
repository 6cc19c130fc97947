"""Images that are there more than once: equal pixels by their digests, and near copies by features in clusters.

Of several copies the one of most pixels is kept; then that of most bytes, and then the first.
"""

from typing import Any

import numpy as np

from hf_vlm.curation.measure import NUM_BUCKETS
from hf_vlm.curation.work import Work, concatenate

__all__ = ["dropped_rows", "find_exact", "find_near", "greedy_duplicates", "num_exact_units", "num_near_units"]

Array = np.ndarray[Any, Any]

IMAGES_PER_UNIT = 2**18  # whose digests are compared in memory
MEMBERS_PER_UNIT = 2**16  # whose features are, if clusters were of equal size
BLOCK = 1024  # images compared with others at a time


# ---- exact


def num_exact_units(work: Work) -> int:
    """Number of units that the digests are divided into: a power of two."""
    num_images = sum(int(work.load("measure", shard, "bucket_starts")[0][-1]) for shard in range(work.num_shards))
    return min(NUM_BUCKETS, 1 << max(0, -(-num_images // IMAGES_PER_UNIT) - 1).bit_length())


def find_exact(work: Work, unit: int) -> None:
    """Write the images of some digests that have the pixels of another; see `_save_dropped`."""
    per_unit = NUM_BUCKETS // num_exact_units(work)
    parts = []
    for shard in range(work.num_shards):
        (starts,) = work.load("measure", shard, "bucket_starts")
        rows = slice(int(starts[unit * per_unit]), int(starts[(unit + 1) * per_unit]))
        columns = work.load("measure", shard, "sorted_digest", "sorted_priority", "order", rows=rows)
        parts.append([*columns, np.full(len(columns[0]), shard, np.int32)])
    digests, priorities, rows_, shards = concatenate(parts)
    order = np.lexsort([rows_, shards, -priorities, digests])
    digests, images = digests[order], np.stack([shards, rows_], axis=1)[order]  # (n, 2)
    is_first = np.diff(digests, prepend=digests[:1] + np.uint64(1)) != 0
    kept = np.maximum.accumulate(np.where(is_first, np.arange(len(digests)), 0))
    _save_dropped(work, "exact", unit, images[~is_first], images[kept[~is_first]])


# ---- near


def num_near_units(work: Work) -> int:
    """Number of units that the clusters are divided into."""
    starts = [work.load("assign", shard, "starts")[0] for shard in range(work.num_shards)]
    num_members, num_clusters = sum(int(start[-1]) for start in starts), len(starts[0]) - 1
    return min(num_clusters, max(1, -(-num_members // MEMBERS_PER_UNIT)))


def find_near(work: Work, unit: int) -> None:
    """Write the images of some clusters that are near duplicates of another; see `_save_dropped`."""
    num_units, parts, clusters = num_near_units(work), [], []
    for shard in range(work.num_shards):
        (starts,) = work.load("assign", shard, "starts")  # (clusters + 1,)
        num_clusters = len(starts) - 1
        first, stop = num_clusters * unit // num_units, num_clusters * (unit + 1) // num_units
        rows = slice(int(starts[first]), int(starts[stop]))
        columns = work.load("assign", shard, "features", "priority", "row", rows=rows)
        parts.append([*columns, np.full(len(columns[0]), shard, np.int32)])
        clusters.append(np.repeat(np.arange(first, stop), np.diff(starts[first : stop + 1])))
    features, priorities, rows_, shards = concatenate(parts)
    cluster = np.concatenate(clusters)
    order = np.lexsort([rows_, shards, -priorities, cluster])
    dropped, because = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for members in np.split(order, np.flatnonzero(np.diff(cluster[order])) + 1):
        copies = greedy_duplicates(features[members].astype(np.float32), work.options.min_similarity)
        dropped.append(members[copies >= 0])
        because.append(members[copies[copies >= 0]])
    images = np.stack([shards, rows_], axis=1)  # (n, 2)
    _save_dropped(work, "near", unit, images[np.concatenate(dropped)], images[np.concatenate(because)])


def greedy_duplicates(features: Array, min_similarity: float) -> Array:
    """For each row the earlier one of which it is a duplicate, -1 where it is kept: (n,) int64.

    Rows are taken in their order, and one is a duplicate if it is similar to a row that was kept. So what is dropped
    is similar to what stays, while groups of linked pairs would reach ever further.

    Args:
        features: (n, D) float32 of length 1, those to prefer first.
        min_similarity: Cosine from which on two are duplicates.
    """
    found = np.full(len(features), -1, np.int64)
    kept = np.zeros(0, np.int64)
    for start in range(0, len(features), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(features)))
        if len(kept):
            similarities = features[block] @ features[kept].T
            is_copy = similarities.max(axis=1) >= min_similarity
            found[block[is_copy]] = kept[similarities.argmax(axis=1)[is_copy]]
            block = block[~is_copy]
        is_close = np.triu(features[block] @ features[block].T >= min_similarity, k=1)
        for row in np.flatnonzero(is_close.any(axis=1)):
            if found[block[row]] < 0:
                copies = block[is_close[row]]
                found[copies[found[copies] < 0]] = block[row]
        kept = np.concatenate([kept, block[found[block] < 0]])
    return found


# ---- what is dropped, by shard


def _save_dropped(work: Work, stage: str, unit: int, dropped: Array, because: Array) -> None:
    """Write pairs of images (n, 2), as shard and row, in the order of the first.

    The columns are `row`, `because_shard`, `because_row`, and `starts` (shards + 1,) where each shard begins.
    """
    order = np.lexsort([dropped[:, 1], dropped[:, 0]])
    dropped, because = dropped[order], because[order]
    arrays = {"row": dropped[:, 1], "because_shard": because[:, 0], "because_row": because[:, 1]}
    arrays = {name: array.astype(np.int32) for name, array in arrays.items()}
    arrays["starts"] = np.searchsorted(dropped[:, 0], np.arange(work.num_shards + 1))
    work.save(stage, unit, arrays)


def dropped_rows(work: Work, stage: str, num_units: int, shard: int) -> list[Array]:
    """Rows of a shard that a stage drops (n,), and shard and row of what each is a copy of (n,), (n,).

    A row occurs once for each cluster in which it is a copy, and what it is a copy of may be one itself in another.
    """
    parts = []
    for unit in range(num_units):
        start, stop = work.load(stage, unit, "starts", rows=slice(shard, shard + 2))[0].tolist()
        parts.append(work.load(stage, unit, "row", "because_shard", "because_row", rows=slice(start, stop)))
    return concatenate(parts)
