"""Nearest neighbours among features, in memory or in a file of any length."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Neighbors",
    "evenly_spaced",
    "evenly_spaced_in_file",
    "feature_chunks",
    "find_neighbors",
    "nearest_rows",
    "search_file",
]

CHUNK_SIZE = 8192  # features compared at a time


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """Images and those most similar to them, the most similar first.

    Args:
        queries: n indices of images.
        indices: n lists of k indices.
        similarities: n lists of k cosine similarities.
    """

    queries: list[int]
    indices: list[list[int]]
    similarities: list[list[float]]


def find_neighbors(features: Tensor, queries: Sequence[int], *, num_neighbors: int = 8) -> Neighbors:
    """The images most similar to the queries, by the cosine similarity of their features (images, D).

    Args:
        queries: Rows of the features; an image is not its own neighbour.
        num_neighbors: Number of neighbours of each query; where there are fewer images, all others.

    Raises:
        ValueError: There is no such row, or num_neighbors is not positive.
    """
    rows = torch.from_numpy(_rows_of(queries, np.arange(len(features))))
    similarities, found = nearest_rows(features[rows], features.split(CHUNK_SIZE), num_neighbors, excluded=rows)
    return Neighbors(queries=list(queries), indices=found.tolist(), similarities=similarities.tolist())


def search_file(path: Path, queries: Sequence[int], *, num_neighbors: int = 8) -> Neighbors:
    """`find_neighbors` for the features in a file of `write_features`, which is read in chunks.

    Args:
        queries: Values of the column `index`.

    Raises:
        ValueError: No row has such an index, or num_neighbors is not positive.
    """
    with pq.ParquetFile(path) as file:
        indices = _indices(file)
        rows = torch.from_numpy(_rows_of(queries, indices))
        features = _rows(feature_chunks(file), rows)
        similarities, found = nearest_rows(features, feature_chunks(file), num_neighbors, excluded=rows)
    return Neighbors(queries=list(queries), indices=indices[found].tolist(), similarities=similarities.tolist())


def evenly_spaced_in_file(path: Path, num_chosen: int) -> list[int]:
    """The indices of `num_chosen` images of a file of `write_features`; see `evenly_spaced`."""
    with pq.ParquetFile(path) as file:
        indices = _indices(file)
    return [int(indices[row]) for row in evenly_spaced(len(indices), num_chosen)]


def nearest_rows(
    queries: Tensor,
    chunks: Iterable[Tensor],
    num_neighbors: int,
    *,
    excluded: Tensor | None = None,
    are_normalized: bool = False,
) -> tuple[Tensor, Tensor]:
    """The rows of a long matrix, given in chunks, with the highest cosine similarities to the queries.

    Args:
        queries: (n, D) features.
        chunks: Parts (rows, D) of the matrix, in their order.
        num_neighbors: Number k of rows to find for each query.
        excluded: (n,) row to leave out for each query.
        are_normalized: Whether rows are L2-normalised already, which saves a pass over them.

    Returns:
        Similarities (n, k), descending, and rows (n, k); fewer than k where there are fewer rows.

    Raises:
        ValueError: num_neighbors is not positive.
    """
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors is {num_neighbors}; at least one neighbour is needed.")
    queries = F.normalize(queries, dim=1)
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    first = 0
    for chunk in chunks:
        rows_of_chunk = chunk if are_normalized else F.normalize(chunk, dim=1)
        similarities = queries @ rows_of_chunk.T  # (n, rows of the chunk)
        numbers = torch.arange(first, first + len(chunk))
        if excluded is not None:
            similarities[numbers == excluded[:, None]] = -torch.inf
        joined = torch.cat([best, similarities], dim=1)
        best, columns = joined.topk(min(num_neighbors, joined.shape[1]), dim=1)
        rows = torch.cat([rows, numbers.expand(len(queries), -1)], dim=1).gather(1, columns)
        first += len(chunk)
    num_found = min(num_neighbors, first - (excluded is not None))
    return best[:, :num_found], rows[:, :num_found]


def evenly_spaced(num_images: int, num_chosen: int) -> list[int]:
    """Positions of `num_chosen` images, or of all where there are fewer: the middles of equal segments.

    Raises:
        ValueError: num_chosen is not positive.
    """
    if num_chosen < 1:
        raise ValueError(f"{num_chosen} images are to be shown; at least one is needed.")
    num_chosen = min(num_chosen, num_images)
    return [(2 * segment + 1) * num_images // (2 * num_chosen) for segment in range(num_chosen)]


def _rows_of(queries: Sequence[int], indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The row of each query among ascending indices."""
    rows = np.searchsorted(indices, queries)
    unknown = [query for query, row in zip(queries, rows) if row == len(indices) or indices[row] != query]
    if unknown:
        raise ValueError(
            f"queries: there is no image {', '.join(map(str, unknown))} among the {len(indices)} that were read, "
            f"which have the indices {indices[0]} to {indices[-1]}; images that cannot be read are left out."
        )
    return rows


def _indices(file: pq.ParquetFile) -> np.ndarray[Any, Any]:
    return file.read(columns=["index"]).column("index").to_numpy()  # type: ignore[no-any-return]  # 8 bytes per image


def feature_chunks(file: pq.ParquetFile) -> Iterator[Tensor]:
    """The features (rows, D) of each row group: batches over all groups would keep the whole file in memory."""
    for group in range(file.num_row_groups):
        column = file.read_row_group(group, columns=["features"]).column("features").combine_chunks()
        values = column.flatten().to_numpy()
        yield torch.tensor(values.reshape(len(column), -1))


def _rows(chunks: Iterable[Tensor], rows: Tensor) -> Tensor:
    """Some rows of a matrix that is given in chunks."""
    found: dict[int, Tensor] = {}
    first = 0
    for chunk in chunks:
        found |= {row: chunk[row - first].clone() for row in rows.tolist() if first <= row < first + len(chunk)}
        first += len(chunk)
    return torch.stack([found[row] for row in rows.tolist()])
