"""YOLO data sets: layouts, boxes, and what is wrong in them."""

import unicodedata

import numpy as np
import pytest
import yaml
from PIL import Image
from sample_data import on_remote

from hf_vlm.data.formats.yolo import looks_like_yolo, open_yolo
from hf_vlm.data.sources import guess_format, open_source

LABELS = {
    "a": "1 0.5 0.5 1.0 1.0\n0 0.25 0.5 0.1 0.2\n",
    "b": "",
    "c": "2 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.5\n",  # a polygon
}
SIZE = (40, 30)
EXPECTED = {
    "a": [(1, [0, 0, 40, 30]), (0, [8, 12, 4, 6])],
    "b": [],
    "c": [(2, [4, 6, 8, 12])],
}


def write(root, image_folder, label_folder, names="abc", **options):
    for name in names:
        (root / image_folder).mkdir(parents=True, exist_ok=True)
        (root / label_folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE).save(root / image_folder / f"{name}.jpg", **options)
        (root / label_folder / f"{name}.txt").write_text(LABELS[name])


def write_yaml(file, **values):
    file.write_text(yaml.safe_dump({"names": ["cat", "dog", "bird"], **values}))


def content(source, split="train"):
    found = {}
    for example in open_source(source, split, object_masks=False):
        objects = example["objects"]
        boxes = [pytest.approx(box, abs=1e-4) for box in objects["bbox"]]
        found[example["image"]["path"].rpartition("/")[2][0]] = list(zip(objects["category"], boxes))
    return found


@pytest.mark.parametrize("names", [["cat", "dog", "bird"], {0: "cat", 1: "dog", 2: "bird"}])
@pytest.mark.parametrize("path", ["", ".", "/of/another/machine"])
def test_data_yaml(tmp_path, names, path):
    write(tmp_path, "images/train", "labels/train", "ab")
    write(tmp_path, "images/val", "labels/val", "c")
    write_yaml(tmp_path / "data.yaml", path=path, train="images/train", val=["images/val"], names=names)
    assert guess_format(tmp_path) == guess_format(tmp_path / "data.yaml") == "yolo"
    for source in (tmp_path, tmp_path / "data.yaml"):
        assert open_source(source).object_names == ["cat", "dog", "bird"]
        assert content(source) == {name: EXPECTED[name] for name in "ab"}
        assert content(source, "validation") == {"c": EXPECTED["c"]}


def test_lists_of_images(tmp_path, caplog):
    write(tmp_path, "images", "labels")
    (tmp_path / "train.txt").write_text("./images/a.jpg\nimages/c.jpg\n")
    write_yaml(tmp_path / "data.yaml", train="train.txt")
    assert content(tmp_path) == {name: EXPECTED[name] for name in "ac"}
    (tmp_path / "train.txt").write_text("images/a.jpg\nimages/z.jpg\n")
    assert content(tmp_path) == {"a": EXPECTED["a"], "z": []}
    assert f"1 listed images are missing: {tmp_path}/images/z.jpg; they count as" in caplog.text
    assert "background" not in caplog.text
    (tmp_path / "train.txt").write_text("images/y.jpg\nimages/z.jpg\n")
    with pytest.raises(ValueError, match=r"train\.txt lists 2 images that are not there: images/y\.jpg"):
        open_source(tmp_path)
    (tmp_path / "train.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"train\.txt lists no images"):
        open_source(tmp_path)


def test_roboflow(tmp_path):
    write(tmp_path, "train/images", "train/labels", "ab")
    write(tmp_path, "valid/images", "valid/labels", "c")
    write_yaml(tmp_path / "data.yaml", train="../train/images", val="../valid/images", nc=3)
    assert content(tmp_path) == {name: EXPECTED[name] for name in "ab"}
    assert content(tmp_path, "val") == {"c": EXPECTED["c"]}
    (tmp_path / "data.yaml").unlink()
    assert guess_format(tmp_path) == "yolo"
    assert content(tmp_path, "val") == {"c": EXPECTED["c"]}


def test_classes_without_data_yaml(tmp_path):
    write(tmp_path, "images", "labels", "ab")
    assert open_source(tmp_path).object_names == ["0", "1"]
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    assert open_source(tmp_path).object_names == ["cat", "dog", "bird"]
    assert content(tmp_path) == {name: EXPECTED[name] for name in "ab"}


def test_classes_without_names_are_those_of_all_splits(tmp_path):
    write(tmp_path, "images/train", "labels/train", "a")
    write(tmp_path, "images/val", "labels/val", "c")
    assert open_source(tmp_path).object_names == open_source(tmp_path, "val").object_names == ["0", "1", "2"]


def test_images_that_are_stored_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path, "images", "labels", "a", exif=exif)
    assert content(tmp_path) == {"a": [(1, [0, 0, 30, 40]), (0, [6, 16, 3, 8])]}


