"""Features of a stream in Parquet: values, columns, metadata, and files that are whole or not there."""

import io
import json
import os
import signal
import sys
import textwrap

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_vlm.data.io.indexed import generated_stream
from hf_vlm.data.source import Source
from hf_vlm.data.sources import open_source
from hf_vlm.features.extraction import encode, eval_transform_for, write_features
from hf_vlm.features.loading import load_frozen_encoder
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

ENCODER = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

CLASSES = ["cat", "dog"]


def make_encoder(**changes):
    torch.manual_seed(0)
    return VLMViTModel(VLMViTConfig(**ENCODER | changes))


@pytest.fixture
def processor():
    return VLMViTImageProcessor(size={"height": 32, "width": 48})


@pytest.fixture
def bicubic():
    """An image processor as that of a converted encoder."""
    return VLMViTImageProcessor(
        size={"height": 32, "width": 48},
        resample=3,
        rescale_factor=1 / 127.5,
        image_mean=[1.0] * 3,
        image_std=[1.0] * 3,
    )


@pytest.fixture
def folder(tmp_path):
    """Ten images of two classes, the third of which is none."""
    generator = np.random.default_rng(0)
    for index in range(10):
        path = tmp_path / "images" / CLASSES[index // 5] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "cat" / "2.png").write_bytes(b"no image")
    return tmp_path / "images"


def read(path, tmp_path):
    return datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))


def test_pooled_features_are_those_of_a_direct_forward():
    encoder = make_encoder(num_register_tokens=3).train()
    images = torch.randn(5, 3, 32, 48)
    tokens = encoder.eval()(images).last_hidden_state.detach()
    encoder.train()
    torch.testing.assert_close(encode(encoder, images), tokens[:, 4:].mean(1))
    torch.testing.assert_close(encode(encoder, images, pooling="class"), tokens[:, 0])
    both = torch.cat([tokens[:, 0], tokens[:, 4:].mean(1)], dim=1)
    torch.testing.assert_close(encode(encoder, images, pooling="both"), both)
    assert encoder.training
    with pytest.raises(ValueError, match="no pooling 'max'"):
        encode(encoder, images, pooling="max")
    with pytest.raises(ValueError, match="no class token"):
        encode(make_encoder(use_class_token=False), images, pooling="class")


