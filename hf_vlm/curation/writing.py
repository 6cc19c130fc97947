"""The images that are kept as shards of equal length, in the format and with all columns of those that were read."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hf_vlm.curation.selection import reasons_of
from hf_vlm.curation.shards import SUFFIXES, copy_rows
from hf_vlm.curation.work import Work
from hf_vlm.data.formats.mask_classes import MASK_CLASSES_FILE
from hf_vlm.data.formats.webdataset_labels import CLASSES_FILE
from hf_vlm.data.io.durable import replace_text, replaced_file
from hf_vlm.data.io.files import as_path, exists, read_bytes

__all__ = ["num_written", "shard_path", "write_shard"]

Array = np.ndarray[Any, Any]


def num_written(work: Work) -> int:
    """Number of shards to write: a power of two, which usual numbers of ranks and data workers divide."""
    num_kept = int(work.load("balance", 0, "kept")[0].sum())
    num_needed = -(-num_kept // work.options.images_per_shard)
    return min(1 << (num_needed - 1).bit_length(), max(1, num_kept))


def shard_path(work: Work, unit: int) -> Path:
    """Path of a shard, which is there once it is whole."""
    return work.folder / f"{work.split}-{unit:05d}-of-{num_written(work):05d}{SUFFIXES[work.format]}"


def write_shard(work: Work, unit: int) -> None:
    """Write a shard: as many of the images that are kept, in their order, as each of the others, or one more."""
    (counts,) = work.load("balance", 0, "kept")  # (shards,)
    edges = np.concatenate([[0], counts.cumsum()])
    num_shards = num_written(work)
    first, stop = (int(edges[-1]) * position // num_shards for position in (unit, unit + 1))
    sources = range(int(np.searchsorted(edges, first, "right")) - 1, int(np.searchsorted(edges, stop)))

    def parts() -> Iterator[tuple[str, Array]]:
        for shard in sources:
            kept = np.flatnonzero(reasons_of(work, shard) == 0)
            rows = kept[max(first - edges[shard], 0) : stop - edges[shard]]
            if len(rows):
                yield work.shards[shard], rows

    with replaced_file(shard_path(work, unit)) as file:
        copy_rows(parts(), work.format, file)
    if unit == 0:
        _copy_class_names(work)


def _copy_class_names(work: Work) -> None:
    """The files that name classes, which lie beside tars or in the folder above them."""
    beside = as_path(work.shards[0]).parent
    for name, folder in itertools.product((CLASSES_FILE, MASK_CLASSES_FILE), (beside.parent, beside)):
        if exists(folder / name):
            replace_text(work.folder / name, read_bytes(folder / name).decode("utf-8-sig"))