def test_images_without_labels_and_broken_ones_stay(tmp_path, caplog):
    write(tmp_path, "images", "labels")
    (tmp_path / "labels" / "a.txt").unlink()
    (tmp_path / "images" / "c.jpg").write_bytes(b"no image")
    assert content(tmp_path) == {"a": [], "b": [], "c": []}
    assert "1 of 1 boxes are dropped" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dog 0.5 0.5 0.1 0.1", "must be numbers"),
        ("-1 0.5 0.5 0.1 0.1", "the class -1 must be a number from 0 on"),
        ("0.5 0.5 0.5 0.1 0.1", "the class 0.5 must be a number from 0 on"),
        ("nan 0.5 0.5 0.1 0.1", "the class nan must be a number from 0 on"),
        ("0 20 15 10 10", "must have coordinates of 0 to 1"),
        ("0 nan 0.5 0.1 0.1", "must have coordinates of 0 to 1"),
        ("0 0.5 0.5 0.1", "must have a class and 4 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.3", "must have a class and 4 numbers"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    write(tmp_path, "images", "labels", "a")
    (tmp_path / "labels" / "a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"a\.txt, line 3: .*{message}"):
        open_source(tmp_path)


def test_classes_out_of_range_are_named(tmp_path):
    write(tmp_path, "images", "labels")
    write_yaml(tmp_path / "data.yaml", train="images", names=["cat", "dog"])
    with pytest.raises(ValueError, match=r"1 boxes have a category outside 0\.\.1, .*: 2 of c\.txt"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not yaml"),
        ("train: images", "is no data file of YOLO"),
        ("names: cat", "'names' must be a list"),
        ("names: {0: cat, 2: dog}", "'names' must be a list, or number the classes from 0 on"),
        ("names: [cat]", "names no images"),
        ("names: [cat]\ntrain: nowhere", "names nowhere, which is not there"),
    ],
)
def test_wrong_data_files_are_named(tmp_path, text, message):
    write(tmp_path, "images", "labels")
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"data\.yaml.*{message}"):
        open_source(tmp_path)


def test_all_wrong_lines_are_named_at_once(tmp_path):
    write(tmp_path, "images", "labels", "ab")
    for name in "ab":
        (tmp_path / "labels" / f"{name}.txt").write_text("x\n")
    with pytest.raises(ValueError, match=r"2 lines of labels make no sense: .*a\.txt, line 1: .*b\.txt, line 1: "):
        open_source(tmp_path)


def test_a_split_that_is_not_there_matters_when_it_is_opened(tmp_path):
    write(tmp_path, "images", "labels", "a")
    write_yaml(tmp_path / "data.yaml", train="images", test="../test/images")
    assert content(tmp_path) == {"a": EXPECTED["a"]}
    with pytest.raises(ValueError, match=r"data\.yaml names \.\./test/images, which is not there"):
        open_source(tmp_path, "test")


def test_numbers_name_the_classes_where_names_are_missing(tmp_path):
    write(tmp_path, "images", "labels", "a")
    (tmp_path / "data.yaml").write_text("train: images\nnc: 4\n")
    assert open_source(tmp_path).object_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("data.yaml", "names: [a, a]\ntrain: images", r"data\.yaml: 1 names of classes are used more than once: a"),
        ("data.yaml", "names: [a, b]\nnc: 3\ntrain: images", r"data\.yaml: 'nc' is 3, and 'names' has 2"),
        ("classes.txt", "a\na\n", r"classes\.txt: 1 names of classes are used more than once: a"),
        ("classes.txt", b"caf\xe9", r"classes\.txt is not text in UTF-8"),
        ("labels/a.txt", b"caf\xe9", r"labels/a\.txt is not text in UTF-8"),
    ],
)
def test_wrong_texts_are_named(tmp_path, file, text, message):
    write(tmp_path, "images", "labels", "a")
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


