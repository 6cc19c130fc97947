import io
import json
import logging
import pickle

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.scenes.stream import scenes_source
from hf_vlm.data.schema import image_feature, objects_feature
from hf_vlm.data.sources import guess_format, open_source

WIDTH, HEIGHT = 16, 12


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (value % 256, 7, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def value_of(example):
    return int(decode_image(example["image"])[0][0, 0, 0])


def write_images(folder, names, start=0):
    for value, name in enumerate(names, start=start):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))


def make_objects(row):
    """One to three boxes inside the image."""
    boxes = [[float(index), 1.0, 4.0 + row % 5, 3.0] for index in range(row % 3 + 1)]
    return {
        "bbox": boxes,
        "category": [(row + index) % 3 for index in range(len(boxes))],
        "area": [0.5 * box[2] * box[3] for box in boxes],
        "iscrowd": [int(row % 7 == 0)] * len(boxes),
    }


DETECTION = {
    "image": image_feature(),
    "image_id": datasets.Value("int64"),
    "objects": objects_feature(["ant", "bee", "cat"]),
}


def write_parquet(path, columns, features=None, row_group_size=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = datasets.Features(features).arrow_schema if features is not None else None
    pq.write_table(pa.Table.from_pydict(columns, schema=schema), path, row_group_size=row_group_size)


def write_detection_parquet(path, num_rows=20, **changes):
    columns = {
        "image": [{"bytes": png(row), "path": None} for row in range(num_rows)],
        "image_id": [100 + row for row in range(num_rows)],
        "objects": [make_objects(row) for row in range(num_rows)],
    }
    write_parquet(path, {**columns, **changes}, DETECTION)


def make_coco(num_images=10, **changes):
    """Categories with holes, in no order; image ids that are no positions."""
    class_ids = [7, 2, 90]  # ant, bee, cat sorted by id are bee, ant, cat
    annotations = []
    for row in range(num_images):
        objects = make_objects(row)
        for index, box in enumerate(objects["bbox"]):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 50 + 3 * row,
                    "category_id": class_ids[objects["category"][index]],
                    "bbox": box,
                    "area": objects["area"][index],
                    "iscrowd": objects["iscrowd"][index],
                    "segmentation": [],
                }
            )
    content = {
        "info": {},
        "images": [
            {"id": 50 + 3 * row, "file_name": f"{row}.png", "width": WIDTH, "height": HEIGHT}
            for row in range(num_images)
        ],
        "annotations": annotations,
        "categories": [{"id": key, "name": name} for key, name in zip(class_ids, ["ant", "bee", "cat"])],
    }
    return {**content, **changes}


def write_coco(file, images, content=None, num_images=10):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content or make_coco(num_images)))
    write_images(images, [f"{row}.png" for row in range(num_images)])


def assert_coco_examples(stream, num_images=10):
    examples = list(stream)
    assert [example["image_id"] for example in examples] == [50 + 3 * row for row in range(num_images)]
    assert [value_of(example) for example in examples] == list(range(num_images))
    assert stream.object_names == ["bee", "ant", "cat"]
    for row, example in enumerate(examples):
        expected = make_objects(row)
        expected["category"] = [[1, 0, 2][category] for category in expected["category"]]
        assert example["objects"] == expected
        assert stream.features.encode_example(example) == example


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


def test_scenes_by_name():
    for source, preset in (("scenes", "easy"), ("scenes:easy", "easy"), ("scenes:hard", "hard")):
        expected = next(iter(scenes_source(preset, "validation")))
        assert next(iter(open_source(source, "val"))) == expected


# Parquet


def test_parquet_round_trip(tmp_path):
    write_detection_parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
    later = {"image_id": [200 + row for row in range(20)]}
    write_detection_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", **later)
    write_detection_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", num_rows=2)
    source = open_source(tmp_path)
    examples = list(source)
    assert [example["image_id"] for example in examples] == [*range(100, 120), *range(200, 220)]
    assert source.dataset.num_shards == 6
    for row, example in enumerate(examples):
        assert example["image"] == {"bytes": png(row % 20), "path": None}
        assert example["objects"] == make_objects(row % 20)
        assert source.features.encode_example(example) == example
    assert source.features == datasets.Features(DETECTION)
    assert source.object_names == ["ant", "bee", "cat"]
    assert source.object_names is not None
    assert len(list(open_source(tmp_path, "valid"))) == 2


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["a.parquet"], "train"),
        (["train/0.parquet", "test/0.parquet"], "train"),
        (["x/val/0.parquet", "x/train/0.parquet"], "validation"),
        (["dev.parquet", "training.parquet"], "validation"),
        (["unsupervised-00000-of-00001.parquet", "train.parquet"], "unsupervised"),
    ],
)
def test_parquet_layouts(tmp_path, names, split):
    for number, name in enumerate(names):
        write_parquet(tmp_path / name, {"image": [png(number)]})
    assert [value_of(example) for example in open_source(tmp_path, split)] == [0]


