"""Features and pictures from Python: the same for paths, Pillow images and arrays, and as from a stream."""

import io

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_vlm.data.images import first_images, images_at
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.sources import open_source
from hf_vlm.features.embedding import embed_images
from hf_vlm.features.extraction import encode, write_features
from hf_vlm.features.maps import feature_maps
from hf_vlm.features.neighbors import find_neighbors
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.viz.map_sheet import map_sheet, plot_feature_maps
from hf_vlm.viz.neighbor_sheet import neighbor_sheet, plot_neighbors, plot_stored_neighbors

NUM_IMAGES = 7


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    config = VLMViTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    return VLMViTModel(config)


@pytest.fixture
def processor():
    return VLMViTImageProcessor(size={"height": 32, "width": 48})


@pytest.fixture
def source():
    return open_source("scenes:easy", num_samples=NUM_IMAGES)


@pytest.fixture
def arrays(source):
    return [decode_image(example["image"])[0] for example in source]


def test_features_do_not_depend_on_where_images_come_from(encoder, processor, source, arrays, tmp_path):
    for index, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{index}.png")
    pixels = processor([Image.fromarray(array) for array in arrays], return_tensors="pt")["pixel_values"]
    expected = encode(encoder, pixels, pooling="class")
    for images in (arrays, tmp_path, [Image.fromarray(array) for array in arrays], str(tmp_path / "*.png")):
        found = embed_images(encoder, images, processor, pooling="class", batch_size=3)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        embed_images(encoder, arrays[0], processor, pooling="class"), expected[:1], atol=1e-5, rtol=1e-4
    )
    assert embed_images(encoder, [], processor).shape == (0, 32)
    path = tmp_path / "features.parquet"
    write_features(path, encoder, processor, source, pooling="class")
    stored = np.array(pq.read_table(path)["features"].to_pylist())
    np.testing.assert_allclose(stored, expected, atol=1e-5)
    with pytest.raises(ValueError, match="no images at"):
        embed_images(encoder, tmp_path / "nowhere", processor)


def test_neighbors_in_memory_and_in_a_file_are_drawn_alike(encoder, processor, source, arrays, tmp_path):
    path = tmp_path / "features.parquet"
    write_features(path, encoder, processor, source)
    labels, names = [example["label"] for example in source], source.features["label"].names
    neighbors = find_neighbors(embed_images(encoder, arrays, processor), [1, 4], num_neighbors=3)
    expected = neighbor_sheet(neighbors, dict(enumerate(arrays)), labels=dict(enumerate(labels)), class_names=names)
    found = plot_neighbors(
        encoder, arrays, processor, queries=[1, 4], num_neighbors=3, labels=labels, class_names=names
    )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(plot_stored_neighbors(path, source, [1, 4], num_neighbors=3), expected)
    everything = plot_neighbors(encoder, arrays, processor)
    assert everything.height > 6 * 128  # a row each: there are fewer than 8 images
    with pytest.raises(ValueError, match="7 images and 2 labels"):
        plot_neighbors(encoder, arrays, processor, labels=[0, 1])
    with pytest.raises(ValueError, match="no image 7"):
        plot_stored_neighbors(path, source, [7])


def test_neighbors_are_the_right_images_where_others_cannot_be_read(encoder, processor, arrays, tmp_path):
    rows = [{"image": b"no image" if index in (0, 3) else encoded(array)} for index, array in enumerate(arrays)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "images.parquet")
    source = open_source(tmp_path / "images.parquet")
    path = tmp_path / "features.parquet"
    assert write_features(path, encoder, processor, source, max_bad_fraction=0.5) == (5, 2)
    good = [1, 2, 4, 5, 6]
    features = embed_images(encoder, [arrays[index] for index in good], processor)
    found = find_neighbors(features, [2], num_neighbors=4)  # the image at index 4
    renamed = type(found)(
        queries=[4], indices=[[good[row] for row in found.indices[0]]], similarities=found.similarities
    )
    expected = neighbor_sheet(renamed, dict(enumerate(arrays)))
    np.testing.assert_array_equal(plot_stored_neighbors(path, source, [4], num_neighbors=4), expected)
    with pytest.raises(ValueError, match="no image 3 among the 5 that were read"):
        plot_stored_neighbors(path, source, [3])


def encoded(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_maps_are_those_of_the_images(encoder, processor, arrays):
    pixels = processor(arrays[:2], return_tensors="pt")["pixel_values"]
    for options in ({}, {"foreground": True}, {"patch": (1, 5)}):
        expected = map_sheet(arrays[:2], feature_maps(encoder, pixels, **options))
        np.testing.assert_array_equal(plot_feature_maps(encoder, arrays[:2], processor, **options), expected)
    with pytest.raises(ValueError, match="no image to plot"):
        plot_feature_maps(encoder, [], processor)


def test_images_are_found_by_position(source, arrays):
    found = images_at(source, [5, 0, 5])
    for image, index in zip(found, [5, 0, 5], strict=True):
        np.testing.assert_array_equal(image, arrays[index])
    np.testing.assert_array_equal(first_images(source, 3), arrays[:3])
    assert images_at(source, [2], num_channels=1)[0].shape == (*arrays[2].shape[:2], 1)
    assert len(first_images(source, 100)) == NUM_IMAGES
    with pytest.raises(ValueError, match="no image 7, 9; the data ends before"):
        images_at(source, [1, 7, 9])
