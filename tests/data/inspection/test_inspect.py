"""The statistics of generated data are exact, and what is wrong with it is found and named."""

import io
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_vlm.data.inspection import splits
from hf_vlm.data.inspection.duplicates import near_duplicates
from hf_vlm.data.inspection.inspect import format_report, inspect_source
from hf_vlm.data.schema import image_feature, objects_feature
from hf_vlm.data.source import Source
from hf_vlm.data.sources import open_source

BASE = {"image": image_feature(), "image_id": datasets.Value("int64")}


def picture(seed, width=80, height=60):
    """Soft blobs: unlike any other seed's."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def source_of(images, features=None, **columns):
    """A source of encoded images named 0.png, 1.png, ..., or of (name, bytes)."""
    named = [image if isinstance(image, tuple) else (f"{row}.png", image) for row, image in enumerate(images)]
    examples = [
        {
            "image": {"bytes": data, "path": name},
            "image_id": row,
            **{column: values[row] for column, values in columns.items()},
        }
        for row, (name, data) in enumerate(named)
    ]
    schema = datasets.Features(BASE | (features or {}))
    return Source(dataset=datasets.IterableDataset.from_generator(lambda: iter(examples), features=schema))


def objects_of(*boxes):
    return {
        "bbox": [list(box) for _, box in boxes],
        "category": [category for category, _ in boxes],
        "area": [box[2] * box[3] for _, box in boxes],
        "iscrowd": [0] * len(boxes),
    }


def found(report):
    return {issue.what: (issue.count, issue.where) for issue in report.issues}


def test_sizes_formats_and_bytes_are_those_of_the_files():
    files = [
        encoded(picture(0, 80, 60)),
        encoded(picture(1, 100, 50), "JPEG"),
        encoded(picture(2, 40, 120).convert("L")),
        encoded(picture(3, 600, 300), "JPEG", exif=turned_exif()),
    ]
    report = inspect_source(source_of(files))
    assert (report.num_images, report.is_complete, report.columns) == (4, True, ["image", "image_id"])
    assert report.formats == {"PNG RGB": 1, "JPEG RGB": 2, "PNG L": 1}
    assert (report.width.min, report.width.median, report.width.max) == (40, 90, 300)  # the last one is upright
    assert (report.height.min, report.height.median, report.height.max) == (50, 90, 600)
    assert report.aspect_ratio.max == 2.0
    assert report.total_pixels == 80 * 60 + 100 * 50 + 40 * 120 + 600 * 300
    sizes = [len(file) for file in files]
    assert (report.median_bytes, report.total_bytes) == (np.median(sizes), sum(sizes))
    assert report.label_counts is None
    assert report.boxes is None
    assert not report.issues


def turned_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_files_that_cannot_be_read_are_named_with_the_reason(tmp_path):
    whole = encoded(picture(0, 400, 400), "JPEG")
    files = {"good.jpg": whole, "cut.jpg": whole[: len(whole) // 2], "empty.png": b"", "text.jpg": b"not an image"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    readable = []
    report = inspect_source(
        open_source(tmp_path), on_example=lambda example: readable.append(example["image"]["path"])
    )
    assert report.num_images == 1
    assert readable == [str(tmp_path / "good.jpg")]
    reasons = {image.name: image.reason for image in report.unreadable}
    assert set(reasons) == {str(tmp_path / name) for name in ("cut.jpg", "empty.png", "text.jpg")}
    assert "truncated" in reasons[str(tmp_path / "cut.jpg")]
    assert reasons[str(tmp_path / "empty.png")] == "no bytes"
    assert f"{tmp_path / 'text.jpg'}: not an image of a known format" in format_report(report)


def test_data_of_bad_files_alone_is_reported_too():
    report = inspect_source(source_of([("a.png", b"x"), ("b.png", b"y")]))
    assert (report.num_images, len(report.unreadable), report.width) == (0, 2, None)
    json.dumps(report.as_json(), allow_nan=False)
    assert "a.png" in format_report(report)


def test_equal_files_and_near_duplicates_are_distinguished():
    original = picture(0, 320, 240)
    files = {
        "original.png": encoded(original),
        "other.png": encoded(picture(1, 320, 240)),
        "copy.png": encoded(original),
        "again.jpg": encoded(original, "JPEG", quality=60),
        "small.png": encoded(original.resize((160, 120))),
        "mirrored.png": encoded(original.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        "recoloured.png": encoded(Image.merge("RGB", [band.point(lambda v: v // 2) for band in original.split()])),
    }
    report = inspect_source(source_of(list(files.items())))
    assert report.exact_duplicates == [["original.png", "copy.png"]]
    assert report.near_duplicates == [["original.png", "again.jpg", "small.png"]]
    text = format_report(report)
    assert "original.png = copy.png" in text
    assert "original.png = again.jpg = small.png" in text


@pytest.mark.parametrize(("num_bits", "levels"), [(10, 4), (12, 16), (14, 64)])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_images_that_use_a_small_part_of_their_range_are_named(num_bits, levels, format):
    noise = np.random.default_rng(0).integers(0, 2**num_bits, (40, 40)).astype(np.uint16)
    files = [encoded(Image.fromarray(noise), format), encoded(Image.fromarray(noise << (16 - num_bits)), format)]
    ((what, (count, where)),) = found(inspect_source(source_of([*files, encoded(picture(1))]))).items()
    assert (count, where) == (1, ["0.png"])
    assert f"use the darkest {levels} of 256 levels, as 12 bits stored in 16" in what


def test_images_of_one_colour_are_named_and_no_duplicates_of_each_other():
    dot = Image.new("RGB", (64, 64), "black")
    dot.paste("white", (10, 10, 14, 14))
    other = Image.new("RGB", (64, 64), "black")
    other.paste("white", (50, 40, 54, 44))
    files = [encoded(Image.new("RGB", (64, 64), (9, 9, value))) for value in (10, 11)]
    report = inspect_source(source_of([*files, encoded(dot), encoded(other)]))
    assert found(report) == {"images of one colour": (2, ["0.png", "1.png"])}
    assert not report.near_duplicates


def test_pairs_within_two_bits_are_found_as_by_comparing_all():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 3000, dtype=np.uint64)
    for row in range(1000):  # copies with 0 to 4 flipped bits
        flips = generator.choice(64, row % 5, replace=False)
        hashes[2000 + row] = hashes[row] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=0)
    colors = np.zeros((3000, 2, 2, 3), dtype=np.uint8)
    expected = [[row, 2000 + row] for row in range(1000) if row % 5 <= 2]
    assert near_duplicates(hashes, colors) == expected
    colors[2000:2500] += 13  # more levels than copies differ by
    assert near_duplicates(hashes, colors) == [pair for pair in expected if pair[1] >= 2500]


def test_many_frames_of_a_still_scene_are_one_group():
    hashes = np.full(20_000, 12345, dtype=np.uint64)
    groups = near_duplicates(hashes, np.zeros((len(hashes), 2, 2, 3), dtype=np.uint8))
    assert [len(group) for group in groups] == [20_000]


def test_labels_are_counted_and_their_gaps_named():
    features = {"label": datasets.ClassLabel(names=["cat", "dog", "emu"])}
    files = [encoded(picture(row)) for row in range(5)]
    report = inspect_source(source_of(files, features, label=[1, 1, 0, -1, 1]))
    assert report.label_counts == {"cat": 1, "dog": 3, "emu": 0}
    assert found(report) == {"images without a label": (1, ["3.png"]), "classes without an image": (1, ["emu"])}
    assert "3; the largest has 3 times the images of the smallest" in format_report(report)


def test_boxes_are_measured_against_the_decoded_image():
    features = {"objects": objects_feature(["ant", "bee", "cat"])}
    files = [encoded(picture(row, 400, 100)) for row in range(3)]
    objects = [
        objects_of((0, (0, 0, 20, 20)), (1, (10, 10, 50, 50)), (0, (100, 0, 100, 100))),
        objects_of(),
        objects_of((1, (390, 90, 20, 20))),  # of which 10 x 10 remain
    ]
    boxes = inspect_source(source_of(files, features, objects=objects)).boxes
    assert (boxes.num_boxes, boxes.num_images_without) == (4, 1)
    assert (boxes.per_image.min, boxes.per_image.median, boxes.per_image.max) == (0, 1, 3)
    assert boxes.class_counts == {"ant": 2, "bee": 2, "cat": 0}
    assert boxes.size_fractions == {"small": 0.5, "medium": 0.25, "large": 0.25}
    assert boxes.relative_size.min == pytest.approx(10 / 200)
    assert boxes.relative_size.median == pytest.approx((20 + 50) / 2 / 200)
    assert boxes.relative_size.max == pytest.approx(100 / 200)
    assert boxes.small_relative_size == pytest.approx((20 + 10) / 2 / 200)
    assert boxes.patches_wanted == 27  # 2 / 0.075


@pytest.mark.parametrize(
    ("sides", "advice"),
    [
        ((20, 20, 20), "--image_size 320 with patches of 16 or 160 with patches of 8"),  # 20 patches of 10 pixels
        ((100, 100, 100), "--image_size 64 with patches of 16 or 32 with patches of 8"),
        ((2, 2, 2), "200 patches per side; cut the images into tiles first"),
        ((50, *[100] * 30), "--image_size 64 with patches"),  # one in thirty does not decide
    ],
)
def test_advice_shows_the_small_objects(sides, advice):
    features = {"objects": objects_feature(["ant"])}
    files = [encoded(picture(row, 200, 200)) for row in range(len(sides))]
    objects = [objects_of((0, (0, 0, side, side))) for side in sides]
    assert advice in format_report(inspect_source(source_of(files, features, objects=objects)))


def test_boxes_that_make_no_sense_are_found():
    features = {"objects": objects_feature(["ant", "bee"])}
    wrong = {
        "boxes without a class": [(-1, (0, 0, 9, 9))],
        "boxes without a width or a height": [(0, (5, 5, 0, 9)), (0, (5, 5, 9, -4)), (0, (float("nan"), 5, 9, 9))],
        "boxes outside their image": [(0, (80, 5, 9, 9))],
        "boxes that stick out of their image": [(0, (75, 5, 9, 9)), (0, (-3, 5, 9, 9))],
        "boxes with a side below 2 px": [(0, (5, 5, 1.5, 9))],
        "boxes annotated twice": [
            (0, (1, 2, 3, 4)),
            (1, (1, 2, 3, 4)),
            (0, (1, 2, 3, 4)),
        ],
    }
    fine = [(0, (0, 0, 80, 60)), (0, (71.4, 0, 9, 9))]  # the second one sticks out by less than rounding may
    files = [encoded(picture(row)) for row in range(len(wrong) + 2)]
    objects = [objects_of(*boxes) for boxes in [*wrong.values(), fine, [(0, (1, 2, 3, 4))]]]
    report = inspect_source(source_of(files, features, objects=objects))
    counts = {what: len(boxes) for what, boxes in wrong.items()} | {"boxes annotated twice": 1}
    assert found(report) == {what: (counts[what], [f"{row}.png"]) for row, what in enumerate(wrong)}


def test_boxes_of_the_unturned_picture_are_explained():
    features = {"objects": objects_feature(["ant"])}
    files = [encoded(picture(row), "JPEG", exif=turned_exif()) for row in range(2)]  # 60 pixels wide when upright
    objects = [objects_of((0, (50, 5, 25, 30))), objects_of((0, (5, 5, 25, 30)))]
    (what,) = found(inspect_source(source_of(files, features, objects=objects)))
    assert what.startswith("boxes that stick out")
    assert "EXIF" in what


def test_masks_of_another_size_are_named():
    features = {"mask": image_feature()}
    files = [encoded(picture(row)) for row in range(3)]
    masks = [Image.new("L", (80, 60)), Image.new("L", (60, 80)), None]
    encoded_masks = [{"bytes": encoded(mask) if mask else b"nothing", "path": None} for mask in masks]
    report = inspect_source(source_of(files, features, mask=encoded_masks))
    what = "images whose mask is not of their size, or cannot be read"
    assert found(report) == {what: (2, ["1.png", "2.png"])}


def test_pixels_of_masks_are_counted_by_class():
    masks = [np.zeros((60, 80), np.uint8), np.full((60, 80), 2, np.uint8)]
    masks[0][:15] = 1
    masks[0][:, :8] = 255
    masks[1][:2] = [[7], [200]]
    columns = {"mask": [{"bytes": encoded(Image.fromarray(mask)), "path": None} for mask in masks]}
    source = source_of([encoded(picture(row)) for row in range(2)], {"mask": image_feature()}, **columns)
    report = inspect_source(replace(source, mask_class_names=("road", "car", "sky", "tree")))
    counts = [np.count_nonzero(np.stack(masks) == value) for value in range(4)]
    assert report.masks.class_pixels == dict(zip(("road", "car", "sky", "tree"), counts))
    assert report.masks.class_images == {"road": 1, "car": 1, "sky": 1, "tree": 0}
    assert report.masks.pixels_without_class == 60 * 8
    assert found(report) == {
        "pixels of masks with values that are none of the 4 classes: 7, 200": (160, ["1.png"]),
        "classes without a pixel": (1, ["tree"]),
    }
    text = format_report(report)
    assert "9.44 k in all, 5.1% without a class" in text
    assert f"sky   {counts[2] / (sum(counts) + 480):.2%}" in text
    unnamed = inspect_source(source)
    assert unnamed.masks.class_pixels == {str(v): np.count_nonzero(np.stack(masks) == v) for v in (0, 1, 2, 7, 200)}
    assert not unnamed.issues


def test_objects_with_masks_are_counted():
    objects = objects_of((0, [2, 2, 9, 9]), (0, [20, 20, 9, 9]), (0, [40, 20, 9, 9]))
    objects["segmentation"] = ["[[2,2,11,2,11,11]]", "", '{"size":[60,80],"counts":[5,5]}']
    source = source_of([encoded(picture(0))], {"objects": objects_feature(["ant"], has_masks=True)}, objects=[objects])
    report = inspect_source(source)
    assert report.boxes.num_masks == 2
    assert "of 2 objects" in format_report(report)
    assert inspect_source(source.without_object_masks()).boxes.num_masks is None


def test_the_first_examples_are_those_of_the_stream():
    files = [encoded(picture(row)) for row in range(70)]
    seen = []
    report = inspect_source(source_of(files), 66, lambda example: seen.append(example["image_id"]))
    assert (report.num_images, report.is_complete, seen) == (66, False, list(range(66)))
    assert "66, the first of the data" in format_report(report)
    assert inspect_source(source_of(files), 70).is_complete
    with pytest.raises(ValueError, match="num_examples=0"):
        inspect_source(source_of(files), 0)
    with pytest.raises(ValueError, match="no example"):
        inspect_source(source_of([]))


def test_examples_without_a_path_are_named_by_id():
    report = inspect_source(source_of([(None, b"x"), (None, encoded(Image.new("L", (9, 9))))]))
    assert report.unreadable[0].name == "image_id 0"
    assert report.issues[0].where == ["image_id 1"]


def test_of_many_classes_the_largest_and_the_smallest_are_shown():
    names = [f"class{index:02}" for index in range(40)]
    labels = [index for index in range(40) for _ in range(40 - index)]
    files = [encoded(picture(0, 8, 8))] * len(labels)
    report = inspect_source(source_of(files, {"label": datasets.ClassLabel(names=names)}, label=labels))
    text = format_report(report)
    assert text.count("class0") == 10
    assert "... 25 more classes" in text
    assert [name for name in names[10:] if name in text] == names[-5:]


def test_the_report_is_plain_json(tmp_path):
    report = inspect_source(open_source("scenes:easy", num_samples=5))
    content = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert content == report.as_json()
    assert content["width"] == {"min": 48, "median": 48, "max": 48}
    assert sum(content["boxes"]["class_counts"].values()) == content["boxes"]["num_boxes"]


def test_boxes_of_another_convention_are_named_instead_of_an_advice():
    corners = [[60 + row, 40.0, 76.0, 56.0] for row in range(12)]
    files = [encoded(picture(row)) for row in range(12)]
    features = {"objects": objects_feature(["a"])}
    report = inspect_source(source_of(files, features, objects=[objects_of((0, box)) for box in corners]))
    (what,) = [what for what in found(report) if "while 100% do as corners" in what]
    assert found(report)[what] == (12, [])
    assert "patches" not in format_report(report)
    right = [[x, y, right - x, bottom - y] for x, y, right, bottom in corners]
    report = inspect_source(source_of(files, features, objects=[objects_of((0, box)) for box in right]))
    assert "patches" in format_report(report)
    assert not report.issues


def test_classes_of_another_split_are_compared():
    files = [encoded(picture(row)) for row in range(2)]
    make = lambda names: source_of(files[:1], {"label": datasets.ClassLabel(names=names)}, label=[0])  # noqa: E731
    for names, what, where in (
        (["b", "a"], "classes of labels that are in another order in split ''", ["b", "a"]),
        (["a", "c"], "classes of labels that are not the same in split ''", ["b", "c"]),
    ):
        report = inspect_source(make(["a", "b"]), other_splits=[make(names)])
        assert found(report)[what] == (2, where)
        assert found(report)["images that split '' holds too, byte for byte"] == (1, ["0.png"])


def test_images_that_another_split_holds_stored_otherwise_are_named():
    pictures = [picture(row, 320, 240) for row in range(6)]
    one_color = encoded(Image.new("RGB", (32, 32), "red"))
    source = source_of([*map(encoded, pictures[:5]), one_color, encoded(pictures[3], "JPEG")])
    other = source_of(
        [
            encoded(pictures[0], "JPEG", quality=60),
            encoded(pictures[1].resize((160, 120))),
            encoded(pictures[2].transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
            encoded(pictures[3]),
            encoded(pictures[5]),
            encoded(Image.new("RGB", (48, 48), "red")),
            b"no image",
        ]
    )
    assert found(inspect_source(source, other_splits=[other])) == {
        "images of one colour": (1, ["5.png"]),
        "images that split '' holds too, byte for byte": (1, ["3.png"]),
        "images that look the same as images of split ''": (3, ["0.png", "1.png", "6.png"]),
    }
    assert len(inspect_source(source, other_splits=[source_of([b"x"])]).issues) == 1


def test_another_split_is_held_in_memory_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(splits, "BATCH_SIZE", 2)
    images = [encoded(picture(row)) for row in range(40)]
    read, most = [], []

    class Other(Source):
        def __iter__(self):
            for example in super().__iter__():
                read.append(example)
                yield example

    def rows(batch, original=splits._rows):
        most.append(len(read))
        return original(batch)

    monkeypatch.setattr(splits, "_rows", rows)
    other = Other(dataset=source_of(images).dataset)
    report = inspect_source(source_of(images[39:]), other_splits=[other])
    assert found(report) == {"images that split '' holds too, byte for byte": (1, ["0.png"])}
    assert (len(read), min(most)) == (40, splits.NUM_THREADS * 2)
