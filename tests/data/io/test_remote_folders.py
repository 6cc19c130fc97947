"""Folders behind URLs: of each format, the same examples as on disk."""

import json

import fsspec
import numpy as np
import pytest
from PIL import Image

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.sources import guess_format, open_source
from hf_vlm.data.stream import ExampleStream

SIZE = (40, 30)
SPLITS = ("train", "val")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_images(folder, names, first=0):
    """Images that are their positions all over."""
    folder.mkdir(parents=True, exist_ok=True)
    for value, name in enumerate(names, start=first):
        Image.new("RGB", SIZE, (value, value, value)).save(folder / name)


def boxes(index):
    return [[2 * index, 3, 10, 12], [5, 1 + index, 8, 8]]


def write_imagefolder(root):
    for split in SPLITS:
        for label, name in enumerate(("cat", "dog")):
            write_images(root / split / name, [f"{index}.png" for index in range(3)], first=10 * label)


def write_metadata(root):
    write_images(root, ["a.png", "b.png"])
    rows = [{"file_name": f"{name}.png", "label": label} for name, label in zip("ab", ("y", "x"))]
    write(root / "metadata.jsonl", "\n".join(map(json.dumps, rows)))


def write_coco(root):
    for split in SPLITS:
        write_images(root / split, [f"{index}.png" for index in range(3)])
        images = [{"id": 7 + index, "file_name": f"{index}.png", "width": 40, "height": 30} for index in range(3)]
        annotations = [
            {"id": 10 * index + category, "image_id": 7 + index, "category_id": category, "bbox": box}
            for index in range(3)
            for category, box in enumerate(boxes(index))
        ]
        categories = [{"id": index, "name": name} for index, name in enumerate(("ant", "bee"))]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write(root / "annotations" / f"instances_{split}.json", content)


def write_voc(root):
    write_images(root / "JPEGImages", ["a.png", "b.png", "c.png"])
    for index, name in enumerate("abc"):
        objects = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + width}</xmax>"
            f"<ymax>{y + height}</ymax></bndbox></object>"
            for name, (x, y, width, height) in zip(("ant", "bee"), boxes(index))
        )
        size = "<size><width>40</width><height>30</height></size>"
        write(root / "Annotations" / f"{name}.xml", f"<annotation>{size}{objects}</annotation>")
    write(root / "ImageSets" / "Main" / "train.txt", "a\nc\n")
    write(root / "ImageSets" / "Main" / "val.txt", "b\n")


def write_yolo(root):
    write(root / "data.yaml", "train: images/train\nval: images/val\nnames: [ant, bee]\n")
    for split in SPLITS:
        write_images(root / "images" / split, [f"{index}.png" for index in range(3)])
        for index in range(2):  # the third has no objects
            lines = [
                f"{category} {(x + width / 2) / 40} {(y + height / 2) / 30} {width / 40} {height / 30}\n"
                for category, (x, y, width, height) in enumerate(boxes(index))
            ]
            write(root / "labels" / split / f"{index}.txt", "".join(lines))


WRITERS = {
    "imagefolder": write_imagefolder,
    "metadata": write_metadata,
    "coco": write_coco,
    "voc": write_voc,
    "yolo": write_yolo,
}


@pytest.fixture
def upload():
    """`upload(folder)` copies a folder to `memory://bucket/data.v1` and returns that."""
    file_system = fsspec.filesystem("memory")

    def upload(folder):
        file_system.put(str(folder), "/bucket/data.v1", recursive=True)
        return "memory://bucket/data.v1"

    yield upload
    file_system.rm("/bucket", recursive=True)


def decoded(example, generator):
    return {**example, "image": decode_image(example["image"])[0]}


