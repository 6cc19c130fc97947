"""Folders of images and masks in the layouts that data sets and labelling tools have."""

import numpy as np
import pytest
from PIL import Image
from sample_data import HEIGHT, WIDTH, value_of, write_images, write_json

from hf_vlm.data.io.decode import BadImageError, decode_mask
from hf_vlm.data.masks import read_classes
from hf_vlm.data.sources import guess_format, open_source

NAMES = ("road", "car", "sky")
COLORS = np.array([[128, 64, 128], [0, 0, 142], [70, 130, 180]], np.uint8)
VOID = np.array([224, 224, 192], np.uint8)
VALUES = np.random.default_rng(0).integers(0, 3, (2, HEIGHT, WIDTH)).astype(np.uint8)
LABELMAP = "# label:color_rgb:parts:actions\n" + "".join(
    f"{name}:{','.join(map(str, color))}::\n"
    for name, color in zip((*NAMES, "void"), [*COLORS.tolist(), VOID.tolist()])
)
CLASS_DICT = "name,r,g,b\n" + "".join(f"{name}, {r}, {g}, {b}\n" for name, (r, g, b) in zip(NAMES, COLORS.tolist()))


def save(path, pixels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette.ravel().tolist())
    image.save(path)


def write_pairs(folder, *pairs):
    """Images of the values 0, 1, ... and masks of class indices, by their names."""
    for index, (image, mask) in enumerate(pairs):
        write_images(folder, [image], start=index)
        save(folder / mask, VALUES[index])
    (folder / "mask_classes.txt").write_text("\n".join(NAMES))


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{}.png", "masks/{}.png"),
        ("images/{}.png", "labels/{}_label.png"),
        ("images/street/{}.png", "masks/street/{}.png"),
        ("train/images/{}.png", "train/masks/{}.png"),
        ("images/training/{}.png", "annotations/training/{}.png"),
        ("train/{}.png", "train_labels/{}_L.png"),
        ("train/{}.png", "trainannot/{}.png"),
        ("leftImg8bit/train/a/{}_leftImg8bit.png", "gtFine/train/a/{}_gtFine_labelIds.png"),
        ("JPEGImages/{}.png", "SegmentationClass/{}.png"),
        ("{}.png", "{}_mask.png"),
    ],
)
def test_layouts(tmp_path, image, mask):
    write_pairs(tmp_path, *((image.format(name), mask.format(name)) for name in ("b_1", "b_2")))
    save(tmp_path / "gtFine/train/a/b_1_gtFine_color.png", VALUES[0])
    save(tmp_path / "SegmentationObject/b_1.png", VALUES[0])
    assert guess_format(tmp_path) == "masks"
    source = open_source(tmp_path)
    assert source.mask_names == list(NAMES)
    assert source.num_examples == 2
    for index, example in enumerate(source):
        assert value_of(example) == example["image_id"] == index
        np.testing.assert_array_equal(read_classes(example, 3), VALUES[index])
    assert source.findings == ()


def test_splits_are_folders_at_any_depth(tmp_path):
    write_pairs(tmp_path, ("images/train/a.png", "masks/train/a.png"), ("images/val/a.png", "masks/val/a.png"))
    for index, split in enumerate(("train", "validation")):
        (example,) = open_source(tmp_path, split)
        assert value_of(example) == index
        np.testing.assert_array_equal(decode_mask(example["mask"]), VALUES[index])
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        open_source(tmp_path, "test")


def test_what_has_no_counterpart_is_left_out(tmp_path):
    write_pairs(tmp_path, ("images/a.png", "masks/a.png"))
    write_images(tmp_path, ["images/b.png"])
    save(tmp_path / "masks" / "c.png", VALUES[0])
    source = open_source(tmp_path)
    assert source.num_examples == 1
    assert (
        "2 images without a mask, or masks without an image, are left out: images/b.png, masks/c.png"
        in (source.findings[0])
    )


def test_the_preferred_of_several_masks(tmp_path):
    image = "leftImg8bit/a_leftImg8bit.png"
    write_pairs(tmp_path, (image, "gtFine/a_gtFine_labelTrainIds.png"))
    save(tmp_path / "gtFine" / "a_gtFine_labelIds.png", VALUES[1])
    (example,) = open_source(tmp_path)
    np.testing.assert_array_equal(decode_mask(example["mask"]), VALUES[0])


