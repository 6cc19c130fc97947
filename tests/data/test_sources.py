"""What all formats have in common: resuming, sharding, workers, guesses and messages."""

import json
import pickle
import shutil

import pytest
from sample_data import (
    make_coco,
    png,
    write_coco,
    write_detection_parquet,
    write_devkit,
    write_images,
    write_parquet,
    write_yolo,
)
from torch.utils.data import DataLoader

from hf_vlm.data.inspection.inspect import format_report, inspect_source
from hf_vlm.data.scenes.stream import scenes_source
from hf_vlm.data.sources import guess_format, open_source


@pytest.fixture
def folders(tmp_path):
    """A source of 20 examples of each local format."""
    write_images(tmp_path / "images", [f"{'xy'[row % 2]}/{row:02d}.png" for row in range(20)])
    write_detection_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    write_coco(tmp_path / "coco" / "annotations.json", tmp_path / "coco", num_images=20)
    return {"imagefolder": tmp_path / "images", "parquet": tmp_path / "parquet", "coco": tmp_path / "coco"}


FORMATS = ["imagefolder", "parquet", "coco", "scenes", "hub"]


def open_format(format, folders):
    if format == "scenes":
        return open_source("scenes", num_samples=20)
    # A folder of Parquet files opens as a dataset on the Hub does.
    return open_source(folders["parquet" if format == "hub" else format], format=format)


# Resuming, sharding and workers


@pytest.mark.parametrize("format", FORMATS)
def test_streams_resume_exactly_and_twice(format, folders):
    everything = list(open_format(format, folders))
    assert len(everything) == 20
    assert open_format(format, folders).num_examples == (None if format == "hub" else 20)
    for read in (iter, lambda stream: stream.iter(batch_size=1)):
        seen, state = [], None
        for stop in (3, 9, 15, 21):
            stream = pickle.loads(pickle.dumps(open_format(format, folders))).dataset
            if state is not None:
                stream.load_state_dict(json.loads(json.dumps(state)))
            for example in read(stream):
                seen.append(example["image_id"][0] if isinstance(example["image_id"], list) else example["image_id"])
                state = stream.state_dict()
                if len(seen) == stop:
                    break
        assert seen == [example["image_id"] for example in everything]


@pytest.mark.parametrize(("format", "expected"), [*zip(FORMATS, (None, 3, 3, 2, None), strict=True)])
def test_the_largest_number_of_objects_is_known_without_reading_images(format, expected, folders):
    source = open_format(format, folders)
    assert source.max_objects == expected
    if expected:
        assert max(len(example["objects"]["bbox"]) for example in source) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_mapped_and_filtered_streams_resume_exactly(format, folders):
    def build():
        stream = open_format(format, folders).unlabelled().dataset
        stream = stream.map(lambda example: {"twice": 2 * example["image_id"]})
        return stream.filter(lambda example: example["twice"] % 4 == 0)

    everything = [example["twice"] for example in build()]
    stream = build()
    iterator = iter(stream)
    seen = [next(iterator)["twice"] for _ in range(5)]
    resumed = build()
    resumed.load_state_dict(stream.state_dict())
    assert seen + [example["twice"] for example in resumed] == everything
    assert len(everything) == 10


@pytest.mark.parametrize("format", ["imagefolder", "parquet", "coco", "scenes"])
def test_shards_divide_the_stream(format, folders):
    stream = open_format(format, folders).dataset
    assert stream.num_shards >= 3
    parts = [[example["image_id"] for example in stream.shard(num_shards=2, index=index)] for index in range(2)]
    assert all(parts)
    assert sorted(parts[0] + parts[1]) == sorted(example["image_id"] for example in stream)


@pytest.mark.parametrize("format", ["parquet", "coco"])
def test_streams_serve_data_workers(format, folders):
    stream = open_format(format, folders).unlabelled().dataset
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(example["image_id"] for example in loader) == sorted(example["image_id"] for example in stream)


@pytest.mark.parametrize("format", FORMATS)
def test_num_samples_are_the_first(format, folders):
    whole = [example["image_id"] for example in open_format(format, folders)]
    source = {"scenes": "scenes", "hub": folders["parquet"]}.get(format) or folders[format]
    few = open_source(source, format=format, num_samples=9)
    assert [example["image_id"] for example in few] == whole[:9]
    with pytest.raises(ValueError, match="num_samples=0 must be positive"):
        open_source(source, format=format, num_samples=0)


def test_unlabelled_keeps_the_images(folders):
    for format in FORMATS:
        source = open_format(format, folders).unlabelled()
        assert set(next(iter(source))) == set(source.features) == {"image", "image_id"}
        assert source.object_names is None
        assert source.label_names is None
        assert source.mask_names is None


def test_the_format_is_guessed(folders, tmp_path):
    for format, folder in folders.items():
        assert guess_format(folder) == guess_format(str(folder)) == format
    assert guess_format(folders["parquet"] / "train-00000-of-00001.parquet") == "parquet"
    assert guess_format(folders["coco"] / "annotations.json") == "coco"
    assert guess_format("scenes") == guess_format("scenes:hard") == "scenes"
    assert guess_format("cifar10") == guess_format("my-org/my_data.v2") == "hub"
    (tmp_path / "parquet" / "dataset_infos.json").write_text('{"categories": []}')
    assert guess_format(tmp_path / "parquet") == "parquet"


ANNOTATED = {
    "coco": lambda folder: write_coco(folder / "instances_train.json", folder, num_images=2),
    "voc": write_devkit,
    "yolo": write_yolo,
}


