"""Streams over what a generator yields, and over anything that can be read by position."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
from datasets.iterable_dataset import ExamplesIterable

__all__ = ["TableReader", "generated_stream", "indexed_stream"]

# Shards are what is shuffled over the whole source, so they are short: else a block of a folder sorted by class would
# hold one class alone. Their number divides by the usual numbers of ranks and workers.
SHARD_LENGTH = 8
SHARDS_DIVISOR = 64
MAX_SHARDS = 2**14  # more of them would make the start of an epoch slow


def generated_stream(
    generate: Callable[..., Iterator[tuple[int, dict[str, Any]]]], **kwargs: Any
) -> datasets.IterableDataset:
    """The examples that a generator yields as (position, example); lists among its arguments are shards.

    `IterableDataset.from_generator` does the same, and leaves a lock file in the cache each time.
    """
    return datasets.IterableDataset(ExamplesIterable(generate, kwargs))


def indexed_stream(
    read: Callable[[int], dict[str, Any]], num_examples: int, features: datasets.Features
) -> datasets.IterableDataset:
    """The examples `read(0)`, `read(1)`, ..., `read(num_examples - 1)`, in short contiguous shards.

    The stream counts and only then reads, so that resuming counts up to its position without reading what was seen.

    Args:
        read: Function from a position to its example, in the form in which the features are stored; it is pickled to
            workers.
        num_examples: Number of examples.
        features: Types of the columns.
    """
    num_shards = min(max(num_examples // SHARD_LENGTH // SHARDS_DIVISOR, 1) * SHARDS_DIVISOR, MAX_SHARDS)
    edges = [num_examples * shard // num_shards for shard in range(num_shards + 1)]
    shards = [(start, stop) for start, stop in itertools.pairwise(edges) if start < stop]
    positions = generated_stream(_count, shards=shards)
    return positions.map(read, input_columns=["position"], remove_columns=["position"], features=features)


@dataclass(frozen=True)
class TableReader:
    """Reads the rows of a table in memory."""

    table: pa.Table

    def __call__(self, position: int) -> dict[str, Any]:
        row: dict[str, Any] = self.table.slice(position, 1).to_pylist()[0]
        return row


def _count(shards: list[tuple[int, int]]) -> Iterator[tuple[int, dict[str, int]]]:
    for start, stop in shards:
        for position in range(start, stop):
            yield position, {"position": position}
