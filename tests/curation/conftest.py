"""Shards with images that each show one reason to be dropped."""

import datasets
import numpy as np
import pytest
from curated_data import COPIES, OTHERS, encoded, picture
from sample_data import write_parquet


@pytest.fixture
def shards(tmp_path):
    """Three Parquet shards of twelve labelled images; see `curated_data` for what the rows are."""
    images = [picture(seed) for seed in range(36)]
    contents = [encoded(image) for image in images]
    for row, (original, copy) in COPIES.items():
        contents[row] = copy(images[original])
    for row, (_, content) in OTHERS.items():
        contents[row] = content
    features = {
        "image": datasets.Image(),
        "number": datasets.Value("int64"),
        "label": datasets.ClassLabel(names=["a", "b"]),
    }
    for shard, rows in enumerate(np.arange(36).reshape(3, 12).tolist()):
        columns = {
            "image": [{"bytes": contents[row], "path": f"{row}.png"} for row in rows],
            "number": rows,
            "label": [row % 2 for row in rows],
        }
        write_parquet(tmp_path / "data" / f"train-{shard}.parquet", columns, features)
    return tmp_path / "data"