@pytest.mark.parametrize("format", ANNOTATED)
def test_annotations_beat_stray_files(format, tmp_path, caplog):
    """The features of our own `embed --save` in a labelled folder, and a tar of somebody."""
    ANNOTATED[format](tmp_path)
    write_parquet(tmp_path / "features.parquet", {"image_id": [0], "features": [[0.0]]})
    assert guess_format(tmp_path) == format
    assert not caplog.text
    write_parquet(tmp_path / "train.parquet", {"image": [png(0)]})
    (tmp_path / "backup.tar").touch()
    assert guess_format(tmp_path) == format
    assert f"is opened as {format}; what it also holds of parquet, webdataset is not read" in caplog.text
    assert open_source(tmp_path).object_names


def test_features_beside_images_are_no_data(tmp_path, caplog):
    write_images(tmp_path, ["cat/a.png", "dog/b.png"])
    write_parquet(tmp_path / "features.parquet", {"image_id": [0], "features": [[0.0]]})
    source = open_source(tmp_path)
    assert (source.format, source.label_names) == ("imagefolder", ["cat", "dog"])
    assert "1 file is no image and is not read, .parquet (1): features.parquet" in source.findings[0]
    for path in (tmp_path / "cat", tmp_path / "dog"):
        shutil.rmtree(path)
    assert guess_format(tmp_path) == "parquet"


def test_links_to_folders_are_followed(tmp_path):
    (tmp_path / "data").mkdir()
    write_yolo(tmp_path / "data")
    (tmp_path / "data" / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "data" / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    assert guess_format(tmp_path / "data") == "yolo"


def test_hidden_files_do_not_count(tmp_path):
    write_images(tmp_path, ["a.png"])
    for name in (".cache/x.parquet", ".ipynb_checkpoints/data.json", ".DS_Store.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"PAR1")
    assert open_source(tmp_path).format == "imagefolder"
    assert open_source(tmp_path).num_examples == 1


def test_annotations_of_other_tools_are_named(tmp_path):
    """labelme, VIA and CVAT for images, whose formats are none of ours."""
    write_images(tmp_path, ["a.png", "b.png"])
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text('{"shapes": [], "imagePath": "a.png"}')
    (tmp_path / "via_region_data.csv").write_text("filename,region_shape_attributes")
    (tmp_path / "annotations.xml").write_text("<annotations/>")
    source = open_source(tmp_path)
    assert source.format == "imagefolder"
    (finding,) = source.findings
    assert "4 files are no images and are not read, .json (2), .xml (1), .csv (1): a.json, annotations.xml" in finding
    assert finding in format_report(inspect_source(source))


def test_images_beside_parquet_are_named(tmp_path):
    write_detection_parquet(tmp_path / "train.parquet")
    write_images(tmp_path, ["assets/logo.png"])
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {"images": {"_type": "Image"}}}}')
    source = open_source(tmp_path)
    assert source.format == "parquet"
    assert "1 image files beside that are not read: logo.png" in source.findings[0]


def test_several_files_of_coco_are_read_or_named(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path / "annotations" / f"instances_{split}.json", tmp_path / split, num_images=2)
    write_coco(tmp_path / "annotations" / "captions_train.json", tmp_path / "train", num_images=2)
    (finding,) = open_source(tmp_path).findings
    assert finding.endswith("json files that are not read: captions_train.json")


def test_what_opening_warns_of_is_kept_with_the_source(tmp_path):
    write_coco(tmp_path / "a" / "instances_train.json", tmp_path / "a", make_coco(2, annotations=[]), num_images=2)
    source = open_source(tmp_path / "a")
    assert [finding.rpartition(" has ")[2] for finding in source.findings] == [
        "no annotations: its images are used without labels"
    ]
    assert open_source({tmp_path / "a": 1.0}).findings == source.findings
    assert open_source("scenes", num_samples=2).findings == ()


def test_scenes_by_name():
    for source, preset in (("scenes", "easy"), ("scenes:easy", "easy"), ("scenes:hard", "hard")):
        expected = next(iter(scenes_source(preset, "validation", object_masks=True)))
        assert next(iter(open_source(source, "val"))) == expected


def test_what_is_missing_in_a_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^data/imagse does not exist"):
        open_source("data/imagse")


def test_mistakes_in_the_source_are_named(tmp_path, folders):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=rf"does not exist; did you mean '{tmp_path}/images'\?"):
        open_source(tmp_path / "imagse")
    with pytest.raises(ValueError, match=r"/no/such/folder does not exist$"):
        open_source("/no/such/folder")
    with pytest.raises(ValueError, match=r"data\.parquet does not exist"):
        open_source("data.parquet")
    with pytest.raises(ValueError, match=r"notes\.txt is neither Parquet, a tar, a COCO json nor a data.yaml"):
        open_source(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"unknown format 'vok'; the formats are scenes, coco, .*hub"):
        open_source(folders["coco"], format="vok")
    with pytest.raises(ValueError, match=r"unknown preset of scenes 'hrad'; there are easy, hard"):
        open_source("scenes:hrad")
    with pytest.raises(ValueError, match=r"name and revision belong to datasets on the Hub"):
        open_source(folders["parquet"], revision="main")
    with pytest.raises(ValueError, match=r"has no split 'test'; it has train"):
        open_source(folders["parquet"], "test")


def test_home_folders_are_expanded(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders["imagefolder"].parent))
    assert len(list(open_source("~/images"))) == 20
    assert guess_format("~/coco") == "coco"
