"""Which images are kept: what the stages before have dropped, and a choice of the rest that is even over clusters."""

from typing import Any

import numpy as np

from hf_vlm.curation.clusters import num_levels
from hf_vlm.curation.duplicates import dropped_rows, num_exact_units, num_near_units
from hf_vlm.curation.measure import Reason
from hf_vlm.curation.work import Work

__all__ = ["balance", "decide_shard", "reasons_of", "split_evenly"]

Array = np.ndarray[Any, Any]


def decide_shard(work: Work, unit: int) -> None:
    """Write for each image of a shard the `reason` why it is dropped, 0 if it is not, and `because_shard` and
    `because_row` of the image that it is a copy of, -1 without one; and `counts` (clusters,) of images left.
    """
    (reason,) = work.load("measure", unit, "reason")
    because = np.full((2, len(reason)), -1, np.int32)
    stages = {"exact": (num_exact_units(work), Reason.EXACT), "near": (num_near_units(work), Reason.NEAR)}
    for stage, (num_units, number) in stages.items():
        rows, shards, others = dropped_rows(work, stage, num_units, unit)
        reason[rows] = number
        because[:, rows] = shards, others
    nearest, starts = work.load("assign", unit, "nearest", "starts")
    counts = np.bincount(nearest[reason == 0], minlength=len(starts) - 1)
    arrays = {"reason": reason, "because_shard": because[0], "because_row": because[1], "counts": counts}
    work.save("decide", unit, arrays)


def balance(work: Work, unit: int) -> None:
    """Write how many images of each cluster each shard keeps, `quotas` (shards, clusters), and their sums, `kept`.

    From the highest level down, the images to keep are divided evenly among the clusters, of which none gives more
    than it has. Within a cluster, shards give in proportion to what they have.
    """
    counts = np.stack([work.load("decide", shard, "counts")[0] for shard in range(work.num_shards)])
    totals, wanted = counts.sum(axis=0), work.options.num_images
    if wanted is None or wanted >= totals.sum():
        work.save("balance", unit, {"quotas": counts, "kept": counts.sum(axis=1)})
        return
    names = [f"parents_{level}" for level in range(num_levels(len(totals)))]
    parents = work.load("cluster", 0, *names)
    generator = np.random.default_rng(work.options.seed)
    kept = _divide(wanted, totals, parents, generator)
    # Cumulative rounding adds up to what each cluster keeps; its phase makes no shard gain by its position.
    phase = generator.integers(np.maximum(totals, 1))
    before = np.concatenate([np.zeros((1, len(totals)), np.int64), counts.cumsum(axis=0)])
    quotas = np.diff((kept * before + phase) // np.maximum(totals, 1), axis=0)
    work.save("balance", unit, {"quotas": quotas, "kept": quotas.sum(axis=1)})


def _divide(wanted: int, totals: Array, parents: list[Array], generator: np.random.Generator) -> Array:
    """How many images each of the smallest clusters keeps (clusters,), of those it has."""
    levels = [totals]  # (clusters,) images of each cluster, from the lowest level up
    for level_parents in parents:
        num_above = int(level_parents.max()) + 1
        levels.append(np.bincount(level_parents, levels[-1], num_above).astype(np.int64))
    kept = split_evenly(wanted, levels[-1], generator)
    for level, level_parents in zip(reversed(levels[:-1]), reversed(parents)):
        below = np.zeros(len(level), np.int64)
        for cluster, number in enumerate(kept):
            children = np.flatnonzero(level_parents == cluster)
            below[children] = split_evenly(int(number), level[children], generator)
        kept = below
    return kept


def split_evenly(wanted: int, available: Array, generator: np.random.Generator) -> Array:
    """Numbers (n,) that add up to `wanted`, as equal as they can be while none exceeds what is `available` (n,).

    What is left of equal parts is given to some at random.

    Raises:
        ValueError: There are not as many.
    """
    if wanted > available.sum():
        raise ValueError(f"{wanted} of {available.sum()} cannot be chosen")
    low, high = 0, int(available.max(initial=0))  # the largest equal part of which the sum is not above `wanted`
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(available, middle).sum() <= wanted else (low, middle - 1)
    parts = np.minimum(available, low)
    open_ = np.flatnonzero(available > low)
    parts[generator.permutation(open_)[: wanted - int(parts.sum())]] += 1
    return parts


def reasons_of(work: Work, shard: int) -> Array:
    """For each image of a shard why it is dropped (rows,), 0 if it is kept."""
    (reason,) = work.load("decide", shard, "reason")
    (quotas,) = work.load("balance", 0, "quotas", rows=slice(shard, shard + 1))
    (nearest,) = work.load("assign", shard, "nearest")
    left = np.random.default_rng((work.options.seed, shard)).permutation(np.flatnonzero(reason == 0))
    order = left[np.argsort(nearest[left], kind="stable")]  # by cluster, at random within
    clusters = nearest[order]
    rank = np.arange(len(order)) - np.searchsorted(clusters, clusters)
    reason[order[rank >= quotas[0][clusters]]] = Reason.BALANCE
    return reason