def test_parquet_columns_of_other_names_and_types(tmp_path):
    write_images(tmp_path, ["photos/a.png", "photos/b.png"], start=40)
    write_parquet(
        tmp_path / "bytes" / "a.parquet", {"caption": ["x", "y"], "img": [png(1), png(2)], "path": ["p", "q"]}
    )
    write_parquet(tmp_path / "struct" / "a.parquet", {"photo": [{"bytes": png(3), "path": "p"}], "path": ["q"]})
    write_parquet(tmp_path / "path.parquet", {"file_name": ["photos/a.png", str(tmp_path / "photos/b.png")]})
    assert [value_of(example) for example in open_source(tmp_path / "bytes")] == [1, 2]
    assert [value_of(example) for example in open_source(tmp_path / "struct")] == [3]
    source = open_source(tmp_path / "path.parquet")
    assert [value_of(example) for example in source] == [40, 41]
    assert [example["image_id"] for example in source] == [0, 1]
    assert set(source.features) == {"image", "image_id"}


def test_parquet_image_feature_is_not_decoded(tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "note": datasets.Value("string")}
    )
    rows = {"image": [{"bytes": png(5), "path": None}], "mask": [{"bytes": png(6), "path": None}], "note": ["n"]}
    write_parquet(tmp_path / "a.parquet", rows, features)
    (example,) = open_source(tmp_path)
    assert example == {"image": rows["image"][0], "image_id": 0, "mask": rows["mask"][0]}


@pytest.mark.parametrize(
    ("train", "test", "names", "expected"),
    [
        (["dog", "cat", "dog"], ["ant"], ["ant", "cat", "dog"], [2, 1, 2]),
        ([3, 0, 1], [5], ["0", "1", "2", "3", "4", "5"], [3, 0, 1]),
    ],
)
def test_labels_without_names_are_those_of_all_splits(tmp_path, train, test, names, expected):
    write_parquet(tmp_path / "train.parquet", {"image": [png(0)] * len(train), "label": train})
    write_parquet(tmp_path / "test.parquet", {"image": [png(0)], "label": test})
    write_parquet(tmp_path / "dev.parquet", {"image": [png(0)]})
    source = open_source(tmp_path)
    assert source.label_names == open_source(tmp_path, "test").label_names == names
    assert [example["label"] for example in source] == expected


def test_objects_as_a_list_of_structs(tmp_path):
    objects = [
        [{"bbox": [1.0, 1.0, 4.0, 2.0], "category": "bee"}, {"bbox": [0.0, 0.0, 2.0, 2.0], "category": "ant"}],
        [],
    ]
    write_parquet(tmp_path / "a.parquet", {"image": [png(0), png(1)], "annotations": objects})
    source = open_source(tmp_path)
    assert source.object_names == ["ant", "bee"]
    first, second = (example["objects"] for example in source)
    expected = {"bbox": [[1, 1, 4, 2], [0, 0, 2, 2]], "category": [1, 0], "area": [8, 4], "iscrowd": [0, 0]}
    assert first == expected
    assert second == {"bbox": [], "category": [], "area": [], "iscrowd": []}


