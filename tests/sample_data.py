"""Small data sets of known content in several formats, for tests of whatever reads them."""

import io
import json
from contextlib import contextmanager

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.schema import image_feature, objects_feature

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


def write_devkit(folder):
    """Pascal VOC: one object in each of two images."""
    boxes = {"a": (2, 3, 9, 8), "b": (1, 1, 4, 4)}
    write_images(folder / "JPEGImages", [f"{name}.png" for name in boxes])
    (folder / "Annotations").mkdir()
    for name, corners in boxes.items():
        tags = zip(("xmin", "ymin", "xmax", "ymax"), corners)
        box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
        text = f"<annotation><object><name>ant</name><bndbox>{box}</bndbox></object></annotation>"
        (folder / "Annotations" / f"{name}.xml").write_text(text)


def write_yolo(folder):
    """YOLO: one object in each of two images."""
    lines = {"a": "0 0.5 0.5 0.25 0.5\n", "b": "1 0.25 0.5 0.1 0.2\n"}
    write_images(folder / "images", [f"{name}.png" for name in lines])
    (folder / "labels").mkdir()
    for name, text in lines.items():
        (folder / "labels" / f"{name}.txt").write_text(text)


def write_json(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@contextmanager
def on_remote(folder, name):
    """The files of a folder, copied to `memory://NAME`."""
    remote = pytest.importorskip("upath").UPath(f"memory://{name}")
    try:
        for path in folder.rglob("*.*"):
            target = remote / path.relative_to(folder).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        yield remote
    finally:
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)
