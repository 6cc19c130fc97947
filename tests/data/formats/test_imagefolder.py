"""Folders of images, with and without folders of classes."""

import logging
from pathlib import Path

import pytest
from PIL import Image
from sample_data import value_of, write_images

from hf_vlm.data.sources import open_source


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


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_links_to_folders_above_are_not_followed(tmp_path, target, caplog):
    write_images(tmp_path / "data", ["cam/1.png", "cam/2.png"])
    write_images(tmp_path / "other", ["3.png"])
    (tmp_path / "data" / "cam" / "latest").symlink_to(target, target_is_directory=True)
    (tmp_path / "data" / "more").symlink_to("../other", target_is_directory=True)
    (tmp_path / "data" / "again").symlink_to("../other", target_is_directory=True)
    names = [
        Path(e["image"]["path"]).relative_to(tmp_path / "data").as_posix() for e in open_source(tmp_path / "data")
    ]
    assert names == ["again/3.png", "cam/1.png", "cam/2.png", "more/3.png"]
    assert "links to folders above are not followed" in caplog.text
    assert "cam/latest" in caplog.text


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (["images/1.jpg", "images/2.jpg", "masks/1.png", "masks/2.png"], 2),
        (["images/a/1.jpg", "masks/a/1_mask.png", "masks/a/1_other.png"], 2),
        (["7/images/7.png", "7/masks/a.png", "7/masks/b.png", "8/images/8.png"], 2),
        (["photos/1.jpg", "photos/2.jpg", "labels/1_seg.png"], 1),
        (["1.jpg", "1_mask.png", "2_mask.png", "x-thumb.jpg"], 1),  # the others are of no image here
        (["cat/1.jpg", "dog/1.jpg", "cat/thumbs/1.jpg"], 0),  # beside no images
        (["mask/1.jpg", "no mask/1.jpg"], 0),  # classes of faces
    ],
)
def test_masks_beside_images_are_none(tmp_path, names, left_out, caplog):
    write_images(tmp_path, names)
    source = open_source(tmp_path, format="imagefolder")
    assert len(list(source)) == len(names) - left_out
    assert (f"{left_out} of {len(names)} images are masks or thumbnails" in caplog.text) == (left_out > 0)
    assert source.label_names == (["mask", "no mask"] if names[0].startswith("mask") else None)


def test_folders_that_mean_one_split_are_joined(tmp_path):
    write_images(tmp_path, ["train/x/1.png", "train/y/1.png", "val/x/1.png", "valid/y/2.png"])
    source = open_source(tmp_path, "val")
    assert [example["image"]["path"].removeprefix(f"{tmp_path}/") for example in source] == [
        "val/x/1.png",
        "valid/y/2.png",
    ]
    assert [example["label"] for example in source] == [0, 1]


def test_few_images_elsewhere_leave_the_classes_their_labels(tmp_path, caplog):
    write_images(tmp_path, [f"{name}/{index}.png" for name in ("cat", "dog") for index in range(6)])
    write_images(tmp_path, ["overview.png"])
    source = open_source(tmp_path)
    assert (source.label_names, source.num_examples) == (["cat", "dog"], 12)
    assert "1 of 13 images do not lie in a folder of a class and are left out" in caplog.text
    write_images(tmp_path, ["cat/old/1.png", "cat/old/2.png"])
    source = open_source(tmp_path)
    assert (source.label_names, source.num_examples) == (None, 15)
    assert "images have no label: cat, dog would be classes, but 3 of 15 images do not lie in such" in caplog.text


def test_other_files_are_counted_and_named(tmp_path, caplog):
    write_images(tmp_path, ["train/1.png", "train/@eaDir/1.png", "train/__MACOSX/._1.png", "2.png"])
    for name in ("labels.csv", "a.HEIC", "b.heic", "README.md", "Thumbs.db", ".DS_Store"):
        (tmp_path / "train" / name).write_bytes(b"x")
    source = open_source(tmp_path)
    assert source.num_examples == 1
    assert "3 files are no images and are not read, .heic (2), .csv (1): a.HEIC, b.heic, labels.csv" in caplog.text
    assert "images in 2.png are ignored" in caplog.text
    assert len(source.findings) == 2


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
