"""Streams over anything that can be read by position."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa

__all__ = ["TableReader", "indexed_stream"]

NUM_SHARDS = 64  # divides by the usual numbers of ranks and workers


def indexed_stream(
    read: Callable[[int], dict[str, Any]], num_examples: int, features: datasets.Features
) -> datasets.IterableDataset:
    """The examples `read(0)`, `read(1)`, and so on up to the number, in contiguous shards.

    The stream counts and only then reads, so that resuming counts up to its position without reading what was seen.

    Args:
        read: Gives the example at a position in the form in which the features are stored; it is pickled to workers.
    """
    edges = [num_examples * shard // NUM_SHARDS for shard in range(NUM_SHARDS + 1)]
    shards = [(start, stop) for start, stop in itertools.pairwise(edges) if start < stop]
    positions = datasets.IterableDataset.from_generator(_count, gen_kwargs={"shards": shards})
    return positions.map(read, input_columns=["position"], remove_columns=["position"], features=features)


@dataclass(frozen=True)
class TableReader:
    """Reads the rows of a table in memory."""

    table: pa.Table

    def __call__(self, position: int) -> dict[str, Any]:
        row: dict[str, Any] = self.table.slice(position, 1).to_pylist()[0]
        return row


def _count(shards: list[tuple[int, int]]) -> Iterator[dict[str, int]]:
    for start, stop in shards:
        for position in range(start, stop):
            yield {"position": position}
