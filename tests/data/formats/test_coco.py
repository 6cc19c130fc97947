"""COCO json files, local and on remote file systems."""

import json
import logging
import unicodedata

import fsspec
import pytest
from sample_data import HEIGHT, WIDTH, assert_coco_examples, make_coco, png, write_coco

from hf_vlm.data.formats.coco import find_coco_files, open_coco
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.sources import guess_format, open_source
from hf_vlm.data.stream import ExampleStream


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train.json", "images/train"),
        ("annotations/instances_train.json", "images"),
        ("annotations/train.json", "."),
        ("train/_annotations.coco.json", "train"),
        ("_annotations.coco.json", "."),
        ("train.json", "train"),
        ("labels.json", "images"),
    ],
)
def test_coco_layouts(tmp_path, file, images):
    write_coco(tmp_path / file, tmp_path / images)
    (tmp_path / "dataset_infos.json").write_text('{"default": 1}')
    assert_coco_examples(open_source(tmp_path))
    assert_coco_examples(open_source(tmp_path / file, format="coco"))


def test_coco_splits(tmp_path):
    write_coco(tmp_path / "annotations" / "instances_train2017.json", tmp_path / "train2017", num_images=4)
    write_coco(tmp_path / "annotations" / "instances_val2017.json", tmp_path / "val2017", num_images=2)
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{}")
    assert_coco_examples(open_source(tmp_path), 4)
    assert_coco_examples(open_source(tmp_path, "val"), 2)
    assert_coco_examples(open_source(tmp_path / "annotations" / "instances_val2017.json", "validation"), 2)
    with pytest.raises(ValueError, match=r"has no split 'test'; it has train, validation"):
        open_source(tmp_path, "test")
    with pytest.raises(ValueError, match=r"instances_val2017\.json has no split 'train'; it has validation"):
        open_source(tmp_path / "annotations" / "instances_val2017.json")


def test_coco_images_without_boxes_stay(tmp_path):
    content = make_coco(3)
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] != 53]
    write_coco(tmp_path / "a.json", tmp_path, content, num_images=3)
    examples = list(open_source(tmp_path))
    assert [len(example["objects"]["bbox"]) for example in examples] == [1, 0, 3]


def test_coco_without_annotations_is_unlabelled(tmp_path, caplog):
    content = make_coco(3)
    del content["annotations"]
    write_coco(tmp_path / "a.json", tmp_path, content, num_images=3)
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    assert set(source.features) == {"image", "image_id"}
    assert "has no annotations: its images are used without labels" in caplog.text


def test_coco_group_of_roboflow_is_no_class(tmp_path):
    content = make_coco(4)
    for category in content["categories"]:
        category["supercategory"] = "bee"
    content["categories"].insert(0, {"id": 0, "name": "bee", "supercategory": "none"})
    write_coco(tmp_path / "train" / "_annotations.coco.json", tmp_path / "train", content, num_images=4)
    assert_coco_examples(open_source(tmp_path), 4)


def test_coco_boxes_are_checked(tmp_path, caplog):
    content = make_coco(4)
    content["annotations"][0]["bbox"] = [3, 3, 0, 5]
    content["annotations"][1]["bbox"] = [-20, 0, 5, 5]
    content["annotations"][2]["bbox"] = [10, 10, 50, 50]
    content["categories"].append({"id": 100, "name": "dog"})
    write_coco(tmp_path / "a.json", tmp_path, content, num_images=4)
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    (message,) = caplog.messages
    assert "2 of 7 boxes are dropped" in message
    assert "annotation 1 [3.0, 3.0, 0.0, 5.0], annotation 2 [-20.0, 0.0, 5.0, 5.0]" in message
    assert "1 boxes stick out of their image and will be clipped: annotation 3" in message
    assert "1 of 4 classes have no box: dog" in message
    assert [len(example["objects"]["bbox"]) for example in source] == [0, 1, 3, 1]