@pytest.mark.parametrize("format", WRITERS)
def test_remote_folders_are_what_lies_on_disk(tmp_path, format, upload):
    WRITERS[format](tmp_path)
    url = upload(tmp_path)
    format = "imagefolder" if format == "metadata" else format
    assert guess_format(url) == guess_format(tmp_path) == format
    for split in [split for split in SPLITS if format != "imagefolder" or (tmp_path / split).exists()] or ["train"]:
        local, remote = open_source(tmp_path, split), open_source(url, split)
        assert remote.features == local.features
        assert (remote.label_names, remote.object_names) == (local.label_names, local.object_names)
        expected = list(local)
        assert expected
        for example in expected:
            example["image"]["path"] = example["image"]["path"].replace(str(tmp_path), url)
        assert list(remote) == expected
        streams = [ExampleStream(source.dataset, decoded, repeat=False, block_size=2) for source in (remote, local)]
        for one, other in zip(*streams, strict=True):
            np.testing.assert_array_equal(one.pop("image"), other.pop("image"))
            assert one == other


def test_files_that_name_remote_images_are_sources_too(tmp_path, upload):
    write_coco(tmp_path / "coco")
    write_yolo(tmp_path / "yolo")
    url = upload(tmp_path)
    for name in ("coco/annotations/instances_train.json", "yolo/data.yaml"):
        assert guess_format(f"{url}/{name}") == name.partition("/")[0]
        local = list(open_source(tmp_path / name))
        assert [example["objects"] for example in open_source(f"{url}/{name}")] == [
            example["objects"] for example in local
        ]


def test_a_web_server_serves_what_names_its_files(tmp_path, serve):
    write_coco(tmp_path / "coco")
    write_yolo(tmp_path / "yolo")
    write(tmp_path / "yolo" / "list.txt", "".join(f"images/train/{index}.png\n" for index in range(3)))
    write(tmp_path / "yolo" / "listed.yaml", "train: list.txt\nnames: [ant, bee]\n")
    with serve(tmp_path, lambda number: 503 if number % 9 == 8 else None) as (url, _):
        for name in ("coco/annotations/instances_train.json", "yolo/listed.yaml"):
            local = list(open_source(tmp_path / name))
            remote = list(open_source(f"{url}/{name}"))
            assert [example["objects"] for example in remote] == [example["objects"] for example in local]
            assert [len(example["objects"]["bbox"]) for example in remote] == [2, 2, 2 if "coco" in name else 0]
            for one, other in zip(remote, local, strict=True):
                np.testing.assert_array_equal(decode_image(one["image"])[0], decode_image(other["image"])[0])
        with pytest.raises(ValueError, match=r"names the folder images/train, which a web server cannot list; name a"):
            open_source(f"{url}/yolo/data.yaml")
        for format in ("imagefolder", "voc", "coco", "yolo"):
            with pytest.raises(
                ValueError, match=rf"web servers cannot list .* the format '{format}' needs; give the COCO"
            ):
                open_source(f"{url}/yolo", format=format)
        with pytest.raises(ValueError, match="cannot be guessed from its name; give the format"):
            guess_format(f"{url}/yolo")


def test_mistakes_in_remote_folders_are_named(tmp_path, upload):
    write_voc(tmp_path)
    url = upload(tmp_path)
    with pytest.raises(ValueError, match=r"memory://bucket/data\.v2 does not exist; did you mean '.*data\.v1'"):
        open_source("memory://bucket/data.v2", format="voc")
    with pytest.raises(ValueError, match=r"memory://bucket/data\.v2 does not exist"):
        open_source("memory://bucket/data.v2")
    with pytest.raises(ValueError, match=r"memory://bucket/data\.v1 has no split 'test'; it has train, validation"):
        open_source(url, "test")
    with pytest.raises(ValueError, match=r"holds no Parquet files, .*; it holds train\.txt, val\.txt"):
        open_source(url + "/ImageSets/Main")
    with pytest.raises(ValueError, match=r"s3://bucket/images cannot be read: .*s3fs"):
        open_source("s3://me:secret@bucket/images")
