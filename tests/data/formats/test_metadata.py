"""Image folders with metadata, here and on a remote file system."""

import io
import json
import logging

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_vlm.data.formats.imagefolder import find_images, open_imagefolder
from hf_vlm.data.io.decode import BadImageError, decode_image
from hf_vlm.data.sources import guess_format

BOXES = [
    {"file_name": "b.png", "objects": {"bbox": [[1, 2, 3.5, 4], [0, 0, 5, 6]], "categories": [2, 0]}},
    {"file_name": "sub/a.png", "objects": {"bbox": [], "categories": []}, "text": "nothing there"},
]


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (value, 7, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root, rows=None, names=("b.png", "sub/a.png"), metadata="metadata.jsonl"):
    """Images, the first of value 0, and rows of metadata, or their content."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))
    if rows is not None:
        (root / metadata).write_bytes(rows if isinstance(rows, bytes) else as_table(rows, metadata).encode())


def as_table(rows, metadata):
    """The text of metadata, from it or from rows."""
    if isinstance(rows, str):
        return rows
    if metadata.endswith(".csv"):
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        return "".join(",".join("" if cell is None else str(cell) for cell in line) + "\n" for line in lines)
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_parquet(rows, features=None):
    schema = features and datasets.Features(features).arrow_schema
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, row_group_size=2)
    return buffer.getvalue()


def names_of(stream, root):
    return [example["image"]["path"].removeprefix(f"{root}/") for example in stream]


def values_of(stream):
    return [int(decode_image(example["image"])[0][0, 0, 0]) for example in stream]


@pytest.fixture(params=["disk", "memory"])
def root(request, tmp_path):
    """An empty folder."""
    if request.param == "disk":
        yield tmp_path
        return
    upath = pytest.importorskip("upath")
    yield upath.UPath("memory://metadata-of-images")
    fsspec.filesystem("memory").rm("/metadata-of-images", recursive=True)


def test_boxes_come_from_the_rows(root):
    write(root, BOXES)
    source = open_imagefolder(root, "train")
    first, second = source
    assert names_of(source, root) == ["b.png", "sub/a.png"]
    assert values_of(source) == [0, 1]
    assert [first["image_id"], second["image_id"]] == [0, 1]
    assert source.object_names == ["0", "1", "2"]
    expected = {"bbox": [[1, 2, 3.5, 4], [0, 0, 5, 6]], "category": [2, 0], "area": [14, 30], "iscrowd": [0, 0]}
    assert first["objects"] == expected
    assert second["objects"] == {"bbox": [], "category": [], "area": [], "iscrowd": []}
    assert set(source.features) == {"image", "image_id", "objects", "text"}
    assert [first["text"], second["text"]] == [[], ["nothing there"]]
    for example in source:
        assert source.features.encode_example(example) == example


def test_objects_may_be_a_list_with_names_of_classes(root):
    objects = [
        {"bbox": [1, 1, 4, 2], "category": "bee", "area": 5.0, "iscrowd": 0},
        {"bbox": [0, 0, 2, 2], "category": "ant", "area": 3.0, "iscrowd": 1},
    ]
    write(root, [{"file_name": "b.png", "objects": objects, "id": 70}, {"file_name": "sub/a.png", "id": 71}])
    source = open_imagefolder(root, "train")
    first, second = source
    assert source.object_names == ["ant", "bee"]
    assert first["objects"] == {
        "bbox": [[1, 1, 4, 2], [0, 0, 2, 2]],
        "category": [1, 0],
        "area": [5, 3],
        "iscrowd": [0, 1],
    }
    assert [first["image_id"], second["image_id"], second["objects"]["bbox"]] == [70, 71, []]


def test_each_split_has_metadata_of_its_own(root):
    write(root / "train", [{"file_name": "./b.png", "label": "dog"}, {"file_name": "sub/a.png", "label": "cat"}])
    write(root / "val", [{"file_name": "b.png", "label": "ant"}, {"file_name": "sub/a.png", "label": "dog"}])
    train, validation = (open_imagefolder(root, split) for split in ("train", "validation"))
    assert train.label_names == validation.label_names == ["ant", "cat", "dog"]
    assert [example["label"] for example in train] == [2, 1]
    assert [example["label"] for example in validation] == [0, 2]
    assert names_of(train, root) == ["train/b.png", "train/sub/a.png"]


def test_metadata_in_the_root_serve_all_splits(root):
    names = ["train/x/1.png", "train/y/2.png", "test/x/3.png"]
    write(root, [{"file_name": name, "label": 2 - row} for row, name in enumerate(names)], names)
    assert [example["label"] for example in open_imagefolder(root, "train")] == [2, 1]
    assert open_imagefolder(root, "test").label_names == ["0", "1", "2"]
    assert len(list(open_imagefolder(root, "train", num_samples=1))) == 1


ROWS = [
    {"file_name": "b.png", "x1": 1.0, "y1": 2.0, "x2": 4.0, "y2": 6.0, "label": "bee"},
    {"file_name": "sub/a.png", "x1": 0.0, "y1": 0.0, "x2": 5.0, "y2": 6.0, "label": "ant"},
    {"file_name": "b.png", "x1": 3.0, "y1": 3.0, "x2": 5.0, "y2": 7.0, "label": "ant"},
    {"file_name": "c.png", "x1": None, "y1": None, "x2": None, "y2": None, "label": None},
]


@pytest.mark.parametrize("folder", ["", "train", "train/2024", "2024"])
@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_names_are_relative_to_the_metadata_wherever_they_lie(root, folder, metadata):
    rows = as_parquet(ROWS) if metadata.endswith(".parquet") else ROWS
    write(root / folder, rows, ("b.png", "sub/a.png", "c.png"), metadata)
    assert guess_format(str(root)) == "imagefolder"
    source = open_imagefolder(root, "train")
    assert names_of(source, root / folder) == ["b.png", "c.png", "sub/a.png"]
    assert values_of(source) == [0, 2, 1]
    boxes = [example["objects"]["bbox"] for example in source]
    assert boxes == [[[1, 2, 3, 4], [3, 3, 2, 4]], [], [[0, 0, 5, 6]]]
    assert [example["objects"]["category"] for example in source] == [[1, 0], [], [0]]
    assert source.object_names == ["ant", "bee"]


def test_metadata_in_parquet_keep_the_names_of_their_classes(root):
    names = datasets.ClassLabel(names=["dog", "cat"])
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(names)}
    features = {"file_name": datasets.Value("string"), "label": names, "objects": objects}
    box = {"bbox": [[1, 2, 3, 4]], "category": [0]}
    rows = [{"file_name": "b.png", "label": 1, "objects": box}, {"file_name": "sub/a.png", "label": 0, "objects": box}]
    write(root, as_parquet(rows, features), metadata="metadata.parquet")
    source = open_imagefolder(root, "train")
    assert source.label_names == ["cat", "dog"]
    assert [example["label"] for example in source] == [0, 1]
    assert (source.object_names, next(iter(source))["objects"]["category"]) == (["dog"], [0])


def test_parquet_of_another_kind_is_no_metadata(tmp_path):
    write(tmp_path, as_parquet([{"image": png(3)}]), metadata="metadata.parquet")
    assert guess_format(tmp_path) == "parquet"
    (tmp_path / "metadata.parquet").write_bytes(as_parquet(ROWS))
    assert guess_format(tmp_path) == "imagefolder"
    (tmp_path / "train.parquet").write_bytes(as_parquet([{"image": png(3)}]))
    assert guess_format(tmp_path) == "parquet"


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (("3", "0"), ["0", "1", "2", "3"], [3, 0]),
        (("3", "x"), ["3", "x"], [0, 1]),
        (("07", "7"), ["07", "7"], [0, 1]),  # codes, not numbers
        (("30023", "17"), ["17", "30023"], [1, 0]),
        (("1.5", "x"), ["1.5", "x"], [0, 1]),
    ],
)
def test_csv(root, labels, classes, expected):
    text = f'\ufefffile_name,label,text\r\nb.png,{labels[0]},"two\nlines"\r\nsub/a.png,{labels[1]},\r\n'
    write(root, text, metadata="metadata.csv")
    source = open_imagefolder(root, "train")
    assert source.label_names == classes
    assert [example["label"] for example in source] == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_rows_of_one_box_each_are_the_objects_of_their_image(root, encoding, delimiter, caplog):
    lines = [
        "filename,width,height,class,xmin,ymin,xmax,ymax",
        "b.png,16,12,bee,1,2,4.5,6",
        "sub\\a.png,16,12,ant,0,0,5,6",
        "b.png,16,12,ant,3,3,5,7",
    ]
    write(root, names=("b.png", "sub/a.png", "c.png"))
    text = "\r\n".join([*lines, "c.png,16,12,,,,,"]).replace(",", delimiter)
    (root / "_annotations.csv").write_bytes(text.encode(encoding))
    source = open_imagefolder(root, "train")
    assert names_of(source, root) == ["b.png", "c.png", "sub/a.png"]
    assert source.object_names == ["ant", "bee"]
    assert [example["objects"]["bbox"] for example in source] == [[[1, 2, 3.5, 4], [3, 3, 2, 4]], [], [[0, 0, 5, 6]]]
    assert [example["objects"]["category"] for example in source] == [[1, 0], [], [0]]
    assert set(source.features) == {"image", "image_id", "objects"}
    assert source.max_objects == 2
    assert not caplog.messages


def test_cells_of_csv_may_be_json(root):
    write(root, 'file_name,bbox,category\nb.png,"[1.5, 2, 3, 4]",cat\nsub/a.png,,\n', metadata="metadata.csv")
    assert [example["objects"]["bbox"] for example in open_imagefolder(root, "train")] == [[[1.5, 2, 3, 4]], []]
    (root / "metadata.csv").write_text('file_name,bbox,category\nb.png,"[1.5, 2",cat\n')
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2, 'bbox': it is not json"):
        open_imagefolder(root, "train")


def test_objects_may_have_sides(root):
    objects = [
        {"label": "ant", "label_id": 3, "xmin": 1, "ymin": 2, "xmax": 4, "ymax": 7},
        {"label": "bee", "label_id": 4, "xmin": 0, "ymin": 0, "xmax": 2, "ymax": 2},
    ]
    write(root, [{"file_name": "b.png", "objects": objects}, {"file_name": "sub/a.png"}])
    first, second = open_imagefolder(root, "train")
    assert first["objects"]["bbox"] == [[1, 2, 3, 5], [0, 0, 2, 2]]
    assert second["objects"]["bbox"] == []
    objects[0]["xmax"] = None
    write(root, [{"file_name": "b.png", "objects": objects}])
    with pytest.raises(ValueError, match=r"line 1: 1 objects make no sense: object 0 has no bbox"):
        open_imagefolder(root, "train")


def test_a_missing_image_is_one_that_cannot_be_read(root, caplog):
    write(root / "train", [{"file_name": name, "label": name[0]} for name in ("b.png", "no.png", "sub/a.png")])
    write(root / "val", [{"file_name": "b.png", "label": "b"}])
    source = open_imagefolder(root, "train")
    assert names_of(source, root) == ["train/b.png", "train/sub/a.png", "train/no.png"]
    assert "1 of 4 images that metadata name do not exist and count as images that cannot be read" in caplog.text
    assert "train/no.png in" in caplog.text
    with pytest.raises(BadImageError, match=r"no\.png"):
        values_of(source)
    assert names_of(open_imagefolder(root, "validation"), root) == ["val/b.png"]


def test_names_of_images_in_another_unicode_form_are_found(root, caplog):
    write(root, [{"file_name": "e\u0301.png", "label": 0}], names=["\u00e9.png"])
    assert names_of(open_imagefolder(root, "train"), root) == ["\u00e9.png"]
    assert not caplog.messages


def test_fractions_are_no_classes(root, caplog):
    write(root, [{"file_name": "b.png", "label": 0.5}, {"file_name": "sub/a.png", "label": 1.0}])
    assert "label" not in open_imagefolder(root, "train").features
    assert "the column 'label' is left out: numbers with fractions, such as 0.5, are no classes" in caplog.text


def test_boxes_without_a_size_are_judged_by_that_of_the_images(tmp_path):
    names = [f"{row}.png" for row in range(12)]
    rows = [{"file_name": name, "objects": {"bbox": [[8, 6, 14, 11]], "categories": [0]}} for name in names]
    write(tmp_path, rows, names)
    with pytest.raises(ValueError, match=r"12 of 12 boxes do not lie in their image .* as corners"):
        open_imagefolder(tmp_path, "train")


def test_masks_are_named_too(root, caplog):
    names = ["a.png", "b.png", "masks/a.png", "masks/b.png"]
    write(root, [{"file_name": name, "mask_file_name": f"masks/{name}"} for name in names[:2]], names)
    source = open_imagefolder(root, "train")
    assert [example["mask"] for example in source] == [
        {"bytes": None, "path": f"{root}/masks/{name}"} for name in names[:2]
    ]
    assert values_of(source) == [0, 1]
    assert not caplog.messages


def test_images_without_a_row_are_left_out_with_a_warning(root, caplog):
    write(root, BOXES[:1])
    with caplog.at_level(logging.WARNING):
        source = open_imagefolder(root, "train")
    assert names_of(source, root) == ["b.png"]
    assert "1 images are left out, since" in caplog.text
    assert "does not name them: a.png" in caplog.text


def test_boxes_are_checked_against_the_size(root, caplog):
    objects = {"bbox": [[1, 1, 0, 5], [2, 2, 30, 3]], "categories": [0, 1]}
    write(root, [{"file_name": "b.png", "objects": objects, "width": 16, "height": 12}, {"file_name": "sub/a.png"}])
    with caplog.at_level(logging.WARNING):
        source = open_imagefolder(root, "train")
    assert "1 of 2 boxes are dropped" in caplog.text
    assert "metadata.jsonl, line 1 [1.0, 1.0, 0.0, 5.0]" in caplog.text
    assert "1 boxes stick out of their image" in caplog.text
    first, _ = source
    assert first["objects"] == {"bbox": [[2, 2, 30, 3]], "category": [1], "area": [90], "iscrowd": [0]}


def test_a_split_without_known_labels_has_none(root, caplog):
    write(root / "train", [{"file_name": "b.png", "label": 1}, {"file_name": "sub/a.png", "label": 0}])
    write(root / "test", [{"file_name": "b.png", "label": -1}, {"file_name": "sub/a.png"}])
    with caplog.at_level(logging.WARNING):
        assert "label" not in open_imagefolder(root, "test").features
    assert "no row has a label in the column 'label'" in caplog.text


def test_ids_that_repeat_are_not_used(root, caplog):
    write(root, [{"file_name": name, "id": 5} for name in ("b.png", "sub/a.png")])
    with caplog.at_level(logging.WARNING):
        assert [example["image_id"] for example in open_imagefolder(root, "train")] == [0, 1]
    assert "the column 'id' is not unique" in caplog.text


GOOD = '{"file_name": "b.png", "label": 1}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "\n{broken", r"metadata\.jsonl, line 3: it is not json: Expecting property name"),
        (GOOD + "[1, 2]", r"metadata\.jsonl, line 2: it is no json object but '\[1, 2\]'"),
        ('{"label": 1, "image": "b.png"}', r"metadata\.jsonl, line 1: there is no 'file_name'; there is image, label"),
        ('{"file_name": "no.png"}', r"metadata\.jsonl names none of the 2 images of the split"),
        (
            GOOD + '{"file_name": "../a.png"}',
            r"1 images that metadata name are not in the folder of the data: .*line 2",
        ),
        (
            GOOD + '{"file_name": "/no/a.png"}',
            r"1 images that metadata name are not in the folder of the data: .*line 2",
        ),
        (
            '{"file_name": "b.png", "mask_file_name": "m.png"}',
            r"1 masks that metadata name do not exist: .*m\.png in .*line 1",
        ),
        (GOOD + GOOD, r"metadata\.jsonl, line 2: .*b\.png was named before, in .*line 1"),
        (GOOD + '{"file_name": "sub/a.png", "label": "x"}', r"the column 'label' of the metadata mixes types"),
        (GOOD + '{"file_name": "sub/a.png"}', r"1 labels are none of the 2 classes: None in .*line 2"),
        (
            '{"file_name": "b.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": []}}',
            r"line 1: an object needs one value of each field; there are \{'bbox': 1, 'category': 0\}",
        ),
        (
            '{"file_name": "b.png", "objects": [{"bbox": [1, 2, 3, 4], "category": null}, {"bbox": [1, 2, 3, 4], '
            '"category": 1}]}',
            r"line 1: 1 objects make no sense: object 0 has no category",
        ),
        (
            '{"file_name": "b.png", "objects": {"bbox": [[1, 2, 3]], "category": [0]}}',
            r"line 1: .* object 0 has the bbox \[1, 2, 3\]; it needs four numbers, x, y, width, height",
        ),
        (
            '{"file_name": "b.png", "objects": {"bbox": [["1", "2", "3", "4"]], "category": [0]}}',
            r"line 1: .* object 0 has the bbox .*; it needs four numbers",
        ),
        (
            '{"file_name": "b.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": [-1]}}',
            r"1 boxes have a category outside .*: -1 of metadata\.jsonl, line 1",
        ),
    ],
)
def test_mistakes_are_named(root, text, message):
    write(root, text)
    with pytest.raises(ValueError, match=message):
        open_imagefolder(root, "train")


def test_mistakes_in_csv_are_named(root):
    write(root, "file_name,label\nb.png,1,2\n", metadata="metadata.csv")
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2: there are more cells than columns"):
        open_imagefolder(root, "train")
    (root / "metadata.csv").write_bytes(b"file_name,label\nb.png,\xff\n")
    with pytest.raises(ValueError, match=r"metadata\.csv is not text in UTF-8"):
        open_imagefolder(root, "train")


def test_metadata_that_name_nothing_of_a_split_are_refused(root):
    write(root / "train", BOXES)
    write(root / "test")
    with pytest.raises(ValueError, match=r"train/metadata\.jsonl names none of the 2 images of the split"):
        open_imagefolder(root, "test")


def test_remote_folders_list_as_local_ones(root):
    names = [
        "train/dog/2.png",
        "train/cat-1/1.JPG",
        "train/cat/1.png",
        "val/dog/9.png",
        ".hidden/1.png",
        "__MACOSX/1.png",
    ]
    write(root, names=[*names, "train/cat/.3.png"])
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    found = [str(path).removeprefix(f"{root}/") for path in find_images(root)]
    assert found == ["train/cat/1.png", "train/cat-1/1.JPG", "train/dog/2.png", "val/dog/9.png"]
    source = open_imagefolder(root, "train")
    assert source.label_names == ["cat", "cat-1", "dog"]
    assert [example["label"] for example in source] == [0, 1, 2]
    assert values_of(source) == [2, 1, 0]
