"""Images of 16 bits that use a part of their range are refused or named before training."""

import io
import logging

import numpy as np
import pytest
from PIL import Image
from sample_data import png, write_parquet

from hf_vlm.data.inspection.pixel_range import check_pixel_range
from hf_vlm.data.sources import open_source


def deep_image(largest, format="PNG"):
    """An image of 16 bits with values up to a largest one."""
    values = np.linspace(0, largest, 300).astype(np.uint16).reshape(15, 20)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format)
    return buffer.getvalue()


def check(folder, images):
    write_parquet(folder / "a.parquet", {"image": images})
    check_pixel_range(open_source(folder))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize(("num_bits", "levels"), [(10, 4), (12, 16)])
def test_images_of_few_levels_are_refused(tmp_path, format, num_bits, levels):
    images = [deep_image(2 ** (num_bits - row % 2) - 1, format) for row in range(10)]
    message = (
        rf"first 10 images of 16 bits have no value above {2**num_bits - 1}: .* {levels} of 256 levels .* all by "
    )
    with pytest.raises(ValueError, match=message + rf"one factor, such as {2 ** (16 - num_bits)}$"):
        check(tmp_path, [*images, png(7), b"broken"])


@pytest.mark.parametrize("images", [[deep_image(2**14 - 1)] * 20, [deep_image(4095)] * 9])
def test_what_is_less_certain_is_named(tmp_path, caplog, images):
    with caplog.at_level(logging.WARNING):
        check(tmp_path, images)
    assert "have no value above" in caplog.text


@pytest.mark.parametrize(
    "images",
    [[*[deep_image(4095)] * 12, deep_image(2**14)], [png(3)] * 12, [deep_image(0)] * 12, [b"broken"] * 12],
)
def test_other_images_are_fine(tmp_path, caplog, images):
    with caplog.at_level(logging.WARNING):
        check(tmp_path, images)
    assert not caplog.messages