def change(content, key, index, **values):
    """The content with values of one of its records changed; None removes them."""
    record = {**content[key][index], **values}
    content[key][index] = {name: value for name, value in record.items() if value is not None}
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (change(make_coco(), "annotations", 2, category_id=3), r"1 annotations have a category_id .* ids 3"),
        (change(make_coco(), "annotations", 0, image_id=1), r"1 annotations have a image_id .* ids 1"),
        (
            change(make_coco(), "annotations", 4, bbox=None),
            r"a\.json: 1 objects .*: annotation 5 has no bbox",
        ),
        (
            change(make_coco(), "annotations", 4, bbox=[1, 2, 3]),
            r"annotation 5 has the bbox \[1, 2, 3\]; it needs",
        ),
        (change(make_coco(), "images", 1, id=50), r"1 image ids are used more than once: 50"),
        (change(make_coco(), "images", 1, file_name="0.png"), r"1 images are listed more than once, .*: 0\.png\. "),
        (change(make_coco(), "images", 1, id=None), r"every image needs 'id' and 'file_name'; one has file_name"),
        (change(make_coco(), "annotations", 2, category_id=[1]), r"1 annotations have a category_id .* ids 3"),
        (change(make_coco(), "images", 1, id=[1]), r"every image needs 'id' and 'file_name'; one has id: \[1\]"),
        (change(make_coco(), "images", 1, file_name=7), r"every image needs 'id' and 'file_name'; one has id: 53"),
        (make_coco(annotations={}, categories=[3]), r"'categories' must be a list of objects in braces"),
        (make_coco(annotations=7), r"'annotations' must be a list of objects in braces"),
        (change(make_coco(), "categories", 1, name="ant"), r"1 names of categories are used more than once: ant"),
        (change(make_coco(), "categories", 1, name=None), r"every category needs 'id' and 'name'; one is \{'id': 2\}"),
        ({"images": []}, r"a\.json lists no images"),
        ({"license": 1}, r"is not a COCO json: it must hold a list 'images'; it holds license"),
        ([1], r"is not a COCO json: .* it holds a list"),
    ],
)
def test_coco_mistakes_are_named(tmp_path, content, message):
    write_coco(tmp_path / "a.json", tmp_path, content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "a.json")


def test_a_missing_image_is_a_bad_image(tmp_path, caplog):
    write_coco(tmp_path / "a.json", tmp_path, change(make_coco(4), "images", 2, file_name="no.png"), num_images=4)
    source = open_source(tmp_path)
    assert source.num_examples == 4
    assert "a.json: 1 of 4 images are missing: no.png; they count as images that cannot be read" in caplog.text
    assert source.findings == tuple(caplog.messages)
    stream = ExampleStream(source.dataset, decoded, repeat=False, shuffle=False, max_bad_fraction=0.25)
    assert [example["image_id"] for example in stream] == [50, 53, 59]
    with pytest.raises(ValueError, match=r"1 of 4 images .*no\.png"):
        list(ExampleStream(source.dataset, decoded, repeat=False, max_bad_fraction=0.2))


def decoded(example, rng):
    decode_image(example["image"])
    return example


@pytest.mark.parametrize(
    "name",
    ["images\\{}", "C:\\data\\set\\images\\{}", "/data/set/images/{}", "../../media/{}", "set/images/{}", "{}"],
)
def test_names_may_be_paths_of_another_machine(tmp_path, name, caplog):
    content = make_coco(3)
    for row, image in enumerate(content["images"]):
        image["file_name"] = name.format(f"{row}.png")
    write_coco(tmp_path / "result.json", tmp_path / "images", content, num_images=3)
    assert_coco_examples(open_source(tmp_path), 3)
    assert not caplog.text


