"""Objects have one form whatever the format: missing values are filled, wrong ones refused."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_vlm.data.formats.annotations import MASK_FIELDS, OBJECT_FIELDS, check_labels, normalise_objects
from hf_vlm.data.schema import image_feature
from hf_vlm.data.sources import open_source

CLASSES = ["ant", "bee"]
FIELD_TYPES = {
    "bbox": datasets.List(datasets.Value("float64")),
    "category": datasets.ClassLabel(names=CLASSES),
    "area": datasets.Value("float64"),
    "iscrowd": datasets.Value("int64"),
}


def as_lists(objects):
    """One list per field, of objects that all have the same fields."""
    return {name: [item[name] for item in objects] for name in objects[0]}


def write_rows(folder, png, objects):
    """A Parquet file whose features declare the classes, as those of a dataset on the Hub do."""
    fields = {name: FIELD_TYPES[name] for name in (objects if isinstance(objects, dict) else objects[0])}
    lists = {name: datasets.List(feature) for name, feature in fields.items()}
    stored = lists if isinstance(objects, dict) else datasets.List(fields)
    schema = datasets.Features({"image": image_feature(), "objects": stored}).arrow_schema
    row = {"image": {"bytes": png(0), "path": None}, "objects": objects}
    pq.write_table(pa.Table.from_pylist([row], schema=schema), folder / "train.parquet")


def write_metadata(folder, png, objects):
    (folder / "a.png").write_bytes(png(0))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "objects": objects}))


def write_coco(folder, png, objects):
    (folder / "a.png").write_bytes(png(0))
    names = {"category": "category_id"}
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [
            {"id": 50 + index, "image_id": 1, **{names.get(name, name): value for name, value in item.items()}}
            for index, item in enumerate(objects)
        ],
        "categories": [{"id": index, "name": name} for index, name in enumerate(CLASSES)],
    }
    (folder / "instances.json").write_text(json.dumps(content))


@pytest.fixture(params=["parquet", "hub", "imagefolder", "webdataset", "coco"])
def open_objects(request, tmp_path, png, write_tar):
    """`open_objects(objects)` writes one image with these objects in a format, and opens it."""

    def write_webdataset(folder, png, objects):
        write_tar(folder / "a.tar", [("a.png", png(0)), ("a.json", json.dumps({"objects": objects}).encode())])

    write = {
        "parquet": write_rows,
        "hub": write_rows,
        "imagefolder": write_metadata,
        "webdataset": write_webdataset,
        "coco": write_coco,
    }[request.param]

    def open_objects(objects, layout="structs"):
        if layout == "lists" and request.param == "coco":
            layout = "structs"  # the only one that COCO has
        write(tmp_path, png, objects if layout == "structs" else as_lists(objects))
        return open_source(tmp_path, format=request.param)

    open_objects.format = request.param
    return open_objects


BOXES = [{"bbox": [1.0, 1.0, 4.0, 2.0], "category": 1}, {"bbox": [0.0, 2.0, 3.0, 3.0], "category": 0}]


@pytest.mark.parametrize("layout", ["structs", "lists"])
@pytest.mark.parametrize(
    ("given", "areas", "crowds"),
    [
        ([{}, {}], [8, 9], [0, 0]),
        ([{"area": 5.5, "iscrowd": 1}, {"area": 7.0, "iscrowd": 0}], [5.5, 7], [1, 0]),
        ([{"area": None, "iscrowd": 1}, {"area": 7.0, "iscrowd": None}], [8, 7], [1, 0]),
        ([{"area": None, "iscrowd": None}, {"area": None, "iscrowd": None}], [8, 9], [0, 0]),
        ([{"area": 0.0}, {"area": 7.0}], [8, 7], [0, 0]),
        ([{"iscrowd": None}, {"iscrowd": 1}], [8, 9], [0, 1]),
    ],
)
def test_what_is_missing_is_filled_the_same_way_in_all_formats(open_objects, given, areas, crowds, layout):
    source = open_objects([{**box, **fields} for box, fields in zip(BOXES, given)], layout)
    (example,) = source
    assert example["objects"] == {
        "bbox": [[1, 1, 4, 2], [0, 2, 3, 3]],
        "category": [1, 0],
        "area": areas,
        "iscrowd": crowds,
    }
    assert source.features.encode_example(example) == example


def test_fields_may_be_missing_in_some_objects(open_objects):
    if open_objects.format in ("parquet", "hub"):  # whose columns have no missing fields: they are null
        extra = [{"area": None, "iscrowd": None}, {"area": 7.0, "iscrowd": 1}]
    else:
        extra = [{}, {"area": 7.0, "iscrowd": 1}]
    (example,) = open_objects([{**box, **fields} for box, fields in zip(BOXES, extra)])
    assert (example["objects"]["area"], example["objects"]["iscrowd"]) == ([8, 7], [0, 1])


LOCATIONS = {
    "parquet": "row 0",
    "hub": r"image_id \d+: .*object 1 ",
    "imagefolder": "line 1: .*object 1 ",
    "webdataset": r"a\.tar: the labels of a .*object 1 ",
    "coco": r"instances\.json: .*annotation 51 ",
}


@pytest.mark.parametrize("layout", ["structs", "lists"])
@pytest.mark.parametrize(
    "change", [{"bbox": [1.0, 2.0, 3.0]}, {"bbox": None}, {"bbox": [1.0, 2.0, None, 4.0]}, {"category": None}]
)
def test_wrong_objects_are_refused_with_their_location_in_all_formats(open_objects, change, layout):
    location = LOCATIONS[open_objects.format]
    if open_objects.format == "coco" and "category" in change:
        location = r"instances\.json: 1 annotations have a category_id .* ids 51"
    with pytest.raises(ValueError, match=location):
        list(open_objects([BOXES[0], {**BOXES[1], **change}], layout))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("text", "objects must be lists of their fields, or a list of dicts"),
        ([[1, 2, 3, 4]], "objects must be lists of their fields, or a list of dicts"),
        ({"bbox": 3, "category": [0]}, "objects must be lists of their fields, or a list of dicts"),
        ({"bbox": [[1, 2, 3, 4]], "category": []}, r"there are \{'bbox': 1, 'category': 0, 'area': 0, 'iscrowd': 0\}"),
        ({"bbox": [[1, 2, 3, 4]], "category": [0], "area": [1, 2]}, "an object needs one value of each field"),
        ([{"category": 0}], "1 objects make no sense: object 0 has no bbox; it needs four numbers"),
        ([{"bbox": [1, 2, 3, "4"], "category": 0}], r"object 0 has the bbox \[1, 2, 3, '4'\]"),
        ([{"bbox": [1, 2, 3, 10**400], "category": 0}], "object 0 has the bbox"),
        ([{"bbox": [1, 2, 3, True], "category": 0}], "object 0 has the bbox"),
        ([{"bbox": [1, 2, 3, 4]}], "object 0 has no category"),
        ([{"bbox": [1, 2, 3, 4], "category": [0]}], r"object 0 has the category \[0\], neither a number nor a name"),
        ([{"bbox": [1, 2, 3, 4], "category": 0, "area": "9"}], "object 0 has the area '9', which is no number"),
        ([{"bbox": [1, 2, 3, 4], "category": 0, "iscrowd": "no"}], "object 0 has the iscrowd 'no'"),
        ([{"bbox": [1, 2, 3, 4], "category": 0, "iscrowd": float("inf")}], "object 0 has the iscrowd inf"),
    ],
)
def test_mistakes_are_named(stored, message):
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        normalise_objects(stored, OBJECT_FIELDS, "here")


def test_values_that_tables_use_for_missing_ones_are_filled():
    objects = [
        {"bbox": (1, 2, 3, 4), "category": "ant", "area": float("nan"), "iscrowd": float("nan")},
        {"bbox": [1, 2, 3, 4], "category": "ant", "area": -1, "iscrowd": True},
    ]
    assert normalise_objects(objects, OBJECT_FIELDS, "here") == {
        "bbox": [[1, 2, 3, 4]] * 2,
        "category": ["ant"] * 2,
        "area": [12, 12],
        "iscrowd": [0, 1],
    }
    polygon = [[1, 2, 4, 2, 4, 6]]
    stored = [{"category": "ant", "segmentation": polygon}, {"bbox": [1, 2, 3, 4], "category": "ant"}]
    found = normalise_objects(stored, MASK_FIELDS, "here", has_masks=True)
    assert found["bbox"] == [[1, 2, 3, 4]] * 2
    assert found["segmentation"] == ["[[1.0,2.0,4.0,2.0,4.0,6.0]]", ""]
    lists = {"category": ["ant"], "segmentation": [polygon]}
    assert normalise_objects(lists, MASK_FIELDS, "here")["bbox"] == [[1, 2, 3, 4]]
    assert normalise_objects(None, OBJECT_FIELDS, "here") == {"bbox": [], "category": [], "area": [], "iscrowd": []}


def test_images_of_unknown_size_keep_their_boxes(tmp_path, png, caplog):
    """One image has a size and loses a box that lies outside; the other has none, and keeps what it has."""
    far = {"bbox": [50, 1, 4, 2], "category": 0}
    rows = [
        {"file_name": "a.png", "width": 10, "height": 8, "objects": [BOXES[0], far]},
        {"file_name": "b.png", "objects": [far]},
    ]
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(0))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [len(example["objects"]["bbox"]) for example in open_source(tmp_path)] == [1, 1]
    assert "1 of 3 boxes are dropped" in caplog.text
    parquet = [{**row, "image": {"bytes": png(0), "path": None}} for row in rows]
    for row in parquet:
        del row["file_name"]
    pq.write_table(pa.Table.from_pylist(parquet), tmp_path / "a.parquet")
    assert [len(example["objects"]["bbox"]) for example in open_source(tmp_path / "a.parquet")] == [1, 1]


def test_labels_are_all_known_or_none_is(caplog):
    options = {"class_names": CLASSES, "name_of": "row {}".format, "column": "label", "source": "here"}
    assert check_labels(np.array([True, True]), **options)
    assert not caplog.text
    assert not check_labels(np.array([False, False]), **options)
    assert "here: no row has a label in the column 'label'" in caplog.text
    with pytest.raises(ValueError, match="here: 1 labels are none of the 2 classes: row 1"):
        check_labels(np.array([True, False]), **options)
