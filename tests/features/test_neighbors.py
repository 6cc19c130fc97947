"""Nearest neighbours against a full sort in float64."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_vlm.features.neighbors import (
    evenly_spaced,
    evenly_spaced_in_file,
    find_neighbors,
    nearest_rows,
    search_file,
)


def features_of(num_images=137, width=24):
    return torch.randn(num_images, width, generator=torch.Generator().manual_seed(0))


def sorted_rows(features, query):
    """Rows by falling cosine similarity to one of them, without itself, and the similarities."""
    values = features.numpy().astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    similarities = values @ values[query]
    order = np.argsort(-similarities)
    order = order[order != query]
    return order, similarities[order]


def write_file(path, features, indices, rows_per_group=20):
    column = pa.FixedSizeListArray.from_arrays(features.numpy().ravel(), features.shape[1])
    pq.write_table(pa.table({"index": indices, "features": column}), path, row_group_size=rows_per_group)


@pytest.mark.parametrize("chunk_size", [1, 5, 50, 1000])
def test_the_search_in_chunks_is_a_full_sort(monkeypatch, chunk_size):
    monkeypatch.setattr("hf_vlm.features.neighbors.CHUNK_SIZE", chunk_size)
    features = features_of()
    found = find_neighbors(features, [0, 60, 136], num_neighbors=10)
    assert found.queries == [0, 60, 136]
    for query, indices, similarities in zip(found.queries, found.indices, found.similarities, strict=True):
        rows, expected = sorted_rows(features, query)
        assert indices == rows[:10].tolist()
        np.testing.assert_allclose(similarities, expected[:10], atol=1e-6)


def test_a_file_is_searched_by_index(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_vlm.features.neighbors.CHUNK_SIZE", 16)
    features = features_of()
    indices = np.arange(137) * 3 + 5  # as where images in between cannot be read
    write_file(tmp_path / "features.parquet", features, indices)
    found = search_file(tmp_path / "features.parquet", [5, 3 * 77 + 5], num_neighbors=4)
    for row, neighbors, similarities in zip([0, 77], found.indices, found.similarities, strict=True):
        rows, expected = sorted_rows(features, row)
        assert neighbors == (rows[:4] * 3 + 5).tolist()
        np.testing.assert_allclose(similarities, expected[:4], atol=1e-6)
    assert evenly_spaced_in_file(tmp_path / "features.parquet", 2) == [34 * 3 + 5, 102 * 3 + 5]


def test_a_file_is_not_held_in_memory(tmp_path, monkeypatch):
    path = tmp_path / "features.parquet"
    write_file(path, features_of(40_000, 64), np.arange(40_000), rows_per_group=1000)
    before, held = pa.total_allocated_bytes(), []

    def noted(queries, chunks, *args, **kwargs):
        def watched():
            for chunk in chunks:
                held.append(pa.total_allocated_bytes() - before)
                yield chunk

        return nearest_rows(queries, watched(), *args, **kwargs)

    monkeypatch.setattr("hf_vlm.features.neighbors.nearest_rows", noted)
    search_file(path, [0], num_neighbors=4)
    assert len(held) == 40
    assert max(held) < 0.2 * path.stat().st_size


def test_rows_may_be_excluded_or_not_and_be_few():
    features = features_of(4)
    similarities, rows = nearest_rows(features[:2], features.split(3), 9)
    assert rows[:, 0].tolist() == [0, 1]
    torch.testing.assert_close(similarities[:, 0], torch.ones(2))
    assert sorted(rows[1].tolist()) == [0, 1, 2, 3]
    found = find_neighbors(features, [1], num_neighbors=9)
    assert sorted(found.indices[0]) == [0, 2, 3]
    assert find_neighbors(features[:1], [0]).indices == [[]]


def test_a_copy_of_the_query_is_its_first_neighbor():
    features = features_of(50)
    features[20] = 3 * features[7]
    found = find_neighbors(features, [7], num_neighbors=2)
    assert found.indices[0][0] == 20
    assert found.similarities[0][0] == pytest.approx(1)


def test_evenly_spaced_images_are_the_middles_of_equal_parts():
    assert evenly_spaced(100, 4) == [12, 37, 62, 87]
    assert evenly_spaced(3, 8) == [0, 1, 2]
    assert evenly_spaced(1, 1) == [0]


def test_what_cannot_be_searched_is_said(tmp_path):
    features = features_of(5)
    write_file(tmp_path / "features.parquet", features, np.array([0, 1, 3, 4, 5]))
    with pytest.raises(ValueError, match=r"no image 2, 9 among the 5 that were read, which have the indices 0 to 5"):
        search_file(tmp_path / "features.parquet", [0, 2, 9])
    with pytest.raises(ValueError, match="no image -1"):
        find_neighbors(features, [-1])
    with pytest.raises(ValueError, match="num_neighbors is 0"):
        find_neighbors(features, [0], num_neighbors=0)
    with pytest.raises(ValueError, match="at least one"):
        evenly_spaced(10, 0)
