"""Folders of images, with and without folders of classes."""

import logging

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
