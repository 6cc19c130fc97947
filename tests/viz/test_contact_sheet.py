"""Examples are rendered with their own boxes, masks and labels."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_vlm.data.schema import image_feature, objects_feature
from hf_vlm.viz.contact_sheet import SIDE, Reservoir, example_sheet, render_example
from hf_vlm.viz.sheets import captioned, class_color, legend

GREY = (90, 90, 90)
BASE = {"image": image_feature(), "image_id": datasets.Value("int64")}


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def example_of(width=640, height=320, **columns):
    return {"image": encoded(Image.new("RGB", (width, height), GREY)), "image_id": 7, **columns}


def objects_of(boxes, categories):
    return {"bbox": boxes, "category": categories, "area": [1.0] * len(boxes), "iscrowd": [0] * len(boxes)}


def labelled(names):
    return datasets.Features(BASE | {"objects": objects_feature(names)})


def test_boxes_have_their_position_and_their_class_colour():
    objects = objects_of([[100, 40, 200, 100], [0, 0, 60, 60]], [1, 0])
    pixels = np.asarray(render_example(example_of(objects=objects), labelled(["ant", "bee"])))
    picture = pixels[: SIDE // 2]  # half of 640 x 320; the caption is below
    expected = np.zeros(picture.shape[:2], dtype=bool)
    for left, top, right, bottom in ((50, 20, 150, 70), (0, 0, 30, 30)):
        expected[top:bottom, left:right] = True
        expected[top + 2 : bottom - 2, left + 2 : right - 2] = False
    np.testing.assert_array_equal((picture != GREY).any(axis=2), expected)
    assert tuple(picture[20, 100]) == class_color(1)
    assert tuple(picture[29, 10]) == class_color(0)


def test_names_of_many_classes_are_on_the_boxes():
    objects = objects_of([[100, 100, 200, 100]], [24])
    few, many = (labelled([f"class {index}" for index in range(count)]) for count in (20, 25))
    tall = render_example(example_of(objects=objects), many)
    assert (np.asarray(tall)[30:50, 50:100] == class_color(24)).all(axis=2).sum() > 200
    sheet = example_sheet([example_of(objects=objects)], many)
    assert sheet.height == tall.height + 24
    assert example_sheet([example_of(objects=objects_of([], []))], few).height > sheet.height  # by the legend
    crowd = objects_of([[10 * index, 100, 9, 9] for index in range(11)], [24] * 11)
    above = np.asarray(render_example(example_of(objects=crowd), many))[:48]
    assert (above == GREY).all()


def test_malformed_boxes_do_not_stop_the_rendering():
    objects = objects_of([[float("nan"), 0, 9, 9], [5, 5, -3, 9], [900, 900, 9, 9], [0, 0, 50, 50]], [0, 0, 0, -1])
    render_example(example_of(objects=objects), labelled(["ant"]))


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_masks_tint_what_they_cover(mode):
    values = np.zeros((160, 320), dtype=np.uint16 if mode == "I;16" else np.uint8)
    values[40:80, 100:200] = 3
    mask = Image.fromarray(values)
    if mode == "P":
        mask.putpalette([255, 0, 0] * 256)
    assert mask.mode == mode
    features = datasets.Features(BASE | {"mask": image_feature()})
    pixels = np.asarray(render_example(example_of(320, 160, mask=encoded(mask)), features))[:160]
    changed = (pixels != GREY).any(axis=2)
    np.testing.assert_array_equal(changed, values > 0)
    expected = np.round(0.55 * np.array(GREY) + 0.45 * np.array(class_color(3)))
    assert (pixels[changed] == expected).all()


def test_masks_of_objects_are_tinted_inside_their_boxes():
    """One as a polygon, one without a mask, one whose run lengths are of an image of another shape."""
    objects = objects_of([[100, 40, 200, 100], [0, 0, 60, 60], [400, 0, 60, 60]], [1, 0, 0])
    objects["segmentation"] = ["[[100,40,300,40,300,140,100,140]]", "", '{"size":[9,9],"counts":[0,81]}']
    pixels = np.asarray(render_example(example_of(objects=objects), labelled(["ant", "bee"])))
    assert (pixels[22:68, 52:148] == np.round(0.55 * np.array(GREY) + 0.45 * np.array(class_color(1)))).all()
    assert (pixels[2:28, 2:28] == GREY).all()
    assert (pixels[2:28, 202:228] == GREY).all()


def test_a_resized_mask_has_no_values_of_its_own():
    values = np.ones((50, 100), dtype=np.uint8)
    values[:, 33:] = 3
    features = datasets.Features(BASE | {"mask": image_feature()})
    picture = render_example(example_of(100, 50, mask=encoded(Image.fromarray(values))), features)
    colors = np.unique(np.asarray(picture)[:160].reshape(-1, 3), axis=0)
    assert len(colors) == 2


def test_a_broken_mask_leaves_the_picture():
    features = datasets.Features(BASE | {"mask": image_feature()})
    pixels = np.asarray(render_example(example_of(mask={"bytes": b"x", "path": None}), features))
    assert (pixels[: SIDE // 2] == GREY).all()


def test_labels_are_in_the_caption(monkeypatch):
    captions = []
    monkeypatch.setattr("hf_vlm.viz.contact_sheet.captioned", lambda picture, text: captions.append(text) or picture)
    features = datasets.Features(BASE | {"label": datasets.ClassLabel(names=["cat", "dog"])})
    for label in (1, -1):
        render_example(example_of(label=label), features)
    named = example_of()
    named["image"]["path"] = "far/away/photo.jpg"
    render_example(named, datasets.Features(BASE))
    assert captions == ["dog  |  image_id 7", "no label  |  image_id 7", "photo.jpg"]


def test_shapes_are_kept_and_small_images_enlarged():
    features = datasets.Features(BASE)
    for width, height, expected in ((640, 320, (320, 160)), (20, 80, (80, 320)), (2000, 4, (320, 1))):
        picture = render_example(example_of(width, height), features)
        assert (picture.width, picture.height - captioned(Image.new("RGB", expected), "").height) == (expected[0], 0)
    assert example_sheet([example_of()] * 3, features, columns=2).width == 2 * 320 + 3 * 12


def test_a_caption_is_truncated_to_the_picture():
    picture = Image.new("RGB", (200, 50), GREY)
    short, long = captioned(picture, "a"), captioned(picture, "a long name of a file that has no end" * 3)
    assert short.size == long.size
    assert (np.asarray(short)[:50] == GREY).all()
    assert (np.asarray(long)[50:, -2:] == 255).all()
    assert (np.asarray(long)[50:, 100:] < 128).any()
    assert not (np.asarray(short)[50:, 100:] < 128).any()


def test_the_legend_shows_every_class_in_its_colour():
    pixels = np.asarray(legend([f"class {index}" for index in range(12)], width=300))
    assert pixels.shape[1] == 300
    for index in range(12):
        rows = np.nonzero((pixels == class_color(index)).all(axis=2))[0]
        assert len(rows) == 12 * 12, index
    assert rows.min() > 30  # the last one is in a later line
    assert (pixels[:, -1] == 255).all()


def test_a_reservoir_keeps_each_example_with_the_same_chance_and_in_order():
    counts = np.zeros(20)
    for seed in range(2000):
        reservoir = Reservoir(5, seed)
        for position in range(20):
            reservoir.add({"image_id": position})
        kept = [example["image_id"] for example in reservoir.examples]
        assert kept == sorted(kept)
        assert len(kept) == 5
        counts[kept] += 1
    assert abs(counts / 2000 - 0.25).max() < 0.04
    few = Reservoir(5)
    few.add({"image_id": 3})
    assert few.examples == [{"image_id": 3}]
