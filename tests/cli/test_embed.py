"""`hf-vlm embed` as a user types it."""

import json

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_vlm.cli.main import main
from hf_vlm.data.images import images_at
from hf_vlm.data.sources import open_source
from hf_vlm.features.embedding import embed_images
from hf_vlm.features.loading import load_frozen_encoder
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.viz.map_sheet import plot_feature_maps
from hf_vlm.viz.neighbor_sheet import plot_stored_neighbors


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    config = VLMViTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    VLMViTModel(config).save_pretrained(tmp_path / "run")
    VLMViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "run")
    return str(tmp_path / "run")


def test_features_and_both_pictures(run, tmp_path, capsys):
    path, neighbors, maps = (tmp_path / "out" / name for name in ("features.parquet", "neighbors.png", "maps.png"))
    words = ["embed", run, "--data", "scenes:easy", "--split", "test", "--num_examples", "12", "--batch_size", "5"]
    words += ["--save", str(path), "--neighbors", str(neighbors), "--maps", str(maps)]
    assert main([*words, "--num_queries", "2", "--num_neighbors", "3", "--pooling", "class", "--foreground"]) == 0
    printed = capsys.readouterr().out
    assert "12 images, 32 features each\n" in printed
    assert all(str(path) in printed for path in (path, neighbors, maps))

    source = open_source("scenes:easy", "test", num_samples=12)
    encoder, processor = load_frozen_encoder(run)
    dataset = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset.features["label"] == source.features["label"]
    assert dataset["label"] == [example["label"] for example in source]
    expected = embed_images(encoder, images_at(source, range(12)), processor, pooling="class")
    np.testing.assert_allclose(np.array(dataset["features"]), expected, atol=1e-5)
    known = json.loads(pq.read_schema(path).metadata[b"hf_vlm"])
    about = {"encoder": run, "data": "scenes:easy", "split": "test", "pooling": "class", "image_size": [32, 32]}
    assert {name: known[name] for name in about} == about
    with Image.open(neighbors) as picture:
        np.testing.assert_array_equal(picture, plot_stored_neighbors(path, source, [3, 9], num_neighbors=3))
    with Image.open(maps) as picture:
        shown = plot_feature_maps(encoder, images_at(source, [3, 9]), processor, foreground=True)
        np.testing.assert_array_equal(picture, shown)


def test_pictures_of_chosen_images_leave_nothing_else(run, tmp_path, capsys):
    neighbors, maps = tmp_path / "out" / "neighbors.png", tmp_path / "out" / "maps.png"
    words = ["embed", run, "--data", "scenes:easy", "--num_examples", "10", "--queries", "7, 2"]
    assert main([*words, "--neighbors", str(neighbors)]) == 0
    assert main([*words, "--maps", str(maps), "--patch", "1,2"]) == 0
    assert "Features:" not in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["maps.png", "neighbors.png"]
    encoder, processor = load_frozen_encoder(run)
    images = images_at(open_source("scenes:easy"), [7, 2])
    with Image.open(maps) as picture:
        np.testing.assert_array_equal(picture, plot_feature_maps(encoder, images, processor, patch=(1, 2)))


def test_maps_alone_show_the_first_images_that_can_be_read(run, tmp_path):
    generator = np.random.default_rng(0)
    for index in range(150):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{index:03d}.png")
    (tmp_path / "001.png").write_bytes(b"no image")
    maps = tmp_path / "out" / "maps.png"
    assert main(["embed", run, "--data", str(tmp_path), "--maps", str(maps), "--num_queries", "2"]) == 0
    encoder, processor = load_frozen_encoder(run)
    with Image.open(maps) as picture:
        images = [np.asarray(Image.open(tmp_path / f"{index:03d}.png")) for index in (0, 2)]
        np.testing.assert_array_equal(picture, plot_feature_maps(encoder, images, processor))


def test_skipped_images_are_counted_and_features_are_written_by_default(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 30)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    assert main(["embed", run, "--data", "images", "--max_bad_fraction", "0.5"]) == 0
    assert "1 images, 32 features each; 1 could not be read and were skipped" in capsys.readouterr().out
    assert pq.read_table("features.parquet")["path"].to_pylist() == ["images/a.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--data", "scenes", "--split", "trian"], "trian"),
        (["--data", "scenes", "--pooling", "max"], "no pooling 'max'"),
        (["--data", "scenes", "--queries", "3,x"], "--queries 3,x: give numbers"),
        (["--data", "scenes", "--queries", "4", "--num_examples", "4"], "only 4 images are read"),
        (["--data", "images", "--neighbors", "n.png", "--queries", "0,2"], "no image 2 among the 2"),
        (["--data", "images", "--maps", "m.png", "--queries", "0,2"], "no image 2; the data ends before"),
        (["--data", "images", "--maps", "m.png", "--patch", "1"], "--patch: give a row and a column"),
        (["--data", "images", "--maps", "m.png", "--patch", "4,0"], "4 rows and 4 columns of patches"),
        (["--data", "images", "--maps", "maps"], "--maps maps: name a picture file, such as maps.png"),
        (
            ["--data", "images", "--neighbors", "n.txt"],
            "n.txt: name a picture file, such as neighbors.png",
        ),
        (["--data", "images", "--save", "images"], "images is a folder; name a file"),
        (["--data", "images", "--save", "file/features.parquet"], "file/features.parquet cannot be written"),
        (["--data", "images", "--batch_size", "0"], "--batch_size 0: it must be above 0"),
    ],
)
def test_what_a_user_mistypes_is_said_in_a_line(run, words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (20, 30)).save(tmp_path / "images" / f"{name}.png")
    assert main(["embed", run, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"run", "file", "images"}


def test_without_an_encoder_or_the_right_to_write_it_is_said(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert main(["embed", str(tmp_path), "--data", "scenes"]) == 2
    assert f"{tmp_path} holds no model" in capsys.readouterr().err
    assert main(["embed", "no/such/run", "--data", "scenes"]) == 2
    assert "There is no folder 'no/such/run'" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert main(["embed", run, "--data", "scenes"]) == 2
    assert "features.parquet cannot be written: you may not write into ." in capsys.readouterr().err
