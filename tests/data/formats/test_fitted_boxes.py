"""Boxes of annotations that speak of images of another size: fitted where it is clear how, refused where it is not."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from sample_data import write_json

from hf_vlm.data.formats.fitted_boxes import _turn, fit_boxes
from hf_vlm.data.inspection.inspect import format_report, inspect_source
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.segmentations import encode_mask, read_segmentation
from hf_vlm.data.sources import open_source
from hf_vlm.data.transforms.objects import Masks

WIDTH, HEIGHT = 40, 20
FAR = [28, 4, 10, 8]  # lies outside the image where that is 20 wide
NEAR = [4, 4, 10, 8]  # lies inside in any case


def write(folder, boxes, *, annotated=(WIDTH, HEIGHT), size=(WIDTH, HEIGHT), orientation=1):
    """A COCO json with one image of noise for each box, which is white where the box is in the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for row, (x, y, width, height) in enumerate(boxes):
        pixels = np.zeros((size[1], size[0]), np.uint8)
        pixels[y : y + height, x : x + width] = 255
        Image.fromarray(pixels).save(folder / f"{row}.png", exif=exif)
    write_json(
        folder / "instances_train.json",
        images=[
            {"id": row, "file_name": f"{row}.png", "width": annotated[0], "height": annotated[1]}
            for row in range(len(boxes))
        ],
        annotations=[
            {"id": row, "image_id": row, "category_id": 0, "bbox": box, "area": box[2] * box[3] / 2}
            for row, box in enumerate(boxes)
        ],
        categories=[{"id": 0, "name": "cat"}],
    )


def white_boxes(source):
    """Where the images are white as they are shown."""
    images = (decode_image(example["image"], num_channels=1)[0] for example in source)
    return [list(map(float, cv2.boundingRect(image))) for image in images]


def boxes_of(source):
    return [example["objects"]["bbox"][0] for example in source]


def test_boxes_of_the_stored_pixels_are_turned_as_the_image_is(tmp_path, caplog):
    for orientation in range(1, 9):
        caplog.clear()
        write(tmp_path, [FAR, NEAR, [0, 0, 5, 3]], orientation=orientation)
        source = open_source(tmp_path)
        if orientation in (2, 3, 4):  # which leave the size as it is, so that nothing tells
            assert boxes_of(source)[0] == FAR
            continue
        assert boxes_of(source) == white_boxes(source)
        assert [example["objects"]["area"] for example in source] == [[40], [40], [7.5]]
        assert ("3 of 3 images are not of the size" in caplog.text) == (orientation > 1)
        assert ("their boxes are turned as EXIF says: 0.png (annotated 40 x 20, shown 20 x 40)" in caplog.text) == (
            orientation > 1
        )
        assert not inspect_source(source).issues


@pytest.mark.parametrize("has_runs", [False, True])
def test_masks_are_moved_as_the_boxes_are(tmp_path, has_runs):
    x, y, width, height = FAR
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    pixels = np.ones((height, width), bool)
    mask = encode_mask(pixels, offset=(y, x), size=(HEIGHT, WIDTH)) if has_runs else [polygon]
    for orientation, size in [(o, (WIDTH, HEIGHT)) for o in (1, 5, 6, 7, 8)] + [(1, (2 * WIDTH, 2 * HEIGHT))]:
        factor = size[0] // WIDTH
        write(tmp_path, [[factor * side for side in FAR]], orientation=orientation, size=size)
        content = json.loads((tmp_path / "instances_train.json").read_text())
        content["annotations"][0] |= {"segmentation": mask, "bbox": FAR}
        write_json(tmp_path / "instances_train.json", **content)
        (example,) = open_source(tmp_path)
        image, shown = decode_image(example["image"], num_channels=1)
        masks = Masks.of([read_segmentation(text, *shown) for text in example["objects"]["segmentation"]])
        np.testing.assert_array_equal(masks.rasterise(shown)[0], image[:, :, 0] > 127)


def test_half_turns_follow_the_other_orientations(tmp_path):
    write(tmp_path, [FAR] * 4)
    for row, orientation in enumerate((6, 3, 1, 2)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        with Image.open(tmp_path / f"{row}.png") as image:
            image.load()
        image.save(tmp_path / f"{row}.png", exif=exif)
    source = open_source(tmp_path)
    assert boxes_of(source) == white_boxes(source)


def test_boxes_of_the_shown_image_stay(tmp_path, caplog):
    """The exporter wrote the size of the stored pixels beside boxes that were drawn on the upright image."""
    write(tmp_path, [[4, 28, 8, 10]], size=(HEIGHT, WIDTH))
    with Image.open(tmp_path / "0.png") as upright:
        stored = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "0.png", exif=exif)
    source = open_source(tmp_path)
    assert boxes_of(source) == white_boxes(source) == [[4, 28, 8, 10]]
    assert "their boxes fit the image as it is shown: 0.png" in caplog.text


