"""Streams over what can be read by position."""

import datasets
import numpy as np
import pytest

from hf_vlm.data.io.indexed import MAX_SHARDS, indexed_stream
from hf_vlm.data.stream import ExampleStream

FEATURES = datasets.Features({"image_id": datasets.Value("int64")})


def read(position):
    return {"image_id": position}


@pytest.mark.parametrize("num_examples", [1, 7, 63, 64, 65, 511, 5000])
def test_every_example_in_order(num_examples):
    stream = indexed_stream(read, num_examples, FEATURES)
    assert [example["image_id"] for example in stream] == list(range(num_examples))


def test_a_block_of_a_sorted_folder_holds_most_classes():
    """10,000 images of 50 classes, one class after the other: what is shuffled together must not be one class."""
    stream = ExampleStream(indexed_stream(read, 10_000, FEATURES), lambda example, generator: example, block_size=512)
    examples = iter(stream)
    classes = np.array([next(examples)["image_id"] // 200 for _ in range(512)])
    counts = np.bincount(classes, minlength=50)
    assert np.count_nonzero(counts) > 30
    assert counts.max() < 0.1 * 512


def test_shards_are_bounded_and_divide_by_the_usual_numbers():
    assert indexed_stream(read, 10_000_000, FEATURES).num_shards == MAX_SHARDS
    for num_examples in (600, 1000, 12345):
        assert indexed_stream(read, num_examples, FEATURES).num_shards % 64 == 0