def test_no_file_of_labels_at_all_is_said(tmp_path, caplog):
    write(tmp_path, "images", "label", "a")
    write_yaml(tmp_path / "data.yaml", train="images")
    assert content(tmp_path) == {"a": []}
    assert "no image has a file of labels; looked for" in caplog.text


def test_what_is_not_yolo_is_not_taken_for_it(tmp_path):
    Image.new("L", SIZE).save(tmp_path / "a.png")
    (tmp_path / "data.yaml").write_text("learning_rate: 1")
    (tmp_path / "labels").mkdir()
    Image.new("L", SIZE).save(tmp_path / "labels" / "a.png")
    assert guess_format(tmp_path) == "imagefolder"


@pytest.mark.parametrize("has_yaml", [True, False])
def test_a_remote_folder_opens_as_a_local_one(tmp_path, has_yaml):
    write(tmp_path, "train/images", "train/labels", "ac")
    if has_yaml:
        write_yaml(tmp_path / "data.yaml", train="../train/images")
    with on_remote(tmp_path, "yolo-test") as remote:
        assert looks_like_yolo(remote)
        examples = list(open_yolo(remote, "train"))
    for name, example in zip("ac", examples, strict=True):
        assert example["image"]["path"] == f"memory://yolo-test/train/images/{name}.jpg"
        expected = [pytest.approx(box, abs=1e-4) for _, box in EXPECTED[name]]
        assert example["objects"]["bbox"] == expected


# What is there and not used, or used and not there


def test_images_without_labels_and_labels_without_images_are_counted(tmp_path, caplog):
    write(tmp_path, "images/train", "labels/train", "abc")
    write(tmp_path, "images/val", "labels/val", "a")
    (tmp_path / "images" / "train" / "a.jpg").unlink()
    (tmp_path / "labels" / "train" / "b.txt").unlink()
    (tmp_path / "labels" / "train" / "notes.txt").write_text("not of an image")
    source = open_source(tmp_path)
    assert (
        f"1 of 2 images have no file of labels and count as background: {tmp_path}/images/train/b.jpg" in caplog.text
    )
    assert "1 files of labels are not used" in caplog.text
    assert f"{tmp_path}/labels/train/a.txt" in caplog.text
    assert source.findings == tuple(caplog.messages)


def test_labels_of_other_splits_in_one_folder_are_used(tmp_path, caplog):
    write(tmp_path, "images", "labels")
    (tmp_path / "train.txt").write_text("images/a.jpg\nimages/c.jpg\n")
    (tmp_path / "val.txt").write_text("images/b.jpg\n")
    write_yaml(tmp_path / "data.yaml", train="train.txt", val="val.txt")
    assert content(tmp_path) == {name: EXPECTED[name] for name in "ac"}
    assert not caplog.text


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images", "images"),
        ("some/images/inner", "some/images/inner"),
        ("Images", "Labels"),
        ("Images", "labels"),
        ("some/folder", "some/folder"),
        ("some/folder", "some/folder/labels"),
        ("images/images", "images/labels"),
    ],
)
def test_where_labels_may_be(tmp_path, images, labels, caplog):
    write(tmp_path, images, labels)
    write_yaml(tmp_path / "data.yaml", train=images)
    assert content(tmp_path / "data.yaml") == EXPECTED
    assert not caplog.text