def test_turned_images_whose_boxes_fit_both_ways_are_refused(tmp_path):
    write(tmp_path, [NEAR], orientation=6)
    with pytest.raises(
        ValueError, match=r"json: 1 of 1 images .* stored turned \(EXIF orientation\).*exiftool.* 0\.png"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize("annotated", [(20, 10), (80, 40), (400, 200), (13, 7)])
def test_boxes_are_scaled_to_the_file(tmp_path, annotated, caplog):
    write(tmp_path, [FAR, NEAR])
    scale = np.tile(np.array(annotated) / (WIDTH, HEIGHT), 2)
    scaled = (np.array([FAR, NEAR]) * scale).tolist()
    content = [{"id": row, "image_id": row, "category_id": 0, "bbox": box} for row, box in enumerate(scaled)]
    images = [{"id": r, "file_name": f"{r}.png", "width": annotated[0], "height": annotated[1]} for r in range(2)]
    write_json(
        tmp_path / "instances_train.json", images=images, annotations=content, categories=[{"id": 0, "name": "cat"}]
    )
    source = open_source(tmp_path)
    np.testing.assert_allclose(boxes_of(source), [FAR, NEAR], rtol=1e-6)
    assert [example["objects"]["area"][0] for example in source] == pytest.approx([80, 80])
    assert f"(annotated {annotated[0]} x {annotated[1]}, shown 40 x 20)" in caplog.text
    assert "their boxes are scaled to the file" in caplog.text
    assert source.findings == tuple(caplog.messages)
    assert "their boxes are scaled to the file" in format_report(inspect_source(source))


def test_boxes_of_another_picture_are_refused_and_few_left_out(tmp_path, caplog):
    write(tmp_path, [NEAR] * 2, annotated=(33, 20))
    with pytest.raises(ValueError, match=r"2 of 2 images .* may be of another picture.*: 0\.png \(annotated 33 x 20"):
        open_source(tmp_path)
    write(tmp_path, [NEAR] * 120)
    Image.new("L", (50, 20)).save(tmp_path / "7.png")
    source = open_source(tmp_path)
    assert source.num_examples == 119
    assert [example["image_id"] for example in source] == [*range(7), *range(8, 120)]
    assert "1 of 120 images" in caplog.text
    assert "left out" in caplog.text


def test_the_report_compares_all_images(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_vlm.data.formats.image_sizes.NUM_SAMPLED", 2)
    write(tmp_path, [NEAR] * 6)
    Image.fromarray(np.eye(30, dtype=np.uint8) * 255).save(tmp_path / "4.png")
    (tmp_path / "0.png").write_bytes(b"no image")
    report = inspect_source(open_source(tmp_path))
    (issue,) = (issue for issue in report.issues if "another size" in issue.what)
    assert issue.where == [f"{tmp_path / '4.png'}: annotated 40 x 20, the file 30 x 30"]


def test_orientations_are_those_of_pillow():
    generator = np.random.default_rng(0)
    for orientation in range(1, 9):
        x, y = generator.integers(0, 30), generator.integers(0, 12)
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        pixels[y : y + 5, x : x + 9] = 255
        image = Image.fromarray(pixels)
        image.getexif()[0x0112] = orientation
        shown = np.array(ImageOps.exif_transpose(image))
        turned = _turn(np.array([[x, y, 9.0, 5.0]]), np.array([orientation]), np.array([[WIDTH, HEIGHT]]))
        assert turned[0].tolist() == list(cv2.boundingRect(shown))


def test_images_without_files_keep_what_the_annotation_says(tmp_path):
    boxes, sizes = np.array([[1.0, 2, 3, 4]]), np.array([[WIDTH, HEIGHT]], dtype=np.float64)
    fitted = fit_boxes(boxes, np.array([0]), sizes, [tmp_path / "no.png"], "here")
    assert (fitted.boxes.tolist(), fitted.sizes.tolist(), fitted.is_clear.tolist()) == (
        boxes.tolist(),
        sizes.tolist(),
        [True],
    )