def test_other_folders_are_opened_as_before(tmp_path):
    write_pairs(tmp_path, ("images/a.png", "masks/a.png"))
    (tmp_path / "mask_classes.txt").rename(tmp_path / "readme.txt")
    assert guess_format(tmp_path) == "imagefolder"
    assert open_source(tmp_path, format="masks").mask_names is None
    (tmp_path / "readme.txt").rename(tmp_path / "mask_classes.txt")
    write_json(tmp_path / "metadata.jsonl", file_name="images/a.png", mask_file_name="masks/a.png")
    assert guess_format(tmp_path) == "imagefolder"
    assert open_source(tmp_path).mask_names == list(NAMES)
    write_images(tmp_path / "empty", ["a.png"])
    with pytest.raises(ValueError, match=r"no image has a mask of its name in a folder as masks/; it holds a\.png"):
        open_source(tmp_path / "empty", format="masks")


def colored(values):
    """A mask in colours, of which the first row is of no class."""
    pixels = COLORS[values]
    pixels[0] = VOID
    return pixels


def write_cvat(folder, *, has_palette):
    """CVAT's export "Segmentation mask 1.1"."""
    for index, name in enumerate("ab"):
        write_images(folder / "JPEGImages", [f"{name}.png"], start=index)
        indices = VALUES[index].copy()
        indices[0] = 3
        indices = 3 - indices  # of a palette in another order
        palette = np.concatenate([COLORS, VOID[None]])[::-1]
        save(folder / "SegmentationObject" / f"{name}.png", VALUES[index])
        target = folder / "SegmentationClass" / f"{name}.png"
        save(target, indices, palette) if has_palette else save(target, colored(VALUES[index]))
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "default.txt").write_text("b\na\n")
    (folder / "labelmap.txt").write_text(LABELMAP)


@pytest.mark.parametrize("has_palette", [False, True])
def test_colours_of_a_labelling_tool(tmp_path, has_palette):
    write_cvat(tmp_path, has_palette=has_palette)
    source = open_source(tmp_path)
    assert (source.format, source.mask_names) == ("masks", list(NAMES))
    for index, example in zip((1, 0), source, strict=True):
        assert value_of(example) == index
        expected = VALUES[index].copy()
        expected[0] = 255
        np.testing.assert_array_equal(read_classes(example, 3), expected)


def test_colours_of_camvid(tmp_path):
    write_images(tmp_path / "val", ["a.png"])
    save(tmp_path / "val_labels" / "a_L.png", COLORS[VALUES[0]])
    (tmp_path / "class_dict.csv").write_text(CLASS_DICT)
    source = open_source(tmp_path, "validation")
    assert source.mask_names == list(NAMES)
    (example,) = source
    np.testing.assert_array_equal(read_classes(example, 3), VALUES[0])


def test_colours_that_are_not_named_are_an_error(tmp_path):
    write_cvat(tmp_path, has_palette=False)
    (tmp_path / "labelmap.txt").write_text("\n".join(LABELMAP.splitlines()[:-1]))
    message = rf"mask of image 0 has 1 colours that labelmap.txt does not name, in {WIDTH} pixels: 224,224,192\. Add"
    with pytest.raises(ValueError, match=message):
        list(open_source(tmp_path))
    (tmp_path / "labelmap.txt").unlink()
    (tmp_path / "mask_classes.txt").write_text("\n".join(NAMES))
    with pytest.raises(ValueError, match=r"If these are colours, name them in a labelmap\.txt or a class_dict\.csv"):
        read_classes(next(iter(open_source(tmp_path))), 3)


def test_a_broken_mask_is_left_to_whoever_reads_it(tmp_path):
    write_cvat(tmp_path, has_palette=False)
    (tmp_path / "SegmentationClass" / "b.png").write_bytes(b"broken")
    first, _ = open_source(tmp_path)
    with pytest.raises(BadImageError, match=r"b\.png"):
        read_classes(first, 3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labelmap.txt", "road:1,2,3::\nroad:3,4,5::", "labelmap.txt names road more than once"),
        ("labelmap.txt", "road:1,2,3::\ncar:1,2,3::", "labelmap.txt names 1,2,3 more than once"),
        ("labelmap.txt", "road:1,2::", "'road, 1, 2' must be a name and red, green and blue"),
        ("labelmap.txt", "road", "'road, ' must be a name and red, green and blue"),
        ("class_dict.csv", "name,r,g,b\nroad,1,2,300", "'road, 1, 2, 300' must be a name and red, green and blue"),
    ],
)
def test_maps_of_colours_that_make_no_sense(tmp_path, name, text, message):
    write_cvat(tmp_path, has_palette=False)
    (tmp_path / "labelmap.txt").unlink()
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)