def test_empty_boxes_are_dropped_with_one_warning(tmp_path, caplog):
    boxes = [[[0.0, 0.0, 3.0, 3.0], [1.0, 1.0, 0.0, 5.0]], [[2.0, 2.0, 30.0, 3.0], [99.0, 0.0, 3.0, 3.0]]]
    rows = {
        "image": [png(0), png(1)],
        "width": [WIDTH] * 2,
        "height": [HEIGHT] * 2,
        "objects": [{"bbox": row, "category": [0, 1]} for row in boxes],
    }
    write_parquet(tmp_path / "a.parquet", rows)
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    (message,) = caplog.messages
    assert "2 of 4 boxes are dropped" in message
    assert "row 0 [1.0, 1.0, 0.0, 5.0], row 1 [99.0, 0.0, 3.0, 3.0]" in message
    assert "1 boxes stick out of their image and will be clipped: row 1 [2.0, 2.0, 30.0, 3.0]" in message
    assert "1 of 2 classes have no box: 1" in message
    kept = [example["objects"] for example in source]
    assert [objects["bbox"] for objects in kept] == [[boxes[0][0]], [boxes[1][0]]]
    assert [objects["category"] for objects in kept] == [[0], [0]]
    assert [objects["area"] for objects in kept] == [[9], [90]]


def test_boxes_that_look_like_corners_are_doubted(tmp_path, caplog):
    corners = [[4.0, 4.0, 15.0, 11.0], [8.0, 6.0, 14.0, 10.0], [0.0, 0.0, 3.0, 3.0]]
    objects = [{"bbox": [box], "category": [0]} for box in corners]
    columns = {"image": [png(0)] * 3, "width": [WIDTH] * 3, "height": [HEIGHT] * 3, "objects": objects}
    write_parquet(tmp_path / "a.parquet", columns)
    with caplog.at_level(logging.WARNING):
        open_source(tmp_path)
    assert "may be corners; a bbox must be [x, y, width, height]" in caplog.text


def test_hidden_labels_and_no_objects_leave_the_columns_out(tmp_path, caplog):
    features = {
        "image": image_feature(),
        "label": datasets.ClassLabel(names=["a", "b"]),
        "objects": DETECTION["objects"],
    }
    empty = {"bbox": [], "category": [], "area": [], "iscrowd": []}
    rows = {"image": [{"bytes": png(0), "path": None}] * 2, "label": [-1, -1], "objects": [empty, empty]}
    write_parquet(tmp_path / "test.parquet", rows, features)
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path, "test")
    assert set(source.features) == {"image", "image_id"} == set(next(iter(source)))
    assert "no row has a label in the column 'label'" in caplog.text
    assert "no row has an object" in caplog.text


def test_a_label_column_of_another_type_is_not_left_out_in_silence(tmp_path, caplog):
    features = {"image": image_feature(), "label": datasets.Value("bool")}
    rows = {"image": [{"bytes": png(0), "path": None}] * 2, "label": [True, False]}
    write_parquet(tmp_path / "a.parquet", rows, features)
    with caplog.at_level(logging.WARNING):
        assert set(open_source(tmp_path).features) == {"image", "image_id"}
    assert "the column 'label' is left out: a label is one integer or text per image, these are Value('bool')" in (
        caplog.text
    )


def test_repeated_ids_become_positions(tmp_path, caplog):
    write_parquet(tmp_path / "a.parquet", {"image": [png(0)] * 3, "image_id": [4, 4, 5]})
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    assert [example["image_id"] for example in source] == [0, 1, 2]
    assert "'image_id' is not unique" in caplog.text


