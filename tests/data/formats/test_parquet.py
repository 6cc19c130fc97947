"""Parquet files, one row per image."""

import logging

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from sample_data import (
    DETECTION,
    HEIGHT,
    WIDTH,
    make_objects,
    png,
    value_of,
    write_detection_parquet,
    write_images,
    write_parquet,
)

from hf_vlm.data.io.decode import BadImageError
from hf_vlm.data.schema import image_feature, objects_feature
from hf_vlm.data.sources import open_source


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


@pytest.mark.parametrize("place", ["", "train", "train/tables"])
@pytest.mark.parametrize("names", ["", "train"])
@pytest.mark.parametrize("is_struct", [False, True])
def test_names_of_images_are_relative_to_the_source_or_to_the_split(tmp_path, place, names, is_struct):
    write_images(tmp_path / "train" / "images", ["a.png", "b.png"], start=40)
    paths = [f"{'train/' if names == '' else ''}images/{name}.png" for name in "ab"]
    images = [{"bytes": None, "path": path} for path in paths] if is_struct else paths
    write_parquet(tmp_path / place / "train-0.parquet", {"image": images})
    write_parquet(tmp_path / place / "train-1.parquet", {"image": images})
    source = open_source(tmp_path)
    if (place, names) in {("", "train"), ("train/tables", "train")}:  # in neither
        with pytest.raises(BadImageError):
            value_of(next(iter(source)))
    else:
        assert [value_of(example) for example in source] == [40, 41] * 2


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
    images = [png(value) for value in range(3)]
    columns = {"image": images, "width": [WIDTH] * 3, "height": [HEIGHT] * 3, "objects": objects}
    write_parquet(tmp_path / "a.parquet", columns)
    with caplog.at_level(logging.WARNING):
        open_source(tmp_path)
    assert "2 of 3 boxes do not lie in their image as x, y, width, height, while 100% do as corners" in caplog.text


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
    rows = {"image": [png(0)] * 2, "label": [[1], [0, 2]], "xmin": [0, 1], "keypoints": [[0.5], [1.5]]}
    write_parquet(tmp_path / "a.parquet", rows)
    with caplog.at_level(logging.WARNING):
        assert set(open_source(tmp_path).features) == {"image", "image_id"}
    assert "3 columns that look like annotations are not read: 'label', List(Value('int64')), 'xmin'" in caplog.text


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        ([True, False], ["False", "True"], [1, 0]),
        ([2.0, 0.0], ["0", "1", "2"], [2, 0]),
        ([30045, 30023], ["30023", "30045"], [1, 0]),
        (["e\u0301", "\u00e9"], ["\u00e9"], [0, 0]),
    ],
)
def test_labels_of_any_type_are_classes(tmp_path, values, names, expected):
    write_parquet(tmp_path / "a.parquet", {"image": [png(0)] * 2, "label": values})
    source = open_source(tmp_path)
    assert source.label_names == names
    assert [example["label"] for example in source] == expected


def test_hidden_labels_are_none_beside_wide_holes(tmp_path):
    write_parquet(tmp_path / "train.parquet", {"image": [png(0)] * 2, "label": [30045, 30023]})
    write_parquet(tmp_path / "test.parquet", {"image": [png(0)], "label": [-1]})
    assert open_source(tmp_path).label_names == ["30023", "30045"]
    assert open_source(tmp_path, "test").label_names is None


def test_numbers_with_fractions_are_no_labels(tmp_path, caplog):
    write_parquet(tmp_path / "a.parquet", {"image": [png(0)] * 2, "label": [0.5, 1.0]})
    assert open_source(tmp_path).label_names is None
    assert "the column 'label' is left out: numbers with fractions, such as 0.5, are no classes" in caplog.text


def test_texts_are_preferred_to_numbers(tmp_path, caplog):
    box = {"bbox": [1.0, 1.0, 4.0, 2.0]}
    objects = [[{**box, "category_id": 7, "label": "bee"}, {**box, "category_id": 2, "label": "ant"}]]
    write_parquet(tmp_path / "a.parquet", {"image": [png(0)], "label": [3], "class_name": ["x"], "objects": objects})
    source = open_source(tmp_path)
    assert (source.object_names, source.label_names) == (["ant", "bee"], ["x"])
    assert next(iter(source))["objects"]["category"] == [1, 0]
    assert "not read: 'label'" in caplog.text


FLAT = {
    "lists": {"boxes": [[[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 2.0, 2.0]], []], "labels": [["bee", "ant"], []]},
    "sides": {
        "XMin": [[1.0, 0.0], []],
        "YMin": [[2.0, 0.0], []],
        "XMax": [[4.0, 2.0], []],
        "YMax": [[6.0, 2.0], []],
        "category": [["bee", "ant"], []],
    },
    "nested": {
        "objects": [
            [
                {"x": 1.0, "y": 2.0, "width": 3.0, "height": 4.0, "name": "bee"},
                {"x": 0.0, "y": 0.0, "width": 2.0, "height": 2.0, "name": "ant"},
            ],
            [],
        ]
    },
    "centres": {
        "objects": [
            {
                "x_center": [2.5, 1.0],
                "y_center": [4.0, 1.0],
                "width": [3.0, 2.0],
                "height": [4.0, 2.0],
                "class": ["bee", "ant"],
            },
            {"x_center": [], "y_center": [], "width": [], "height": [], "class": []},
        ]
    },
}