def test_names_that_mean_one_image_are_refused(tmp_path):
    content = make_coco(3)
    for image, name in zip(content["images"], ["/x/a/0.png", "/x/b/0.png", "/x/b/2.png"]):
        image["file_name"] = name
    write_coco(tmp_path / "a.json", tmp_path, content, num_images=3)
    with pytest.raises(ValueError, match=r"1 names mean several images of .*: /x/a/0\.png and /x/b/0\.png"):
        open_source(tmp_path)
    for name in ("a/0.png", "b/0.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name[2:]).rename(tmp_path / name) if name != "b/0.png" else (tmp_path / name).write_bytes(png(9))
    assert [example["image"]["path"] for example in open_source(tmp_path)] == [
        str(tmp_path / name) for name in ("a/0.png", "b/0.png", "b/2.png")
    ]


def test_names_in_another_unicode_form_or_case(tmp_path):
    content = make_coco(2)
    for image, name in zip(content["images"], [unicodedata.normalize("NFC", "v\u00e9lo.png"), "Img.PNG"]):
        image["file_name"] = name
    write_coco(tmp_path / "a.json", tmp_path, content, num_images=2)
    (tmp_path / "0.png").rename(tmp_path / unicodedata.normalize("NFD", "v\u00e9lo.png"))
    (tmp_path / "1.png").rename(tmp_path / "img.png")
    assert_coco_examples(open_source(tmp_path), 2)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(tmp_path, encoding):
    write_coco(tmp_path / "instances_train.json", tmp_path, num_images=2)
    text = json.dumps(make_coco(2))
    (tmp_path / "instances_train.json").write_bytes(text.encode(encoding))
    assert guess_format(tmp_path) == "coco"
    assert_coco_examples(open_source(tmp_path), 2)


def test_images_that_are_not_listed_are_counted(tmp_path, caplog):
    write_coco(tmp_path / "a.json", tmp_path, make_coco(2), num_images=4)
    open_source(tmp_path)
    assert f"2 images of {tmp_path} are not listed and not used: 2.png, 3.png" in caplog.text


SQUARE = [2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    "segmentation",
    [
        [[2, 3, 6, 3, 6, 8, 2, 8]],
        [[2, 3, 3, 3, 3, 8, 2, 8], [5, 4, 6, 4, 6, 5]],
        [2, 3, 6, 3, 6, 8, 2, 8],
        {"size": [HEIGHT, WIDTH], "counts": [27, 5, 7, 5, 7, 5, 7, 5, 124]},
        {"size": [HEIGHT, WIDTH], "counts": "k05700000e3"},
    ],
)
@pytest.mark.parametrize("missing", [{}, {"bbox": None}, {"bbox": []}])
def test_boxes_of_segmentations(tmp_path, segmentation, missing):
    content = make_coco(1)
    content["annotations"] = [{"id": 1, "image_id": 50, "category_id": 2, "segmentation": segmentation, **missing}]
    write_coco(tmp_path / "a.json", tmp_path, content, num_images=1)
    (example,) = open_source(tmp_path)
    assert example["objects"]["bbox"] == [SQUARE]


MASKS = [
    ([[2, 3, 6, 3, 6, 8, 2, 8]], "[[2.0,3.0,6.0,3.0,6.0,8.0,2.0,8.0]]"),
    ({"size": [HEIGHT, WIDTH], "counts": "k05700000e3"}, f'{{"size":[{HEIGHT},{WIDTH}],"counts":"k05700000e3"}}'),
    ([], ""),
    ({"size": [HEIGHT, WIDTH], "counts": [0, 500]}, ""),  # longer than its image
]


def write_coco_masks(folder, segmentations):
    """A COCO json, as labelling tools export it, of one image with an object for each segmentation."""
    content = make_coco(1)
    content["annotations"] = [
        {"id": i, "image_id": 50, "category_id": 2, "bbox": [2, 3, 4, 5], "iscrowd": 0, "segmentation": segmentation}
        for i, segmentation in enumerate(segmentations)
    ]
    write_coco(folder / "annotations" / "instances_default.json", folder / "images", content, num_images=1)


def test_masks_of_objects_are_text(tmp_path, caplog):
    write_coco_masks(tmp_path, [stored for stored, _ in MASKS])
    source = open_source(tmp_path)
    assert source.has_object_masks
    (example,) = source
    assert example["objects"]["segmentation"] == [text for _, text in MASKS]
    assert source.features.encode_example(example) == example
    finding, _ = source.findings
    assert "2 of 4 objects have no mask, or one that is empty or broken" in finding
    assert "annotation 2, annotation 3" in finding
    unmasked = open_source(tmp_path, object_masks=False)
    assert not unmasked.has_object_masks
    assert list(unmasked) == list(source.without_object_masks())
    assert unmasked.features == source.without_object_masks().features
    assert "no mask" not in str(unmasked.findings)


def test_a_source_without_masks_says_so(tmp_path):
    write_coco_masks(tmp_path, [[], None])
    source = open_source(tmp_path)
    assert not source.has_object_masks
    assert "segmentation" not in next(iter(source))["objects"]
    assert "no mask" not in str(source.findings)


def test_coco_files_that_do_not_fit(tmp_path):
    write_coco(tmp_path / "a.json", tmp_path / "elsewhere", num_images=2)
    with pytest.raises(ValueError, match=r"the image 0\.png is in none of the folders .*images"):
        open_source(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"b\.json is not json: Expecting property name"):
        open_source(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"elsewhere holds no COCO json; it holds 0\.png, 1\.png"):
        open_source(tmp_path / "elsewhere", format="coco")
    write_coco(tmp_path / "two" / "a.json", tmp_path / "two")
    write_coco(tmp_path / "two" / "b.json", tmp_path / "two")
    with pytest.raises(ValueError, match=r"several COCO files for the split 'train': .*a\.json, .*b\.json"):
        open_source(tmp_path / "two")


@pytest.fixture
def remote():
    """An empty folder of a remote file system."""
    upath = pytest.importorskip("upath")
    yield upath.UPath("memory://boxed-test")
    fsspec.filesystem("memory").rm("/boxed-test", recursive=True)


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_train.json", "images/train/"),
        ("labels.json", ""),
        ("train/_annotations.coco.json", "train/"),
    ],
)
def test_remote_coco(remote, file, images, caplog):
    content = {
        "images": [{"id": 5, "file_name": "a.jpg"}, {"id": 7, "file_name": "b.jpg"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 3, "name": "cat"}],
    }
    for name, text in ((file, json.dumps(content)), (f"{images}a.jpg", "x"), (f"{images}b.jpg", "x")):
        (remote / name).parent.mkdir(parents=True, exist_ok=True)
        (remote / name).write_text(text)
    assert find_coco_files(remote) == [remote / file]
    for source in (remote, remote / file):
        first, second = open_coco(source, "train")
        assert (first["image_id"], first["objects"]["bbox"]) == (5, [])
        assert second["objects"]["bbox"] == [[1, 2, 3, 4]]
        assert second["image"]["path"] == f"memory://boxed-test/{images}b.jpg"
    (remote / f"{images}b.jpg").unlink()
    assert len(list(open_coco(remote, "train"))) == 2
    assert "1 of 2 images are missing: b.jpg; they count as images that cannot be read" in caplog.text