def test_parquet_mistakes_are_named(tmp_path):
    write_parquet(tmp_path / "none" / "a.parquet", {"text": ["x"], "number": [1]})
    with pytest.raises(ValueError, match=r"no column of images; its columns are text, number\. Name it 'image'"):
        open_source(tmp_path / "none")
    objects = {"bbox": [[0.0, 0.0, 2.0, 2.0]], "category": [3], "area": [4.0], "iscrowd": [0]}
    write_detection_parquet(tmp_path / "range.parquet", objects=[objects, *map(make_objects, range(1, 20))])
    with pytest.raises(ValueError, match=r"1 boxes have a category outside 0\.\.2, which .* 3 classes: 3 of row 0"):
        open_source(tmp_path / "range.parquet")
    label = {"image": image_feature(), "label": datasets.ClassLabel(names=["a", "b"])}
    images = [{"bytes": png(0), "path": None}] * 3
    write_parquet(tmp_path / "label.parquet", {"image": images, "label": [0, -1, 1]}, label)
    with pytest.raises(ValueError, match=r"1 labels are none of the 2 classes: -1 in row 1"):
        open_source(tmp_path / "label.parquet")
    uneven = {"bbox": [[0.0, 0.0, 2.0, 2.0]], "category": [0, 1]}
    write_parquet(tmp_path / "uneven.parquet", {"image": [png(0)], "objects": [uneven]})
    with pytest.raises(ValueError, match="1 rows have not one category per box: row 0"):
        open_source(tmp_path / "uneven.parquet")
    short = {"bbox": [[0.0, 2.0, 2.0]], "category": [0]}
    write_parquet(tmp_path / "short.parquet", {"image": [png(0)], "objects": [short]})
    with pytest.raises(ValueError, match=r"1 boxes are not four numbers.*\[0.0, 2.0, 2.0\] in row 0"):
        open_source(tmp_path / "short.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"broken\.parquet cannot be read as Parquet"):
        open_source(tmp_path / "broken.parquet")
    write_parquet(tmp_path / "two" / "train-0.parquet", {"image": [png(0)], "label": [1]})
    write_parquet(tmp_path / "two" / "train-1.parquet", {"image": [png(0)], "label": ["x"]})
    with pytest.raises(ValueError, match=r"train-1\.parquet and .*train-0\.parquet differ in their columns label"):
        open_source(tmp_path / "two")
    write_parquet(tmp_path / "zero.parquet", {"image": pa.array([], pa.binary())})
    with pytest.raises(ValueError, match=r"there are no rows in .*zero\.parquet"):
        open_source(tmp_path / "zero.parquet")
    write_parquet(tmp_path / "mixed" / "train.parquet", {"image": [png(0)]})
    write_parquet(tmp_path / "mixed" / "more.parquet", {"image": [png(0)]})
    with pytest.raises(ValueError, match=r"no split can be recognised in .*more\.parquet.* other files name"):
        open_source(tmp_path / "mixed")


# Image folders


def test_imagefolder_with_classes_and_splits(tmp_path):
    write_images(tmp_path, ["train/dog/1.png", "train/cat/2.JPG", "train/cat/1.png", "val/dog/9.png", "val/ant/1.png"])
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    write_images(tmp_path, ["train/.hidden/1.png", "train/cat/.2.png"])
    source = open_source(tmp_path)
    assert source.label_names == open_source(tmp_path, "validation").label_names == ["ant", "cat", "dog"]
    examples = list(source)
    names = ["cat/1.png", "cat/2.JPG", "dog/1.png"]
    assert [example["image"] for example in examples] == [
        {"bytes": None, "path": str(tmp_path / "train" / name)} for name in names
    ]
    assert [example["label"] for example in examples] == [1, 1, 2]
    assert [example["image_id"] for example in examples] == [0, 1, 2]
    assert [value_of(example) for example in examples] == [2, 1, 0]
    assert source.object_names is None


@pytest.mark.parametrize(
    "names",
    [["a.png", "b.png"], ["one/a.png", "one/b.png"], ["2021/may/a.png", "2022/june/b.png"], ["x/a.png", "b.png"]],
)
def test_imagefolder_without_classes(tmp_path, names):
    write_images(tmp_path, names)
    source = open_source(tmp_path)
    assert [example["image"]["path"] for example in source] == sorted(str(tmp_path / name) for name in names)
    assert set(source.features) == {"image", "image_id"}


def test_a_test_split_without_class_folders_leaves_the_other_splits_their_labels(tmp_path, caplog):
    write_images(tmp_path, ["train/cat/1.png", "train/dog/1.png", "val/dog/1.png", "test/1.png", "test/2.png"])
    assert [example["label"] for example in open_source(tmp_path)] == [0, 1]
    assert [example["label"] for example in open_source(tmp_path, "validation")] == [1]
    assert "have no label" not in caplog.text
    assert set(open_source(tmp_path, "test").features) == {"image", "image_id"}
    assert "the images of split 'test' lie in no folder of a class; they have no label" in caplog.text


def test_the_first_images_of_class_folders_are_of_all_classes(tmp_path):
    for name, count in (("ant", 6), ("bee", 3), ("wasp", 3)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{index}.png")
    labels = [example["label"] for example in open_source(tmp_path, num_samples=4)]
    assert labels == [0, 0, 1, 2]
    assert len(list(open_source(tmp_path, num_samples=100))) == 12


def test_imagefolder_mistakes_are_named(tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no Parquet files, .* no images; it is empty"):
        open_source(tmp_path / "empty")
    (tmp_path / "texts" / "inner").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").touch()
    with pytest.raises(ValueError, match=r"no images: looked .* \.jpg .*; it holds a\.txt, inner/"):
        open_source(tmp_path / "texts", format="imagefolder")
    write_images(tmp_path, ["images/train/a.png", "images/test/a.png", "images/extra/a.png"])
    with pytest.raises(ValueError, match=r"has no split 'validation'; it has test, train"):
        open_source(tmp_path / "images", "validation")
    with caplog.at_level(logging.WARNING):
        open_source(tmp_path / "images")
    assert "images in extra are ignored" in caplog.text
    with pytest.raises(ValueError, match="is a file; give the folder"):
        open_source(tmp_path / "images" / "train" / "a.png", format="imagefolder")


# COCO


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train.json", "images/train"),
        ("annotations/instances_train.json", "images"),
        ("annotations/train.json", "."),
        ("train/_annotations.coco.json", "train"),
        ("_annotations.coco.json", "."),
        ("train.json", "train"),
        ("labels.json", "images"),
    ],
)
def test_coco_layouts(tmp_path, file, images):
    write_coco(tmp_path / file, tmp_path / images)
    (tmp_path / "dataset_infos.json").write_text('{"default": 1}')
    assert_coco_examples(open_source(tmp_path))
    assert_coco_examples(open_source(tmp_path / file, format="coco"))


def test_coco_splits(tmp_path):
    write_coco(tmp_path / "annotations" / "instances_train2017.json", tmp_path / "train2017", num_images=4)
    write_coco(tmp_path / "annotations" / "instances_val2017.json", tmp_path / "val2017", num_images=2)
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{}")
    assert_coco_examples(open_source(tmp_path), 4)
    assert_coco_examples(open_source(tmp_path, "val"), 2)
    assert_coco_examples(open_source(tmp_path / "annotations" / "instances_val2017.json", "validation"), 2)
    with pytest.raises(ValueError, match=r"has no split 'test'; it has train, validation"):
        open_source(tmp_path, "test")
    with pytest.raises(ValueError, match=r"instances_val2017\.json has no split 'train'; it has validation"):
        open_source(tmp_path / "annotations" / "instances_val2017.json")


def test_coco_images_without_boxes_stay(tmp_path):
    content = make_coco(3)
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] != 53]
    write_coco(tmp_path / "a.json", tmp_path, content, num_images=3)
    examples = list(open_source(tmp_path))
    assert [len(example["objects"]["bbox"]) for example in examples] == [1, 0, 3]


