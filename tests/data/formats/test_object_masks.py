"""Masks of objects in the forms in which formats other than COCO's json hold them."""

import csv
import io
import json

import numpy as np
import pytest
import yaml
from PIL import Image
from sample_data import HEIGHT, WIDTH, png, write_devkit, write_images, write_parquet

from hf_vlm.data.segmentations import encode_mask, read_segmentation
from hf_vlm.data.sources import open_source
from hf_vlm.data.transforms.objects import Masks

POLYGONS = [[[2, 3, 6, 3, 6, 8, 2, 8]], [[8, 1, 15, 1, 15, 4, 8, 4], [9, 6, 11, 6, 11, 10, 9, 10]]]
BOXES = [[2, 3, 4, 5], [8, 1, 7, 9]]


def render(polygons):
    """Masks (n, HEIGHT, WIDTH) of polygons that are rectangles."""
    masks = np.zeros((len(polygons), HEIGHT, WIDTH), bool)
    for mask, parts in zip(masks, polygons):
        for x0, y0, x1, _, _, y1, *_ in parts:
            mask[y0:y1, x0:x1] = True
    return masks


def encoded_png(mask, value):
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * value).save(file, "PNG")
    return file.getvalue()


EXPECTED = render(POLYGONS)
RUNS = [encode_mask(mask, offset=(0, 0), size=mask.shape) for mask in EXPECTED]
PNGS = [encoded_png(mask, value) for mask, value in zip(EXPECTED, (1, 255))]
FORMS = {
    "polygons": POLYGONS,
    "runs": RUNS,
    "struct of lists": {name: [runs[name] for runs in RUNS] for name in ("size", "counts")},
    "text": [json.dumps(value) for value in (POLYGONS[0], RUNS[1])],
    "images": [{"bytes": data, "path": None} for data in PNGS],
    "bytes": PNGS,
}


def assert_masks(source, expected=EXPECTED):
    assert source.has_object_masks
    example = next(iter(source))
    masks = Masks.of([read_segmentation(text, HEIGHT, WIDTH) for text in example["objects"]["segmentation"]])
    np.testing.assert_array_equal(masks.rasterise((HEIGHT, WIDTH)), expected)
    assert source.features.encode_example(example) == example


@pytest.mark.parametrize("layout", ["structs", "lists", "columns"])
@pytest.mark.parametrize("form", list(FORMS))
def test_parquet(tmp_path, form, layout):
    stored = FORMS[form]
    name = "mask" if form in ("images", "bytes") else "segmentation"
    lists = {"bbox": BOXES, "category": ["ant", "bee"], name: stored}
    columns = {"objects": [lists]}
    if layout == "structs":
        stored = RUNS if isinstance(stored, dict) else stored
        columns = {"objects": [[dict(zip(lists, values)) for values in zip(BOXES, lists["category"], stored)]]}
    elif layout == "columns" and not isinstance(stored, dict):
        columns = {"masks" if key == "mask" else key: [values] for key, values in lists.items()}
    write_parquet(tmp_path / "a.parquet", {"image": [png(0)], **columns})
    assert_masks(open_source(tmp_path))
    assert not open_source(tmp_path, object_masks=False).has_object_masks


def test_paths_of_masks_are_not_followed(tmp_path):
    (tmp_path / "a.png").write_bytes(PNGS[0])
    masks = [{"bytes": None, "path": str(tmp_path / "a.png")}]
    objects = {"bbox": BOXES[:1], "category": ["ant"], "mask": masks}
    write_parquet(tmp_path / "data" / "a.parquet", {"image": [png(0)], "objects": [objects]})
    (example,) = open_source(tmp_path / "data")
    assert example["objects"]["segmentation"] == [""]