def test_labels_in_the_folder_of_labels_win_over_those_beside(tmp_path, caplog):
    write(tmp_path, "images", "labels")
    (tmp_path / "images" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    assert content(tmp_path) == EXPECTED
    assert (
        f"1 files of labels are not used, for they are of no image or its labels are elsewhere: {tmp_path}/images"
        in (caplog.text)
    )


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_unicode_form(tmp_path, forms, caplog):
    write(tmp_path, "images", "labels", "a")
    for folder, form, suffix in zip(("images", "labels"), forms, ("jpg", "txt")):
        path = tmp_path / folder / f"a.{suffix}"
        path.rename(path.with_name(unicodedata.normalize(form, f"a\u00fc.{suffix}")))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert content(tmp_path) == {"a": EXPECTED["a"]}
    assert not caplog.text


def test_images_that_share_labels_are_refused(tmp_path):
    write(tmp_path, "images", "labels", "a")
    Image.new("RGB", SIZE).save(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match=r"1 files of labels belong to several images: a\.txt of .*a\.jpg, .*a\.png"):
        open_source(tmp_path)


# Names of classes


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [on, off, 010, 12:30, ~, 1.50]", ["on", "off", "010", "12:30", "~", "1.50"]),
        ("names: {'0': cat, '1': dog, 2: no}\nnc: '3'", ["cat", "dog", "no"]),
        ("names:\n  1: dog\n  0: cat\n  2: emu", ["cat", "dog", "emu"]),
        ("\ufeffnames: [a, b, c]\nval:\ntest: null", ["a", "b", "c"]),
    ],
)
def test_names_are_as_they_are_written(tmp_path, text, names):
    write(tmp_path, "images", "labels", "a")
    (tmp_path / "data.yaml").write_text(f"{text}\ntrain: images\n")
    assert open_source(tmp_path).object_names == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a, [b]]", "'names' must be a list"),
        ("names: {0: a, '00': b}", "'names' must be a list, or number the classes from 0 on"),
        ("nc: 2000000000", "'nc' must be a number of classes, at most 100000, not 2000000000"),
        ("nc: many", "'nc' must be a number"),
        ("names: [a, b]\nnc: '3'", "'nc' is 3, and 'names' has 2"),
        ("names: [a, b]\nkpt_shape: 17", r"'kpt_shape' must be \[number of keypoints, 2 or 3\], not 17"),
    ],
)
def test_wrong_names_are_refused(tmp_path, text, message):
    write(tmp_path, "images", "labels", "a")
    (tmp_path / "data.yaml").write_text(f"{text}\ntrain: images\n")
    with pytest.raises(ValueError, match=rf"data\.yaml: {message}"):
        open_source(tmp_path)


def test_numbers_with_holes_are_as_many_classes_as_occur(tmp_path):
    write(tmp_path, "images/train", "labels/train", "a")
    write(tmp_path, "images/val", "labels/val", "b")
    (tmp_path / "labels" / "train" / "a.txt").write_text("30045 0.5 0.5 1 1\n7 0.5 0.5 1 1\n")
    (tmp_path / "labels" / "val" / "b.txt").write_text("30023 0.5 0.5 1 1\n")
    assert open_source(tmp_path).object_names == ["7", "30023", "30045"]
    assert content(tmp_path) == {"a": [(2, [0, 0, 40, 30]), (0, [0, 0, 40, 30])]}
    assert content(tmp_path, "val") == {"b": [(1, [0, 0, 40, 30])]}


# Rows of other tasks and conventions


def test_keypoints_are_no_polygons(tmp_path):
    write(tmp_path, "images", "labels", "a")
    (tmp_path / "labels" / "a.txt").write_text("0 0.25 0.5 0.1 0.2 0.3 0.5 2 0 0 0\n1 0.5 0.5 1 1\n")
    write_yaml(tmp_path / "data.yaml", train="images", kpt_shape=[2, 3])
    assert content(tmp_path) == {"a": [(0, [8, 12, 4, 6]), (1, [0, 0, 40, 30])]}
    (tmp_path / "labels" / "a.txt").write_text("0 0.25 0.5 0.1 0.2 0.3 0.5\n")
    with pytest.raises(
        ValueError, match="must have a class and 4 numbers, or 10 with the keypoints that kpt_shape says"
    ):
        open_source(tmp_path)
    write_yaml(tmp_path / "data.yaml", train="images")
    (tmp_path / "labels" / "a.txt").write_text("0 0.25 0.5 0.1 0.2 0.3 0.5 2 0 0 0\n")
    with pytest.raises(ValueError, match=r"keypoints need kpt_shape in data\.yaml"):
        open_source(tmp_path)