def test_coco_without_annotations_is_unlabelled(tmp_path, caplog):
    content = make_coco(3)
    del content["annotations"]
    write_coco(tmp_path / "a.json", tmp_path, content, num_images=3)
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    assert set(source.features) == {"image", "image_id"}
    assert "has no annotations: its images are used without labels" in caplog.text


def test_coco_group_of_roboflow_is_no_class(tmp_path):
    content = make_coco(4)
    for category in content["categories"]:
        category["supercategory"] = "bee"
    content["categories"].insert(0, {"id": 0, "name": "bee", "supercategory": "none"})
    write_coco(tmp_path / "train" / "_annotations.coco.json", tmp_path / "train", content, num_images=4)
    assert_coco_examples(open_source(tmp_path), 4)


def test_coco_boxes_are_checked(tmp_path, caplog):
    content = make_coco(4)
    content["annotations"][0]["bbox"] = [3, 3, 0, 5]
    content["annotations"][1]["bbox"] = [-20, 0, 5, 5]
    content["annotations"][2]["bbox"] = [10, 10, 50, 50]
    content["categories"].append({"id": 100, "name": "dog"})
    write_coco(tmp_path / "a.json", tmp_path, content, num_images=4)
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    (message,) = caplog.messages
    assert "2 of 7 boxes are dropped" in message
    assert "annotation 1 [3.0, 3.0, 0.0, 5.0], annotation 2 [-20.0, 0.0, 5.0, 5.0]" in message
    assert "1 boxes stick out of their image and will be clipped: annotation 3" in message
    assert "1 of 4 classes have no box: dog" in message
    assert [len(example["objects"]["bbox"]) for example in source] == [0, 1, 3, 1]