@pytest.mark.parametrize("layout", ["structs", "lists"])
def test_metadata_of_images_with_polygons_and_run_lengths(tmp_path, layout):
    write_images(tmp_path, ["a.png"])
    lists = {"bbox": BOXES, "category": ["ant", "bee"], "segmentation": [POLYGONS[0], RUNS[1]]}
    structs = [dict(zip(lists, values)) for values in zip(*lists.values())]
    row = {"file_name": "a.png", "objects": structs if layout == "structs" else lists}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert_masks(open_source(tmp_path))
    assert not open_source(tmp_path, object_masks=False).has_object_masks


def test_metadata_with_one_object_per_row(tmp_path):
    write_images(tmp_path, ["a.png"])
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "xmin", "ymin", "xmax", "ymax", "class", "segmentation"])
        for (x, y, width, height), name, polygons in zip(BOXES, ("ant", "bee"), POLYGONS):
            writer.writerow(["a.png", x, y, x + width, y + height, name, json.dumps(polygons)])
    assert_masks(open_source(tmp_path))
    lines = (tmp_path / "metadata.csv").read_text().splitlines()
    (tmp_path / "metadata.csv").write_text("\n".join([lines[0], lines[2]]))  # one of two polygons
    assert_masks(open_source(tmp_path), EXPECTED[1:])


@pytest.mark.parametrize("stored", [POLYGONS, RUNS, [POLYGONS[0], RUNS[1]]])
def test_tars(tmp_path, write_tar, stored):
    lists = {"bbox": BOXES, "category": ["ant", "bee"], "segmentation": stored}
    write_tar(tmp_path / "0.tar", [("0.png", png(0)), ("0.json", json.dumps({"objects": lists}).encode())])
    assert_masks(open_source(tmp_path))
    assert not open_source(tmp_path, object_masks=False).has_object_masks


def test_yolo_polygons_as_labelling_tools_export_them(tmp_path):
    write_images(tmp_path / "images" / "train", ["a.png"])
    lines = ["1 0.5 0.5 0.25 0.5"]  # a box
    for category, polygons in enumerate(POLYGONS):
        points = np.reshape(polygons[0], (-1, 2)) / [WIDTH, HEIGHT]
        lines.append(" ".join(map(str, [category, *points.ravel().round(6).tolist()])))
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "a.txt").write_text("\n".join(lines[:1] + lines[1:]))
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump({"path": ".", "train": "images/train", "names": ["ant", "bee"]})
    )
    source = open_source(tmp_path)
    assert_masks(source, np.concatenate([np.zeros((1, HEIGHT, WIDTH), bool), render([p[:1] for p in POLYGONS])]))
    assert "1 of 3 objects have no mask" in source.findings[0]
    assert "a.txt, line 1" in source.findings[0]
    assert not open_source(tmp_path, object_masks=False).has_object_masks
    (tmp_path / "labels" / "train" / "a.txt").write_text(lines[0])
    assert not open_source(tmp_path).has_object_masks


@pytest.mark.parametrize("in_colours", [False, True])
def test_voc(tmp_path, in_colours):
    write_devkit(tmp_path)
    text = (tmp_path / "Annotations" / "a.xml").read_text()
    (tmp_path / "Annotations" / "a.xml").write_text(text.replace("</object>", "</object>" + text[12:-13], 1))
    values = (EXPECTED * np.array([1, 2], np.uint8)[:, None, None]).sum(0).astype(np.uint8)
    values[0] = 255
    palette = np.stack([sum((np.arange(256) >> 3 * b + c & 1) << 7 - b for b in range(8)) for c in range(3)], axis=1)
    folder = tmp_path / "SegmentationObject"
    folder.mkdir()
    Image.fromarray(palette.astype(np.uint8)[values] if in_colours else values).save(folder / "a.png")
    Image.fromarray(values).save(folder / "b.png")  # two, of one object
    source = open_source(tmp_path)
    assert_masks(source)
    assert [example["objects"]["segmentation"] for example in source][1] == [""]
    assert not open_source(tmp_path, object_masks=False).has_object_masks