@pytest.mark.parametrize("columns", FLAT.values(), ids=FLAT)
def test_boxes_in_other_columns_are_the_same(tmp_path, columns, caplog):
    write_parquet(tmp_path / "a.parquet", {"image": [png(0), png(1)], **columns})
    source = open_source(tmp_path)
    assert source.object_names == ["ant", "bee"]
    assert source.max_objects == 2
    first, second = (example["objects"] for example in source)
    expected = {"bbox": [[1, 2, 3, 4], [0, 0, 2, 2]], "category": [1, 0], "area": [12, 4], "iscrowd": [0, 0]}
    assert (first, second["bbox"]) == (expected, [])
    assert not caplog.messages


@pytest.mark.parametrize(
    "columns",
    [
        {"bbox": [[1.0, 2.0, 3.0, 4.0], None], "label": [1, None]},
        {"x1": [1, None], "y1": [2, None], "x2": [4, None], "y2": [6, None], "label": [1, None], "width": [WIDTH] * 2},
    ],
)
def test_rows_may_have_one_object_each(tmp_path, columns):
    write_parquet(tmp_path / "a.parquet", {"image": [png(0), png(1)], **columns})
    source = open_source(tmp_path)
    assert source.object_names == ["0", "1"]
    first, second = (example["objects"] for example in source)
    assert first == {"bbox": [[1, 2, 3, 4]], "category": [1], "area": [12], "iscrowd": [0]}
    assert second["bbox"] == []


def one_object_per_row(images):
    """Rows of one object each, none of them equal."""
    numbers = range(len(images))
    sides = {"x": [float(row % 7) for row in numbers], "y": [0.5 * (row // 7) for row in numbers]}
    return {
        "image": images,
        **sides,
        "w": [2.0] * len(images),
        "h": [2.0] * len(images),
        "label": ["ant"] * len(images),
    }


@pytest.mark.parametrize("order", [[0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5, 0]])
@pytest.mark.parametrize("form", ["bytes", "struct", "name", "struct of names", "lists"])
def test_an_image_with_several_objects_has_one_row(tmp_path, order, form):
    write_images(tmp_path / "images", [f"{value}.png" for value in range(6)])
    images = {
        "bytes": [png(value) for value in order],
        "struct": [{"bytes": png(value), "path": "same.png"} for value in order],
        "name": [f"images/{value}.png" for value in order],
        "struct of names": [{"bytes": None, "path": f"images/{value}.png"} for value in order],
        "lists": [png(value) for value in order],
    }[form]
    table = one_object_per_row(images)
    if form == "lists":
        table = {name: [[value] for value in values] if name != "image" else values for name, values in table.items()}
    write_parquet(tmp_path / "a.parquet", table, row_group_size=3)
    last = f"row {len(order) - 1} that of row {order.index(order[-1])}"
    with pytest.raises(
        ValueError, match=rf"{sum(order.count(v) - 1 for v in set(order))} repeat the image .*{last}\. "
    ):
        open_source(tmp_path / "a.parquet")
    if "struct" not in form:  # what the message advises
        frame = pd.DataFrame(table)
        if form == "lists":
            frame = frame.explode(["x", "y", "w", "h", "label"])
        joined = frame.groupby("image")[["label", "x", "y", "w", "h"]].agg(list).reset_index()
        joined.to_parquet(tmp_path / "a.parquet")
        source = open_source(tmp_path / "a.parquet")
        assert sorted(len(example["objects"]["bbox"]) for example in source) == sorted(map(order.count, set(order)))


def test_copies_of_rows_and_other_images_are_no_objects_of_one(tmp_path):
    copies = {name: [values[0]] * 3 for name, values in one_object_per_row([png(0)] * 3).items()}
    others = one_object_per_row([{"bytes": png(value), "path": "0.png"} for value in range(3)])
    for name, table in {"copies": copies, "others": others}.items():
        write_parquet(tmp_path / name / "a.parquet", table)
        assert [len(example["objects"]["bbox"]) for example in open_source(tmp_path / name)] == [1, 1, 1]


@pytest.mark.parametrize("is_path", [True, False])
def test_boxes_without_a_size_are_judged_by_that_of_the_images(tmp_path, is_path):
    write_images(tmp_path, ["a.png"])
    images = ["a.png" if is_path else png(0)] * 12
    write_parquet(
        tmp_path / "a.parquet", {"image": images, "boxes": [[[8.0, 6.0, 14.0, 11.0]]] * 12, "labels": [[0]] * 12}
    )
    with pytest.raises(ValueError, match=r"12 of 12 boxes do not lie in their image .* as corners"):
        open_source(tmp_path)


def test_files_of_a_split_must_number_their_classes_alike(tmp_path):
    for shard, names in enumerate((["ant", "bee"], ["bee", "ant"])):
        label = {"image": image_feature(), "label": datasets.ClassLabel(names=names)}
        rows = {"image": [{"bytes": png(0), "path": None}], "label": [0]}
        write_parquet(tmp_path / "labels" / f"train-{shard}.parquet", rows, label)
        boxes = {"image": image_feature(), "objects": objects_feature(names)}
        box = {"bbox": [[0, 0, 2, 2]], "category": [0], "area": [4], "iscrowd": [0]}
        rows = {"image": [{"bytes": png(0), "path": None}], "objects": [box]}
        write_parquet(tmp_path / "boxes" / f"train-{shard}.parquet", rows, boxes)
    for folder in ("labels", "boxes"):
        with pytest.raises(
            ValueError, match=r"train-0.* and .*train-1.* number their classes differently: ant, bee, and bee"
        ):
            open_source(tmp_path / folder)


def test_annotations_that_the_first_file_lacks_are_not_lost(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", {"image": [png(0)]})
    write_parquet(tmp_path / "train-1.parquet", {"image": [png(0)], "label": [1]})
    with pytest.raises(ValueError, match=r"train-1\.parquet and .*train-0\.parquet differ in their columns label"):
        open_source(tmp_path)


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