def change(content, key, index, **values):
    """The content with values of one of its records changed; None removes them."""
    record = {**content[key][index], **values}
    content[key][index] = {name: value for name, value in record.items() if value is not None}
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (change(make_coco(), "annotations", 2, category_id=3), r"1 annotations have a category_id .* ids 3"),
        (change(make_coco(), "annotations", 0, image_id=1), r"1 annotations have a image_id .* ids 1"),
        (
            change(make_coco(), "annotations", 4, bbox=None),
            r"a\.json: 1 objects .*: annotation 5 has no bbox",
        ),
        (
            change(make_coco(), "annotations", 4, bbox=[1, 2, 3]),
            r"annotation 5 has the bbox \[1, 2, 3\]; it needs",
        ),
        (change(make_coco(), "images", 1, id=50), r"1 image ids are used more than once: 50"),
        (change(make_coco(), "images", 1, id=None), r"every image needs 'id' and 'file_name'; one has file_name"),
        (change(make_coco(), "images", 1, file_name="x/no.png"), r"1 of 10 images are missing in .*: x/no\.png"),
        (change(make_coco(), "categories", 1, name="ant"), r"1 names of categories are used more than once: ant"),
        (change(make_coco(), "categories", 1, name=None), r"every category needs 'id' and 'name'; one is \{'id': 2\}"),
        ({"images": []}, r"a\.json lists no images"),
        ({"license": 1}, r"is not a COCO json: it must hold a list 'images'; it holds license"),
        ([1], r"is not a COCO json: .* it holds a list"),
    ],
)
def test_coco_mistakes_are_named(tmp_path, content, message):
    write_coco(tmp_path / "a.json", tmp_path, content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "a.json")


def test_coco_files_that_do_not_fit(tmp_path):
    write_coco(tmp_path / "a.json", tmp_path / "elsewhere", num_images=2)
    with pytest.raises(ValueError, match=r"the image 0\.png is in none of the folders .*images"):
        open_source(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"b\.json is not json: Expecting property name"):
        open_source(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"elsewhere holds no COCO json; it holds 0\.png, 1\.png"):
        open_source(tmp_path / "elsewhere", format="coco")
    write_coco(tmp_path / "two" / "a.json", tmp_path / "two")
    write_coco(tmp_path / "two" / "b.json", tmp_path / "two")
    with pytest.raises(ValueError, match=r"several COCO files for the split 'train': .*a\.json, .*b\.json"):
        open_source(tmp_path / "two")


# Hub


def test_hub_streams_have_the_schema(tmp_path, monkeypatch):
    write_detection_parquet(tmp_path / "train-00000-of-00001.parquet", num_rows=5)
    write_detection_parquet(tmp_path / "validation-00000-of-00001.parquet", num_rows=3)
    asked = []
    load = datasets.load_dataset

    def load_from_disk(source, name=None, **options):
        asked.append((source, name, options["revision"]))
        return load(str(tmp_path), **{**options, "revision": None})

    monkeypatch.setattr(datasets, "load_dataset", load_from_disk)
    stream = open_source("my-org/cells", "val", name="small", revision="v1")
    assert asked == [("my-org/cells", "small", "v1")]
    assert stream.features == datasets.Features(DETECTION)
    for row, example in enumerate(stream):
        assert example["image"]["bytes"] == png(row)
        assert (example["image_id"], example["objects"]) == (100 + row, make_objects(row))
    with pytest.raises(ValueError, match=r"my-org/cells has no split 'test'; it has train, validation"):
        open_source("my-org/cells", "test")


def test_hub_rows_without_id_get_one_from_their_content(tmp_path, caplog):
    rows = {"image": [{"bytes": png(row), "path": None} for row in range(6)], "label": ["a"] * 6}
    features = {"image": image_feature(), "label": datasets.Value("string")}
    write_parquet(tmp_path / "train-00000-of-00001.parquet", rows, features)
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path, format="hub")
    ids = [example["image_id"] for example in source]
    assert len(set(ids)) == 6
    assert ids == [example["image_id"] for example in source]
    assert all(0 <= image_id < 2**63 for image_id in ids)
    assert "the column 'label' is left out: without ClassLabel its classes are not known" in caplog.text


def test_hub_failures_are_named(monkeypatch):
    def fail(*args, **options):
        raise ConnectionError("the Hub cannot be reached")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"scene is no folder or file here.*the Hub cannot be reached.*mean 'scenes'"):
        open_source("scene")


# What is not there


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
    with pytest.raises(ValueError, match=r"unknown format 'vok'; the formats are scenes, parquet, .*hub"):
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
