import io
import os
import struct

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from hf_vlm.data.io.decode import BadImageError, decode_image, decode_mask, used_bits
from hf_vlm.data.io.image_header import read_header, read_tiff_size


@pytest.fixture(scope="module")
def pixels():
    """(61, 84, 3) uint8, smooth enough for JPEG, different in every corner and channel."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 84, 3), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX)


def encode(image, format, **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x010F] = "a maker, so that the orientation is not the first entry"
    exif[0x0112] = orientation
    return exif


def difference(one, other):
    assert one.shape == other.shape
    return np.abs(one.astype(int) - other.astype(int)).mean()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_lossless_formats_give_the_pixels(pixels, format):
    if format == "GIF":
        pixels = pixels // 64 * 64  # a palette has 256 colours
    image, size = decode_image(encode(pixels, format, **({"lossless": True} if format == "WEBP" else {})))
    np.testing.assert_array_equal(image, pixels)
    assert size == (61, 84)
    assert image.flags.c_contiguous


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_what_pillow_reads(pixels, progressive):
    data = encode(pixels, "JPEG", quality=90, progressive=progressive)
    image, size = decode_image(data)
    assert difference(image, np.asarray(Image.open(io.BytesIO(data)))) < 0.6
    assert size == (61, 84)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once(pixels, format, orientation):
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    data = encode(pixels, format, exif=with_orientation(orientation), **options)
    stored = np.asarray(Image.open(io.BytesIO(encode(pixels, format, **options))))
    # What EXIF's tag means for row 0 and column 0 of the stored image.
    expected = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[orientation]
    image, size = decode_image(data)
    assert difference(image, expected) < 0.6
    assert size == expected.shape[:2]
    assert difference(image, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))) < 0.6


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize(
    ("at_least", "divisor"), [((100, 150), 1), ((60, 80), 2), ((61, 80), 1), ((40, 40), 3), ((30, 37), 4), ((1, 1), 8)]
)
def test_reduced_jpeg_keeps_the_asked_size(orientation, num_channels, at_least, divisor):
    noise = np.random.default_rng(1).integers(0, 256, (119, 161, 3), dtype=np.uint8)
    upright = cv2.GaussianBlur(noise, (0, 0), 9)
    stored = np.rot90(upright, 1) if orientation == 6 else upright
    data = encode(np.ascontiguousarray(stored), "JPEG", quality=98, exif=with_orientation(orientation))
    divisor = 2 if divisor == 3 else divisor  # there is no third
    image, size = decode_image(data, num_channels=num_channels, at_least=at_least)
    assert size == (119, 161)
    assert image.shape == (-(-119 // divisor), -(-161 // divisor), num_channels)
    full, _ = decode_image(data, num_channels=num_channels)
    reference = cv2.resize(full, image.shape[1::-1], interpolation=cv2.INTER_AREA).reshape(image.shape)
    assert difference(image, reference) < 1.5


def test_other_formats_are_not_reduced(pixels):
    image, _ = decode_image(encode(pixels, "PNG"), at_least=(1, 1))
    np.testing.assert_array_equal(image, pixels)


def test_grey(pixels):
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    for stored, exactness in ((grey, 0), (pixels, 1)):
        image, _ = decode_image(encode(stored, "PNG"), num_channels=1)
        assert image.shape == (61, 84, 1)
        assert np.abs(image[:, :, 0].astype(int) - grey).max() <= exactness
    image, _ = decode_image(encode(grey, "PNG"))
    np.testing.assert_array_equal(image, np.stack([grey] * 3, axis=2))
    image, _ = decode_image(encode(Image.fromarray(grey).convert("1"), "PNG"))
    assert set(np.unique(image)) == {0, 255}


def test_palette(pixels):
    palette = Image.fromarray(pixels).convert("P")
    for format in ("PNG", "GIF", "BMP"):
        image, _ = decode_image(encode(palette, format))
        np.testing.assert_array_equal(image, np.asarray(palette.convert("RGB")))


def test_cmyk_has_the_colours_of_pillow():
    patches = np.zeros((32, 64, 3), dtype=np.uint8)
    for column, color in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 40)]):
        patches[:, 16 * column : 16 * column + 16] = color
    data = encode(Image.fromarray(patches).convert("CMYK"), "JPEG", quality=95)
    image, _ = decode_image(data)
    np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert difference(image, patches) < 4


@pytest.mark.parametrize("format", ["png", "tiff"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_sixteen_bits_are_scaled(pixels, format, num_channels):
    colors = pixels.astype(np.uint16) * 257
    for stored in (colors[:, :, 0], colors):
        image, _ = decode_image(cv2.imencode(f".{format}", stored)[1].tobytes(), num_channels=num_channels)
        rgb = stored if stored.ndim == 3 else np.stack([stored] * 3, axis=2)
        expected = (rgb[:, :, ::-1] / 257).astype(float)  # imencode stores BGR
        if num_channels == 1:
            expected = (expected @ [0.299, 0.587, 0.114])[:, :, None]
        assert np.abs(image - expected).max() <= 1


def test_transparency_is_laid_on_white(pixels):
    alpha = np.zeros((61, 84), dtype=np.uint8)
    alpha[:20], alpha[20:40] = 255, 128
    fraction = alpha[:, :, None] / 255
    expected = pixels * fraction + 255 * (1 - fraction)
    rgba = np.dstack([pixels, alpha])
    for format in ("PNG", "TIFF"):
        image, _ = decode_image(encode(rgba, format))
        assert np.abs(image - expected).max() <= 1
    grey, _ = decode_image(encode(Image.fromarray(rgba).convert("LA"), "PNG"), num_channels=1)
    assert (grey[40:] == 255).all()
    palette = Image.fromarray(pixels).convert("P")
    index = palette.getpixel((3, 4))
    image, _ = decode_image(encode(palette, "PNG", transparency=index))
    hidden = np.asarray(palette) == index
    assert (image[hidden] == 255).all()
    np.testing.assert_array_equal(image[~hidden], np.asarray(palette.convert("RGB"))[~hidden])


def test_sources_of_bytes(pixels, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encode(pixels, "PNG"))
    data = path.read_bytes()
    sources = [data, str(path), path, {"bytes": None, "path": str(path)}, {"bytes": data, "path": "missing.png"}]
    for source in [*sources, {"path": str(path)}, path.as_uri()]:
        np.testing.assert_array_equal(decode_image(source)[0], pixels)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("fraction", [0.5, 0.95])
def test_truncated_files_are_bad(pixels, tmp_path, format, fraction):
    data = encode(pixels, format)
    path = tmp_path / f"half.{format.lower()}"
    path.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(BadImageError, match=rf"half\.{format.lower()}: .+"):
        decode_image({"bytes": None, "path": str(path)})


def test_every_cut_of_a_jpeg_is_bad(pixels):
    data = encode(pixels, "JPEG", exif=with_orientation(6))
    for length in range(1, len(data) - 1, 7):
        with pytest.raises(BadImageError):
            decode_image(data[:length])


def test_what_is_not_an_image(tmp_path):
    empty = tmp_path / "a.jpg"
    empty.touch()
    with pytest.raises(BadImageError, match=r"a\.jpg: no bytes"):
        decode_image({"bytes": b"", "path": str(empty)})
    with pytest.raises(BadImageError, match=r"image of 11 bytes beginning with b'hello wo': not an image of a known"):
        decode_image(b"hello world")
    with pytest.raises(BadImageError, match=r"missing\.png.*No such file"):
        decode_image(str(tmp_path / "missing.png"))
    with pytest.raises(BadImageError, match="image without bytes and path: no bytes"):
        decode_image({"bytes": None, "path": None})
    assert issubclass(BadImageError, ValueError)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_huge_images_are_bad(pixels, monkeypatch, format):
    data = encode(pixels, format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 61 * 84)
    decode_image(data)
    for limit in (61 * 84 - 1, 1000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadImageError, match=r"(84x61 pixels are more than|5124 pixels\) exceeds limit)"):
            decode_image(data)


def test_huge_images_that_opencv_alone_knows_are_bad_before_they_are_decoded(pixels, monkeypatch):
    data = cv2.imencode(".tiff", pixels.astype(np.float32))[1].tobytes()
    assert read_header(data) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 61 * 84 - 1)
    with monkeypatch.context() as patch:
        patch.setattr(cv2, "imdecode", lambda *arguments: pytest.fail("it was decoded"))
        with pytest.raises(BadImageError, match="84x61 pixels are more than the 5123"):
            decode_image(data)
        for extension in (".pfm", ".hdr"):  # whose size is not known before
            with pytest.raises(BadImageError, match="not an image of a known format"):
                decode_image(cv2.imencode(extension, pixels.astype(np.float32))[1].tobytes())


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_size_of_a_tiff_in_both_byte_orders(order):
    def tiff(*entries):
        head = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
        return head + b"".join(struct.pack(order + "HHI" + form, *entry) for form, *entry in entries) + bytes(4)

    assert read_tiff_size(tiff(("HH", 256, 3, 1, 700, 0), ("I", 257, 4, 1, 70000))) == (70000, 700)
    assert read_tiff_size(tiff(("I", 257, 4, 1, 70000))) is None
    assert read_tiff_size(tiff(("I", 257, 4, 1, 70000))[:-10]) is None
    assert read_tiff_size(b"P6 700 70000 255 ") is None


def test_files_too_large_for_an_image_are_not_read(tmp_path):
    path = tmp_path / "a.png"
    path.touch()
    os.truncate(path, 2**29 + 1)  # without blocks on disk
    for image in (path, f"file://{path}", {"bytes": None, "path": str(path)}):
        with pytest.raises(BadImageError, match=r"a\.png: 536870913 bytes are more than the 536870912"):
            decode_image(image)


def test_unknown_ranges_and_channels_are_refused(pixels):
    with pytest.raises(BadImageError, match="32 bits"):
        decode_image(encode(Image.fromarray(pixels[:, :, 0].astype(np.float32)), "TIFF"))
    with pytest.raises(ValueError, match="num_channels=4: images are decoded to 3 channels"):
        decode_image(encode(pixels, "PNG"), num_channels=4)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 8])
def test_jpeg_header_agrees_with_pillow(pixels, mode, orientation):
    for options in ({}, {"progressive": True}, {"comment": b"a comment"}, {"dpi": (300, 300)}):
        exif = with_orientation(orientation)
        data = encode(Image.fromarray(pixels).convert(mode), "JPEG", exif=exif, **options)
        header, reference = read_header(data), Image.open(io.BytesIO(data))
        assert (header.format, header.mode, header.width, header.height) == ("JPEG", mode, *reference.size)
        assert header.orientation == reference.getexif()[0x0112] == orientation
        assert not header.has_alpha


def test_exif_in_both_byte_orders(pixels):
    plain = encode(pixels, "JPEG")
    for order, value in (("little", 6), ("big", 8)):
        number = lambda count, size, order=order: count.to_bytes(size, order)  # noqa: E731
        entry = number(0x0112, 2) + number(3, 2) + number(1, 4) + number(value, 2) + b"\0\0"
        tiff = (b"II" if order == "little" else b"MM") + number(42, 2) + number(8, 4) + number(1, 2) + entry
        segment = b"Exif\0\0" + tiff + bytes(4)
        data = plain[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + plain[2:]
        assert Image.open(io.BytesIO(data)).getexif()[0x0112] == value
        assert read_header(data).orientation == value
        assert decode_image(data)[0].shape == (84, 61, 3)


def test_broken_exif_is_ignored(pixels):
    plain = encode(pixels, "JPEG")
    for tiff in (b"", b"II", b"II*\0\xff\xff\xff\xff", b"XX*\0\x08\0\0\0", b"II*\0\x08\0\0\0\xff\xff"):
        segment = b"Exif\0\0" + tiff
        data = plain[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + plain[2:]
        assert decode_image(data)[0].shape == (61, 84, 3)


RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))


def netpbm(values, largest, magic):
    body = values.astype("u1" if largest < 256 else ">u2").tobytes()
    if magic == "P2":
        body = " ".join(map(str, values.ravel().tolist())).encode()
    return f"{magic}\n64 48\n{largest}\n".encode() + body


@pytest.mark.parametrize("largest", [1, 15, 100, 255, 1023, 4095, 65535])
@pytest.mark.parametrize("magic", ["P2", "P5", "P6"])
def test_values_of_netpbm_have_the_range_of_the_file(largest, magic):
    values = np.round(RAMP * largest).astype(int)
    stored = np.repeat(values[..., None], 3, axis=2) if magic == "P6" else values
    image, _ = decode_image(netpbm(stored, largest, magic), num_channels=1)
    assert np.abs(image[..., 0] - np.round(values / largest * 255)).max() <= 1


def packed_tiff(num_bits, values):
    """A TIFF of grey values of some bits, one after the other."""
    bits = (values[:, :, None] >> np.arange(num_bits - 1, -1, -1)) & 1
    data = np.packbits(bits.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()
    entries = {
        256: 64,
        257: 48,
        258: num_bits,
        259: 1,
        262: 1,
        273: 8 + 2 + 12 * 9 + 4,
        277: 1,
        278: 48,
        279: len(data),
    }
    directory = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, entries[tag]) for tag in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + bytes(4) + data


@pytest.mark.parametrize("num_bits", [1, 2, 4, 8, 12])
def test_values_of_tiff_have_the_range_of_their_bits(num_bits):
    values = np.round(RAMP * (2**num_bits - 1)).astype(int)
    image, _ = decode_image(packed_tiff(num_bits, values), num_channels=1)
    assert np.abs(image[..., 0] - values / (2**num_bits - 1) * 255).max() <= 1


@pytest.mark.parametrize("extension", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("num_bits", [0, 10, 12, 14, 16])
def test_bits_that_values_of_16_use(extension, channels, num_bits):
    values = np.full((5, 6, channels), 2**num_bits - 1, dtype=np.uint16)
    values[..., 3:] = 2**16 - 1  # alpha
    assert used_bits(cv2.imencode(extension, values)[1].tobytes()) == num_bits


def test_only_values_of_16_bits_are_looked_at(pixels):
    data = encode(Image.fromarray((RAMP * 4095).astype(np.uint16)), "PNG")
    others = [encode(Image.fromarray(pixels), format) for format in ("PNG", "TIFF", "JPEG")]
    others += [packed_tiff(12, np.full(RAMP.shape, 7)), netpbm(np.full(RAMP.shape, 7), 4095, b"P5")]
    assert [used_bits(other) for other in (*others, data[:40], b"", b"no image")] == [None] * 8
    assert used_bits(data) == 12


def jpeg_2000(image, **options):
    return encode(image, "JPEG2000", irreversible=False, num_resolutions=3, **options)


@pytest.mark.parametrize("num_bits", [10, 12, 16])
def test_values_of_jpeg_2000_have_the_range_of_their_bits(num_bits):
    values = np.round(RAMP * (2**num_bits - 1)).astype(int)
    # Written as 16 bits, whose values are those of fewer about the middle, which the number of bits gives.
    data = bytearray(jpeg_2000(Image.fromarray((values + 2**15 - 2 ** (num_bits - 1)).astype(np.uint16))))
    for name, offset in ((b"ihdr", 14), (b"\xff\x51", 40)):
        data[data.index(name) + offset] = num_bits - 1
    image, _ = decode_image(bytes(data), num_channels=1)
    assert np.abs(image[..., 0] - values / (2**num_bits - 1) * 255).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("long_box", [False, True])
def test_exif_of_jpeg_2000_turns_the_image(pixels, orientation, mode, long_box):
    stored = Image.fromarray(pixels).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = b"JpgTiffExif->JP2" + exif.tobytes().removeprefix(b"Exif\0\0")
    head = (
        struct.pack(">I4sQ", 1, b"uuid", 16 + len(content))
        if long_box
        else struct.pack(">I4s", 8 + len(content), b"uuid")
    )
    plain = jpeg_2000(stored)
    start = plain.index(b"jp2c") - 4  # after the header, before the image
    data = plain[:start] + head + content + plain[start:]
    stored.info["exif"] = exif.tobytes()
    expected = ImageOps.exif_transpose(stored).convert("RGB")
    image, size = decode_image(data)
    np.testing.assert_array_equal(image, np.asarray(expected))
    assert size == expected.size[::-1]
    assert read_header(data).orientation == orientation
    for cut in range(start, start + len(head) + 30, 3):
        read_header(plain[:start] + (head + content)[: cut - start] + plain[start:])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("L", 7), ("I;16", 700), ("LA", 7), ("RGB", 65536 * 7 + 256 * 8 + 9), ("RGBA", 65536 * 7 + 256 * 8 + 9)],
)
def test_masks_have_the_values_that_are_stored(mode, expected):
    color = {"L": 7, "I;16": 700, "LA": (7, 0), "RGB": (7, 8, 9), "RGBA": (7, 8, 9, 0)}[mode]
    image = Image.new(mode, (4, 3))
    image.putpixel((2, 1), color)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    found = decode_mask({"bytes": buffer.getvalue(), "path": None})
    assert (found[1, 2], np.count_nonzero(found), found.shape) == (expected, 1, (3, 4))


def test_masks_that_cannot_be_decoded_are_named():
    with pytest.raises(BadImageError, match=r"street\.png"):
        decode_mask({"bytes": b"no mask", "path": "street.png"})
