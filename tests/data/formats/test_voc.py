"""Pascal VOC folders: layouts, boxes, and what is wrong in them."""

import re

import numpy as np
import pytest
from PIL import Image
from sample_data import on_remote

from hf_vlm.data.formats.voc import looks_like_voc, open_voc
from hf_vlm.data.sources import guess_format, open_source

BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def write_image(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def write_xml(path, objects, size="<size><width>40</width><height>30</height></size>"):
    """Objects are (name, corners, difficult)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    items = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult>{BOX.format(*corners)}</object>"
        for name, corners, difficult in objects
    ]
    path.write_text(f"<annotation>{size}{''.join(items)}</annotation>")


OBJECTS = {
    "a": [("dog", (1, 1, 40, 30), 0), ("cat", (11, 6, 20, 15), 1)],
    "b": [],
    "c": [("bird", (2.5, 3, 4.5, 6), 0)],
}
EXPECTED = {
    "a": {"bbox": [[0, 0, 40, 30], [10, 5, 10, 10]], "category": [2, 1], "area": [1200, 100], "iscrowd": [0, 1]},
    "b": {"bbox": [], "category": [], "area": [], "iscrowd": []},
    "c": {"bbox": [[1.5, 2, 3, 4]], "category": [0], "area": [12], "iscrowd": [0]},
}


def write_devkit(root, splits, images="JPEGImages"):
    for name, objects in OBJECTS.items():
        write_image(root / images / f"{name}.jpg")
        write_xml(root / "Annotations" / f"{name}.xml", objects)
    for split, names in splits.items():
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in names))


def content(source, split="train"):
    return {
        example["image"]["path"].rpartition("/")[2][0]: example["objects"] for example in open_source(source, split)
    }


@pytest.mark.parametrize("root", ["", "VOC2007", "VOCdevkit/VOC2012"])
def test_devkit_with_splits(tmp_path, root):
    write_devkit(tmp_path / root, {"train": "ab", "val": "c", "trainval": "abc", "cat_train": "a"})
    assert guess_format(tmp_path) == "voc"
    source = open_source(tmp_path)
    assert source.object_names == ["bird", "cat", "dog"]
    assert [example["image_id"] for example in source] == [0, 1]
    assert content(tmp_path) == {name: EXPECTED[name] for name in "ab"}
    assert content(tmp_path, "validation") == {"c": EXPECTED["c"]}
    assert content(tmp_path, "trainval") == EXPECTED
    assert len(list(open_source(tmp_path, num_samples=1))) == 1


def test_several_years_are_joined(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        write_devkit(tmp_path / year, {"train": "ab"})
    assert len(list(open_source(tmp_path))) == 4


def test_all_is_train_without_image_sets(tmp_path):
    write_devkit(tmp_path, {}, images="images")
    assert content(tmp_path) == EXPECTED


def test_files_beside_their_images_in_a_folder_a_split(tmp_path):
    for name, split in (("a", "train"), ("b", "train"), ("c", "valid")):
        write_image(tmp_path / split / f"{name}.jpg")
        write_xml(tmp_path / split / f"{name}.xml", OBJECTS[name])
    assert guess_format(tmp_path) == "voc"
    assert content(tmp_path) == {name: EXPECTED[name] for name in "ab"}
    assert content(tmp_path, "val") == {"c": EXPECTED["c"]}


def test_boxes_are_checked_and_unknown_sizes_read_from_the_image(tmp_path, caplog):
    write_image(tmp_path / "a.jpg")
    write_xml(tmp_path / "a.xml", [("dog", (50, 5, 60, 9), 0), ("dog", (5, 5, 60, 9), 0)])
    assert content(tmp_path)["a"]["bbox"] == [[4, 4, 56, 5]]
    assert "1 of 2 boxes are dropped" in caplog.text
    assert "dog of a.xml" in caplog.text
    for size in ("", "<size><width>0</width><height>0</height></size>"):
        write_xml(tmp_path / "a.xml", [("dog", (50, 5, 60, 9), 0), ("dog", (5, 5, 20, 9), 0)], size)
        caplog.clear()
        assert content(tmp_path)["a"]["bbox"] == [[4, 4, 16, 5]]
        assert "1 of 2 boxes are dropped" in caplog.text


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<annotation>", r"a\.xml cannot be read as an annotation of Pascal VOC: .*no element found|mismatched"),
        ("<html></html>", r"a\.xml .*its root is <html>, not <annotation>"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation></annotation>', r"a\.xml .*it declares a DOCTYPE"),
        ("<annotation><object></object></annotation>", r"a\.xml .*an object has no name"),
        ("<annotation><object><name>dog</name></object></annotation>", r"a\.xml .*the bndbox of dog needs xmin"),
        (
            f"<annotation><object><name>dog</name>{BOX.format(1, 2, 'x', 4)}</object></annotation>",
            r"a\.xml .*the bndbox of dog needs xmin",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, xml, message):
    write_image(tmp_path / "a.jpg")
    (tmp_path / "a.xml").write_text(xml)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, format="voc")


def test_missing_files_are_named(tmp_path, caplog):
    write_devkit(tmp_path, {"train": "abz"})
    assert list(content(tmp_path)) == ["a", "b"]
    assert "train.txt lists 1 images without an xml file, which are left out: z" in caplog.text
    assert "ImageSets/Main: 1 xml files are in none of its lists and not used: c.xml" in caplog.text
    caplog.clear()
    write_devkit(tmp_path, {"train": "ab", "val": "c"})
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    assert [example["image"]["path"] for example in open_source(tmp_path)] == [
        str(tmp_path / "JPEGImages" / f"{name}.jpg") for name in "ab"
    ]
    assert "1 of 2 xml files have no image" in caplog.text
    assert f"{tmp_path}/Annotations/b.xml; they count as images that cannot be read" in caplog.text
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"2 of 2 xml files have no image: .*a\.xml, .*b\.xml"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="holds no xml files of Pascal VOC"):
        open_source(tmp_path / "JPEGImages", format="voc")
    write_devkit(tmp_path, {"train": "xy", "val": "z"})
    with pytest.raises(ValueError, match=r"Main lists no image that has an xml file, in train\.txt, val\.txt"):
        open_source(tmp_path)


def test_all_broken_files_are_named_at_once(tmp_path):
    for name in "ab":
        write_image(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"2 of 2 xml files make no sense: .*a\.xml cannot .*b\.xml cannot"):
        open_source(tmp_path, format="voc")


def test_entities_are_refused_in_any_encoding(tmp_path):
    write_image(tmp_path / "a.jpg")
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'
    (tmp_path / "a.xml").write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.xml .*it declares a DOCTYPE"):
        open_source(tmp_path)


def test_annotations_in_small_letters(tmp_path):
    for name, objects in OBJECTS.items():
        write_image(tmp_path / "images" / f"{name}.png")
        write_xml(tmp_path / "annotations" / f"{name}.xml", objects)
    assert guess_format(tmp_path) == "voc"
    assert content(tmp_path) == EXPECTED


def test_images_without_xml_are_left_out_with_a_warning(tmp_path, caplog):
    write_devkit(tmp_path, {})
    write_image(tmp_path / "JPEGImages" / "z.jpg")
    assert content(tmp_path) == EXPECTED
    assert "1 images without an xml file of a split are left out: JPEGImages/z.jpg" in caplog.text


def test_a_stray_xml_is_no_annotation(tmp_path):
    for name in ("cat/a.jpg", "dog/b.jpg"):
        write_image(tmp_path / name)
    (tmp_path / "notes.xml").write_text("<notes/>")
    assert guess_format(tmp_path) == "imagefolder"


def test_a_remote_folder_opens_as_a_local_one(tmp_path):
    write_devkit(tmp_path, {"train": "ab", "val": "c"})
    with on_remote(tmp_path, "voc-test") as remote:
        assert looks_like_voc(remote)
        examples = list(open_voc(remote, "train"))
    assert [example["image"]["path"] for example in examples] == [
        f"memory://voc-test/JPEGImages/{name}.jpg" for name in "ab"
    ]
    assert [example["objects"] for example in examples] == [EXPECTED["a"], EXPECTED["b"]]


# Which image an xml file belongs to


def test_nested_folders_are_paired_by_their_paths(tmp_path, caplog):
    for clip, names in (("clip_a", "ab"), ("clip_b", "bc")):
        for name in names:
            write_image(tmp_path / "JPEGImages" / clip / f"{name}.jpg")
            write_xml(tmp_path / "Annotations" / clip / f"{name}.xml", OBJECTS[name if clip == "clip_a" else "c"])
    assert guess_format(tmp_path) == "voc"
    found = {example["image"]["path"]: example["objects"] for example in open_source(tmp_path)}
    assert found == {
        str(tmp_path / "JPEGImages" / clip / f"{name}.jpg"): EXPECTED[name if clip == "clip_a" else "c"]
        for clip, name in (("clip_a", "a"), ("clip_a", "b"), ("clip_b", "b"), ("clip_b", "c"))
    }
    assert not caplog.text


def test_an_image_in_a_folder_below_is_another_one(tmp_path, caplog):
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "backup" / "a.jpg", (80, 60))
    write_xml(tmp_path / "a.xml", OBJECTS["a"])
    assert [example["image"]["path"] for example in open_source(tmp_path)] == [str(tmp_path / "a.jpg")]
    assert "1 images without an xml file of a split are left out: backup/a.jpg" in caplog.text


def test_the_name_in_the_xml_decides_where_paths_do_not(tmp_path):
    write_xml(tmp_path / "Annotations" / "1.xml", OBJECTS["a"], "<filename>C:\\x\\Photo.JPG</filename>")
    write_xml(tmp_path / "Annotations" / "b.xml", OBJECTS["b"], "<filename>b.png</filename>")
    for name in ("photo.jpg", "b.jpg", "b.png"):
        write_image(tmp_path / "JPEGImages" / name)
    assert [example["image"]["path"] for example in open_source(tmp_path)] == [
        str(tmp_path / "JPEGImages" / name) for name in ("photo.jpg", "b.png")
    ]


def test_what_is_ambiguous_is_refused(tmp_path):
    write_xml(tmp_path / "Annotations" / "a.xml", OBJECTS["a"])
    for name in ("a.jpg", "a.png"):
        write_image(tmp_path / "JPEGImages" / name)
    with pytest.raises(
        ValueError, match=r"not clear which image 1 xml files belong to: .*a\.xml of .*a\.jpg, .*a\.png"
    ):
        open_source(tmp_path)
    for name in ("a.jpg", "a.png"):
        (tmp_path / "JPEGImages" / name).unlink()
    write_image(tmp_path / "JPEGImages" / "x" / "a.jpg")
    assert len(list(open_source(tmp_path))) == 1  # the only one of its name
    write_xml(tmp_path / "Annotations" / "y" / "a.xml", OBJECTS["a"])
    with pytest.raises(ValueError, match=r"x/a\.jpg of .*a\.xml, .*y/a\.xml"):
        open_source(tmp_path)


def test_masks_of_the_same_name_are_no_images(tmp_path, caplog):
    write_devkit(tmp_path, {"train": "abc"})
    (tmp_path / "JPEGImages" / "c.jpg").unlink()
    for name in "abc":
        write_image(tmp_path / "SegmentationClass" / f"{name}.png")
    paths = [example["image"]["path"] for example in open_source(tmp_path)]
    assert paths == [str(tmp_path / "JPEGImages" / f"{name}.jpg") for name in "abc"]
    assert "Segmentation" not in caplog.text


@pytest.mark.parametrize(
    "line", ["img 1", "img 1 1", "img 1 -1", "img 1.jpg", "JPEGImages/img 1.jpg", "C:\\x\\img 1.xml", "IMG 1"]
)
def test_lines_of_lists(tmp_path, line):
    for name in ("img 1", "img 2"):
        write_image(tmp_path / "JPEGImages" / f"{name}.jpg")
        write_xml(tmp_path / "Annotations" / f"{name}.xml", OBJECTS["a"])
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text(f"\ufeff{line}\r\n")
    assert [example["image"]["path"] for example in open_source(tmp_path)] == [
        str(tmp_path / "JPEGImages" / "img 1.jpg")
    ]


def test_cvat_and_label_studio(tmp_path):
    write_devkit(tmp_path / "cvat", {"default": "abc"})
    assert content(tmp_path / "cvat") == EXPECTED
    write_devkit(tmp_path / "studio", {}, images="images")
    assert content(tmp_path / "studio") == EXPECTED


def test_links_to_folders_are_followed(tmp_path):
    write_devkit(tmp_path / "original", {})
    (tmp_path / "data").mkdir()
    for name in ("Annotations", "JPEGImages"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "original" / name)
    assert guess_format(tmp_path / "data") == "voc"
    assert content(tmp_path / "data") == EXPECTED


def test_words_in_file_names_are_no_splits(tmp_path):
    for name in ("crash_test", "train_7", "b"):
        write_image(tmp_path / f"{name}.jpg")
        write_xml(tmp_path / f"{name}.xml", OBJECTS["a"])
    assert open_source(tmp_path).num_examples == 3


# Boxes


def test_every_bndbox_of_an_object_counts_and_those_of_its_parts_do_not(tmp_path):
    write_devkit(tmp_path, {})
    corners, part = BOX.format(11, 6, 20, 15), f"<part><name>head</name>{BOX.format(1, 1, 3, 3)}</part>"
    text = f"<object><name>dog</name>{BOX.format(1, 1, 40, 30)}{part}{corners}</object>"
    (tmp_path / "Annotations" / "b.xml").write_text(f"<annotation>{text}</annotation>")
    assert content(tmp_path)["b"]["bbox"] == EXPECTED["a"]["bbox"]
    assert content(tmp_path)["b"]["category"] == [2, 2]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (lambda x, y, w, h: (x, y, w, h), "as corners x1, y1, x2, y2, while 100% do as x, y, width, height"),
        (lambda x, y, w, h: (x / 400, y / 300, (x + w) / 400, (y + h) / 300), "lie in 0 to 1: they are normalised"),
    ],
)
def test_boxes_of_another_convention_are_refused(tmp_path, stored, message):
    generator = np.random.default_rng(0)
    boxes = np.concatenate([generator.uniform(1, 200, (30, 2)), generator.uniform(5, 100, (30, 2))], axis=1)
    write_image(tmp_path / "a.jpg", (400, 300))
    objects = [("dog", stored(*box), 0) for box in boxes.tolist()]
    write_xml(tmp_path / "a.xml", objects, "<size><width>400</width><height>300</height></size>")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


def test_boxes_of_a_smaller_copy_are_scaled(tmp_path, caplog):
    write_devkit(tmp_path, {})
    for name in "abc":
        write_image(tmp_path / "JPEGImages" / f"{name}.jpg", (80, 60))
    assert content(tmp_path)["a"]["bbox"] == [[0, 0, 80, 60], [20, 10, 20, 20]]
    assert "3 of 3 images are not of the size that their annotation says; their boxes are scaled" in caplog.text


@pytest.mark.parametrize(
    ("corners", "expected", "words"),
    [
        ([(0, 5, 19, 28), (3, 1, 38, 29)], [[0, 5, 20, 24], [3, 1, 36, 29]], "1 of 4 xmin .* are 0.*pixels of"),
        (
            [(0, 5, 20, 29), (3, 1, 39, 30)],
            [[0, 5, 20, 24], [3, 1, 36, 29]],
            "1 of 4 xmin .* are 0.*edges, since",
        ),
        ([(3, 2, 40, 29), (3, 1, 39, 30)], [[2, 1, 38, 28], [2, 0, 37, 30]], None),
        ([(0, 5, 20, 29), *[(1, 1, 9, 9)] * 6], [[-1, 4, 21, 25], *[[0, 0, 9, 9]] * 6], None),  # one slip
    ],
)
def test_corners_that_count_from_0_are_recognised_by_all_splits(tmp_path, caplog, corners, expected, words):
    for index, box in enumerate(corners):
        split = "train" if index else "val"  # the box at 0 is in the other one
        write_image(tmp_path / split / f"{index}.jpg")
        write_xml(tmp_path / split / f"{index}.xml", [("dog", box, 0)])
    boxes = [example["objects"]["bbox"] for split in ("val", "train") for example in open_source(tmp_path, split)]
    assert boxes == [[box] for box in expected]
    findings = [finding for finding in open_source(tmp_path).findings if "counted from 0" in finding]
    assert len(findings) == (words is not None)
    assert words is None or re.search(words, findings[0])