def test_lines_of_one_length_are_named_as_possible_keypoints(tmp_path, caplog):
    write(tmp_path, "images", "labels", "a")
    write_yaml(tmp_path / "data.yaml", train="images", names=["cat"])
    for numbers, said in ((10, True), (8, False)):
        caplog.clear()
        (tmp_path / "labels" / "a.txt").write_text(f"0 {' '.join(['0.25', '0.5'] * (numbers // 2 - 1))} 0.5 1\n" * 10)
        assert len(content(tmp_path)["a"]) == 10
        assert (f"all 10 lines that are longer than a box have {numbers} numbers" in caplog.text) == said


def test_corners_are_refused(tmp_path):
    write(tmp_path, "images", "labels", "a")
    generator = np.random.default_rng(0)
    low = generator.uniform(0, 0.6, (30, 2))
    rows = np.concatenate([low, low + generator.uniform(0.1, 0.4, (30, 2))], axis=1)
    write_yaml(tmp_path / "data.yaml", train="images", names=["cat"])
    (tmp_path / "labels" / "a.txt").write_text("".join(f"0 {' '.join(map(str, row))}\n" for row in rows))
    with pytest.raises(ValueError, match="as centre x, centre y, width, height, while 100% do as corners"):
        open_source(tmp_path)


# What labelling tools export


def test_labelimg(tmp_path, caplog):
    write(tmp_path, ".", ".")
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    assert guess_format(tmp_path) == "yolo"
    assert open_source(tmp_path, object_masks=False).object_names == ["cat", "dog", "bird"]
    assert content(tmp_path) == EXPECTED
    assert not caplog.text


def test_darknet_of_roboflow(tmp_path, caplog):
    for split, names in (("train", "ab"), ("valid", "c")):
        write(tmp_path, split, split, names)
        (tmp_path / split / "_darknet.labels").write_text("cat\ndog\nbird\n")
    (tmp_path / "README.dataset.txt").write_text("about")
    assert guess_format(tmp_path) == "yolo"
    assert open_source(tmp_path).object_names == ["cat", "dog", "bird"]
    assert content(tmp_path) == {name: EXPECTED[name] for name in "ab"}
    assert content(tmp_path, "validation") == {"c": EXPECTED["c"]}


def test_darknet_of_cvat(tmp_path, caplog):
    write(tmp_path, "obj_train_data", "obj_train_data")
    (tmp_path / "obj.names").write_text("cat\ndog\nbird\n")
    (tmp_path / "obj.data").write_text(
        "classes = 3\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n"
    )
    (tmp_path / "train.txt").write_text("".join(f"data/obj_train_data/{name}.jpg\n" for name in "abc"))
    assert guess_format(tmp_path) == "yolo"
    assert open_source(tmp_path, object_masks=False).object_names == ["cat", "dog", "bird"]
    assert content(tmp_path) == EXPECTED
    assert not caplog.text


def test_label_studio(tmp_path):
    write(tmp_path, "images", "labels")
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    (tmp_path / "notes.json").write_text('{"categories": [{"id": 0, "name": "cat"}], "info": {"year": 2024}}')
    assert guess_format(tmp_path) == "yolo"
    assert content(tmp_path) == EXPECTED


def test_a_yaml_of_any_name(tmp_path):
    write(tmp_path, "images/train", "labels/train")
    write_yaml(tmp_path / "animals.yaml", train="images/train")
    (tmp_path / "training.yaml").write_text("train: 3\n")
    assert open_source(tmp_path).object_names == ["cat", "dog", "bird"]


def test_captions_beside_images_are_no_labels(tmp_path):
    write(tmp_path, ".", ".", "a")
    (tmp_path / "a.txt").write_text("A cat on a mat.\n")
    assert guess_format(tmp_path) == "imagefolder"


def test_lists_of_windows(tmp_path):
    write(tmp_path, "images", "labels")
    (tmp_path / "train.txt").write_text("C:\\data\\images\\a.jpg\r\nC:\\data\\images\\c.jpg\r\n")
    write_yaml(tmp_path / "data.yaml", train="C:\\data\\train.txt", path="C:\\data", val="/data/val/images")
    assert content(tmp_path) == {name: EXPECTED[name] for name in "ac"}
    with pytest.raises(ValueError, match="names /data/val/images, which is not there"):  # and not images/ instead
        content(tmp_path, "val")
