"""Mutates files and reads them, in a process of its own with little memory, so that a crash or a hang is seen.

    python fuzz.py images|annotations SEED COUNT FOLDER

Prints as JSON how many were read and how many refused. A decoder that crashes leaves the mutant in FOLDER/current.
"""

import faulthandler
import io
import json
import logging
import random
import resource
import shutil
import sys
import tarfile
import warnings
from pathlib import Path

import cv2
import numpy as np
from datasets import Dataset, IterableDataset, disable_progress_bars
from PIL import Image

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream

MEMORY = 6 * 2**30  # bytes of address space
NUMBERS = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0")
FOREIGN = (b"", b"\0", b"<!DOCTYPE html><html></html>", b"%PDF-1.7\n", b"PK\3\4" + bytes(40))


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def valid_images():
    """Encoded images of many formats, all small."""
    generator = np.random.default_rng(0)
    pixels = cv2.GaussianBlur(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8), (5, 5), 0)
    rgb = Image.fromarray(pixels)
    alpha = rgb.copy()
    alpha.putalpha(128)
    wide = Image.fromarray(generator.integers(0, 2**16, (24, 32), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    images = [
        saved(rgb, "JPEG"),
        saved(rgb, "JPEG", progressive=True, exif=exif),
        saved(rgb.convert("L"), "JPEG"),
        saved(rgb.convert("CMYK"), "JPEG"),
        saved(rgb, "PNG"),
        saved(rgb.convert("P"), "PNG", transparency=3),
        saved(alpha, "PNG"),
        saved(wide, "PNG"),
        saved(rgb, "PNG", **frames),
        saved(rgb.convert("1"), "TIFF"),
        saved(rgb, "TIFF", compression="tiff_lzw"),
        saved(rgb, "TIFF", compression="tiff_deflate", exif=exif),
        saved(wide, "TIFF"),
        saved(rgb.convert("P"), "GIF", **frames),
        saved(rgb, "WEBP", lossless=True),
        saved(alpha, "WEBP"),
        saved(rgb, "WEBP", **frames),
        saved(rgb, "BMP"),
        saved(rgb, "PPM"),
        saved(rgb.convert("L"), "PPM"),
        saved(rgb, "JPEG2000"),
        cv2.imencode(".tiff", np.dstack([np.asarray(wide)] * 3))[1].tobytes(),
    ]
    if "avif" in {extension.lstrip(".") for extension in Image.registered_extensions()}:
        images.append(saved(rgb, "AVIF"))
    return images


def mutate(data, others, rng):
    """One of the ways in which files break."""
    content = bytearray(data)
    start = rng.randrange(len(content) + 1)
    length = rng.choice((1, 2, 4, 16, 64, len(content) // 4))
    mutation = rng.randrange(9)
    if mutation == 0:  # flipped bits
        for _ in range(rng.choice((1, 4, 32))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif mutation == 1:
        del content[start:]
    elif mutation == 2:
        del content[start : start + length]
    elif mutation == 3:
        content[start:start] = content[start : start + length]
    elif mutation == 4:
        content[start : start + length] = bytes(length)
    elif mutation == 5:  # large numbers where sizes may be
        position = rng.randrange(min(len(content), 64))
        content[position : position + 4] = rng.choice(
            (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0")
        )
    elif mutation == 6:  # two files in one
        content = content[:start] + bytearray(rng.choice(others))
    elif mutation == 7:
        content[start : start + length] = rng.randbytes(length)
    else:
        content = bytearray(
            rng.choice((b"", b"\0", b"<!DOCTYPE html><html></html>", b"%PDF-1.7\n", b"PK\3\4" + bytes(40)))
        )
    return bytes(content)


def fuzz_images(seed, count, folder):
    rng, originals = random.Random(seed), valid_images()
    current = folder / "current"

    def mutants():
        for index in range(count):
            mutant = mutate(rng.choice(originals), originals, rng)
            current.write_bytes(mutant)  # what a crash would leave to look at
            yield {"image": {"bytes": mutant, "path": None}, "image_id": index}

    def decode(example, generator):
        array, (height, width) = decode_image(
            example["image"],
            num_channels=generator.choice([1, 3]),
            at_least=(8, 8) if generator.random() < 0.5 else None,
        )
        assert array.dtype == np.uint8
        assert array.ndim == 3
        assert height >= array.shape[0] > 0
        assert width >= array.shape[1] > 0
        return {"image_id": example["image_id"]}

    source = IterableDataset.from_generator(mutants)
    stream = ExampleStream(source, decode, repeat=False, shuffle=False, block_size=1, max_bad_fraction=1.0)
    num_read = sum(1 for _ in stream)
    progress = stream.state_dict()["progress"]
    assert progress["num_seen"] == count
    return num_read, progress["num_bad"]


# ---- annotations


def write_images(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(saved(Image.new("RGB", (32, 24)), "PNG"))


def write_coco(folder):
    write_images(folder, ["a.png", "b.png"])
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 32, "height": 24}, {"id": 9, "file_name": "b.png"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}],
        "categories": [{"id": 3, "name": "cat", "supercategory": "animal"}],
    }
    (folder / "train.json").write_text(json.dumps(content))
    return folder / "train.json"


def write_voc(folder):
    write_images(folder, ["a.png"])
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    size = "<size><width>32</width><height>24</height></size>"
    text = f"<annotation>{size}<object><name>cat</name><difficult>0</difficult>{box}</object></annotation>"
    (folder / "a.xml").write_text(text)
    return folder / "a.xml"


def write_yolo_labels(folder):
    write_images(folder / "images", ["a.png"])
    (folder / "labels").mkdir()
    (folder / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.3\n1 0.1 0.1 0.2 0.1 0.2 0.2\n")
    return folder / "labels" / "a.txt"


def write_yolo_data(folder):
    write_yolo_labels(folder)
    (folder / "data.yaml").write_text("path: .\ntrain: images\nnc: 2\nnames: {0: cat, 1: dog}\n")
    return folder / "data.yaml"


def write_parquet(folder):
    folder.mkdir()
    objects = {"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": ["cat"]}
    rows = [{"image": saved(Image.new("RGB", (8, 8)), "PNG"), "label": "cat", "objects": objects}] * 3
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def write_tar(folder):
    folder.mkdir()
    fields = json.dumps({"label": "cat", "objects": {"bbox": [[1, 2, 3, 4]], "category": ["cat"]}}).encode()
    with tarfile.open(folder / "train.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("ä.png", saved(Image.new("RGB", (8, 8)), "PNG")), ("ä.json", fields), ("b.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder / "train.tar"


WRITERS = {
    "coco": write_coco,
    "voc": write_voc,
    "yolo": write_yolo_labels,
    "yolo data": write_yolo_data,
    "parquet": write_parquet,
    "webdataset": write_tar,
}


def fuzz_annotations(seed, count, folder):
    rng = random.Random(seed)
    num_read = num_refused = 0
    for index in range(count):
        name = list(WRITERS)[index % len(WRITERS)]
        source = folder / name.replace(" ", "_")
        shutil.rmtree(source, ignore_errors=True)
        file = WRITERS[name](source)
        content = file.read_bytes()
        file.write_bytes(mutate(content, [content], rng))
        shutil.copy(file, folder / "current")
        try:
            for _ in open_source(source, format=name.partition(" ")[0]):
                pass
            num_read += 1
        except ValueError as error:
            if str(source) not in str(error) and source.name not in str(error):
                raise AssertionError(
                    f"mutant {index} of {name}: the message does not name the source: {error}"
                ) from error
            num_refused += 1
        except Exception as error:
            raise AssertionError(f"mutant {index} of {name}, kept in {folder / 'current'}") from error
    return num_read, num_refused


def main(target, seed, count, folder):
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()
    fuzz = {"images": fuzz_images, "annotations": fuzz_annotations}[target]
    num_read, num_refused = fuzz(int(seed), int(count), Path(folder))
    sys.stdout.write(json.dumps({"read": num_read, "refused": num_refused}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