def test_rows_are_the_images_that_can_be_read_with_names_and_labels(folder, processor, tmp_path, caplog):
    encoder, path = make_encoder(), tmp_path / "features.parquet"
    found = write_features(path, encoder, processor, open_source(folder), batch_size=4, max_bad_fraction=0.1)
    assert found == (9, 1)
    assert "2.png" in caplog.text
    dataset = read(path, tmp_path)
    names = [f"{CLASSES[index // 5]}/{index}.png" for index in range(10) if index != 2]
    assert dataset["index"] == dataset["image_id"] == [0, 1, *range(3, 10)]
    assert dataset["path"] == [str(folder / name) for name in names]
    assert dataset.features["label"] == datasets.ClassLabel(names=["cat", "dog"])
    assert dataset["label"] == [0] * 4 + [1] * 5
    assert dataset.features["features"] == datasets.List(datasets.Value("float32"), length=32)
    pixels = processor([Image.open(folder / name) for name in names], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = encoder.eval()(pixels).last_hidden_state[:, 1:].mean(1)
    np.testing.assert_allclose(np.array(dataset["features"]), expected, atol=1e-5)
    with pytest.raises(ValueError, match="1 of 10 images could not be decoded"):
        write_features(tmp_path / "other.parquet", encoder, processor, open_source(folder))


def test_both_kinds_of_features_are_written(processor, tmp_path):
    encoder, source = make_encoder(), open_source("scenes:easy", num_samples=2)
    write_features(tmp_path / "both.parquet", encoder, processor, source, pooling="both")
    found = np.array(datasets.load_dataset("parquet", data_files=str(tmp_path / "both.parquet"))["train"]["features"])
    for pooling, part in (("class", found[:, :32]), ("mean", found[:, 32:])):
        write_features(tmp_path / f"{pooling}.parquet", encoder, processor, source, pooling=pooling)
        expected = pq.read_table(tmp_path / f"{pooling}.parquet")["features"].to_pylist()
        np.testing.assert_allclose(part, expected, atol=1e-5)


def test_the_file_says_which_encoder_made_it(processor, tmp_path):
    source, path = open_source("scenes:easy", num_samples=2), tmp_path / "features.parquet"
    known = []
    for seed_of_change in (0.0, 0.0, 0.01):
        encoder = make_encoder()
        encoder.norm.bias.data += seed_of_change
        write_features(path, encoder, processor, source, pooling="class", about={"encoder": "runs/mae"})
        known.append(json.loads(pq.read_schema(path).metadata[b"hf_vlm"]))
    assert known[0] == known[1]
    assert known[0]["encoder_fingerprint"] != known[2]["encoder_fingerprint"]
    assert (known[0]["encoder"], known[0]["pooling"]) == ("runs/mae", "class")
    assert (known[0]["image_size"], known[0]["patch_size"]) == ([32, 48], [8, 8])
    assert read(path, tmp_path)["path"] == [None, None]  # scenes have no names


def test_a_source_without_labels_and_behind_a_url(processor, tmp_path):
    scenes = list(open_source("scenes:easy", num_samples=3))
    file_system = fsspec.filesystem("memory")
    try:
        with file_system.open("/photos.parquet", "wb") as file:
            datasets.Dataset.from_list([{"image": scene["image"]["bytes"]} for scene in scenes]).to_parquet(file)
        path = tmp_path / "features.parquet"
        write_features(path, make_encoder(), processor, open_source("memory://photos.parquet"))
    finally:
        file_system.rm("/", recursive=True)
    write_features(tmp_path / "scenes.parquet", make_encoder(), processor, open_source("scenes:easy", num_samples=3))
    found, expected = pq.read_table(path), pq.read_table(tmp_path / "scenes.parquet")
    assert found.column_names == ["index", "image_id", "path", "features"]
    assert found["features"] == expected["features"]


def counted_stream(num_images, on_image):
    """Scenes that call a function with their position before they are given."""
    scene = next(iter(open_source("scenes:easy", num_samples=1)))
    features = datasets.Features({"image": datasets.Image(decode=False), "image_id": datasets.Value("int64")})

    def generate():
        for index in range(num_images):
            on_image(index)
            yield index, {"image": scene["image"], "image_id": index}

    stream = generated_stream(generate)
    return Source(dataset=stream.cast(features) if stream.features is None else stream)


@pytest.mark.parametrize("name", ["processor", "bicubic"])
def test_images_are_prepared_as_the_processor_does(request, name):
    processor, transform_of = (
        request.getfixturevalue(name),
        eval_transform_for(request.getfixturevalue(name)),
    )
    for example in open_source("scenes:easy", num_samples=3):
        prepared = transform_of(example, np.random.default_rng(0))
        expected = processor(Image.open(io.BytesIO(example["image"]["bytes"])), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(prepared["pixel_values"], expected, atol=0.02, rtol=0)  # a level
        assert prepared["label"] == example["label"]


def test_rows_leave_the_memory_in_groups(processor, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_vlm.features.extraction.ROWS_PER_GROUP", 8)
    sizes = {}

    def note_size(index):
        sizes[index] = sum(path.stat().st_size for path in tmp_path.glob("features*.tmp"))

    path = tmp_path / "features.parquet"
    encoder = make_encoder(hidden_size=512, intermediate_size=8)  # a group is more than the file's own buffer
    write_features(path, encoder, processor, counted_stream(43, note_size), batch_size=3)
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [9, 9, 9, 9, 7]
    assert sizes[3] < sizes[20] < sizes[40]  # while the source is read
    assert pq.read_table(path)["index"].to_pylist() == list(range(43))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_stops_in_the_middle_leaves_no_file(processor, tmp_path, error, monkeypatch):
    monkeypatch.setattr("hf_vlm.features.extraction.ROWS_PER_GROUP", 4)

    def fail(index):
        if index == 20:
            assert list(tmp_path.iterdir())
            raise error("enough")

    with pytest.raises(error, match="enough"):
        write_features(
            tmp_path / "features.parquet", make_encoder(), processor, counted_stream(30, fail), batch_size=2
        )
    assert not list(tmp_path.iterdir())


def test_a_file_from_before_outlives_a_failure(folder, processor, tmp_path):
    path = tmp_path / "features.parquet"
    write_features(path, make_encoder(), processor, open_source("scenes:easy", num_samples=2))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="could not be decoded"):
        write_features(path, make_encoder(), processor, open_source(folder))
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_nothing_under_the_name(tmp_path, fork_server):
    program = """
        import os, signal, sys
        from pathlib import Path
        from hf_vlm.data.scenes.stream import scenes_source
        from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
        from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
        from hf_vlm.models.modeling_vlm_vit import VLMViTModel
        from hf_vlm.features import extraction
        extraction.ROWS_PER_GROUP = 4
        groups = []
        def write_group(writer, batches, usual=extraction._write_group):
            groups.append(usual(writer, batches))
            if len(groups) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return groups[-1]
        extraction._write_group = write_group
        encoder = VLMViTModel(VLMViTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1,
                                           num_attention_heads=2))
        processor = VLMViTImageProcessor(size={"height": 32, "width": 32})
        extraction.write_features(Path("features.parquet"), encoder, processor, scenes_source(num_samples=50),
                                batch_size=4)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = fork_server.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["features.parquet.tmp"]


def test_what_cannot_be_written_is_said(processor, tmp_path):
    (tmp_path / "file").touch()
    source = open_source("scenes:easy", num_samples=2)
    with pytest.raises(ValueError, match=r"file/features\.parquet cannot be written"):
        write_features(tmp_path / "file" / "features.parquet", make_encoder(), processor, source)
    broken = make_encoder()
    broken.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="image at index 0 are not finite"):
        write_features(tmp_path / "features.parquet", broken, processor, source)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_encoder_is_loaded_also_out_of_a_detector(processor, tmp_path):
    torch.manual_seed(0)
    detector = VLMViTForObjectDetection(VLMViTDetectionConfig(backbone_config=ENCODER, num_labels=2, hidden_size=32))
    detector.save_pretrained(tmp_path / "detector")
    processor.save_pretrained(tmp_path / "detector")
    encoder, found = load_frozen_encoder(tmp_path / "detector")
    assert (found.size["height"], found.size["width"]) == (32, 48)
    weights = encoder.state_dict()
    expected = detector.backbone.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_what_is_no_encoder_is_refused(processor, tmp_path):
    with pytest.raises(ValueError, match=r"holds no model: there is no config\.json"):
        load_frozen_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="cannot be loaded: Error no file named model"):
        load_frozen_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ValueError, match="but one of type 'resnet'"):
        load_frozen_encoder(tmp_path)
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no encoder"):  # without its image processor
        load_frozen_encoder(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = {name: weight for name, weight in encoder.state_dict().items() if not name.startswith("layers.1.mlp")}
    encoder.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks 4 of the encoder's weights, such as layers\.1\.mlp"):
        load_frozen_encoder(tmp_path)
