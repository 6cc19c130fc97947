"""What data name is followed inside their own folder or on their own host, and elsewhere only if that is allowed."""

import json
import os
import pickle
import re
import socket

import pytest
from datasets import Dataset
from PIL import Image

from hf_vlm.cli.main import main
from hf_vlm.data.formats.image_sizes import read_file_sizes
from hf_vlm.data.formats.pairing import locate_names
from hf_vlm.data.io import files, remote, trust
from hf_vlm.data.io.decode import BadImageError, decode_image
from hf_vlm.data.io.messages import OutsideError
from hf_vlm.data.io.trust import check_inside, is_inside, outside_allowed
from hf_vlm.data.sources import open_source

INSIDE = [
    ("d/a.jpg", "d"),
    ("d/x/../a.jpg", "./d"),
    ("d/.", "d"),
    ("/d/a.jpg", "/"),
    ("file:///d/a.jpg", "/d"),
    ("zip://a.jpg::/d/b.zip", "/d"),
    ("https://h/elsewhere/a.jpg", "http://h/d"),
    ("https://me:secret@h:443/a.jpg", "https://h/d"),
    ("s3://bucket/x/../a.jpg", "s3://bucket/d"),
    ("hf://datasets/o/n@5f1/a.jpg", "hf://datasets/o/n"),
    ("zip://a.jpg::hf://datasets/o/n@5f1/b.zip", "hf://datasets/o/n"),
]
OUTSIDE = [
    ("d/../a.jpg", "d"),
    ("d2/a.jpg", "d"),
    ("/etc/passwd", "d"),
    ("/dev/zero", "/d"),
    ("file:///etc/passwd", "/d"),
    ("FILE:///etc/passwd", "/d"),
    ("zip://a.jpg::file:///etc/b.zip", "/d"),
    ("http://127.0.0.1/a.jpg", "/d"),
    ("http://169.254.169.254/latest", "http://h/d"),
    ("http://h.evil/a.jpg", "http://h/d"),
    ("http://h:81/a.jpg", "http://h/d"),
    ("http://h@evil/a.jpg", "http://h/d"),
    ("http://h\\@evil/a.jpg", "http://h/d"),
    ("http://[h/a.jpg", "http://[h/d"),
    ("ftp://h/a.jpg", "http://h/d"),
    ("/etc/passwd", "http://h/d"),
    ("filecache::http://h/a.jpg", "http://h/d"),
    ("reference::http://h/a.json", "http://h/d"),
    ("s3://other/a.jpg", "s3://bucket/d"),
    ("s3://bucket/../other/a.jpg", "s3://bucket/d"),
    ("hf://datasets/o/private/a.jpg", "hf://datasets/o/n"),
]


@pytest.mark.parametrize(("path", "root"), INSIDE)
def test_what_is_inside(path, root):
    assert is_inside(path, root)


@pytest.mark.parametrize(("path", "root"), OUTSIDE)
def test_what_is_outside(path, root):
    assert not is_inside(path, root)
    with pytest.raises(OutsideError, match=r"^rows names .*, outside of .*add --allow_outside true$"):
        check_inside([path], root, "rows")
    check_inside([path], root, "rows", allowed=True)
    with outside_allowed(True):
        check_inside([path], root, "rows")


@pytest.fixture
def outside(tmp_path):
    """The path of an image that lies outside of the folder `data`, which it makes."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 6), "red").save(tmp_path / "private.png")
    Image.new("RGB", (8, 6), "blue").save(tmp_path / "data" / "own.png")
    return tmp_path / "private.png"


def write_coco(folder, name):
    content = {"images": [{"id": 1, "file_name": name, "width": 8, "height": 6}], "annotations": [], "categories": []}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def write_yolo(folder, name):
    (folder / "list.txt").write_text(f"{name}\n")
    (folder / "data.yaml").write_text("train: list.txt\nnames: [cat]\n")
    return folder / "data.yaml"


def write_yolo_folder(folder, name):
    (folder / "data.yaml").write_text(f"train: {os.path.dirname(name) or '.'}\nnames: [cat]\n")
    return folder / "data.yaml"


def write_parquet(folder, name):
    Dataset.from_list([{"image_path": name}]).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


@pytest.mark.parametrize("write", [write_coco, write_yolo, write_yolo_folder, write_parquet])
@pytest.mark.parametrize("is_absolute", [True, False])
def test_paths_outside_the_folder_are_refused_unless_allowed(outside, write, is_absolute):
    folder = outside.parent / "data"
    source = write(folder, str(outside) if is_absolute else "../private.png")
    with pytest.raises(OutsideError, match=r"private\.png|names .*, outside of .*/data, .* --allow_outside true"):
        list(open_source(source))
    (example,) = [
        example for example in open_source(source, allow_outside=True) if "private" in example["image"]["path"]
    ]
    assert (decode_image(example["image"])[0][0, 0] == [255, 0, 0]).all()
    (example,) = open_source(write(folder, "own.png"))
    assert example["image"]["path"].endswith("data/own.png")


def test_urls_in_rows_are_followed_on_their_own_host_alone(outside, serve):
    folder = outside.parent / "data"
    with serve(folder) as (url, _), serve(outside.parent) as (private, counts):
        for name in (f"{private}/private.png", "file:///etc/passwd", "/etc/passwd", "/dev/zero"):
            write_parquet(folder, name)
            for source in (folder / "train.parquet", f"{url}/train.parquet"):
                with pytest.raises(OutsideError, match=re.escape(f"train.parquet names {name}, outside of ")):
                    list(open_source(source))
        assert counts["all"] == 0
        write_parquet(folder, f"{url}/own.png")
        (example,) = open_source(f"{url}/train.parquet")
        assert (decode_image(example["image"])[0][0, 0] == [0, 0, 255]).all()


def test_rows_of_workers_remember_what_was_allowed(outside):
    source = write_parquet(outside.parent / "data", str(outside))
    allowed = pickle.loads(pickle.dumps(open_source(source, allow_outside=True).dataset))
    assert next(iter(allowed))["image"]["path"] == str(outside)


@pytest.fixture
def moved(outside, serve, monkeypatch):
    """The URL of a server, a function from which on it redirects to another one, as if public, and its counts."""
    sent: list[str] = []

    async def is_public(url):
        return True

    monkeypatch.setattr(remote, "_is_public", is_public)
    monkeypatch.setattr(trust, "_trusted_servers", set())
    folder = outside.parent / "data"
    with serve(folder) as (other, counts), serve(folder, lambda number: sent[0] if sent else None) as (url, _):
        yield url, lambda: sent.append(f"{other}/own.png?key=secret"), counts


def test_images_that_rows_name_are_redirected_to_other_servers_only_if_allowed(outside, moved):
    url, redirect, counts = moved
    write_parquet(outside.parent / "data", "moved.png")
    (row,) = open_source(f"{url}/train.parquet")
    redirect()
    refused = (
        rf"^{url}/moved\.png: {url}/moved\.png, named by data, redirects to http://[^?]*/own\.png, another server;"
    )
    with pytest.raises(BadImageError, match=refused + ".* add --allow_outside true$"):
        decode_image(row["image"])
    assert counts["all"] == 0
    assert (decode_image(row["image"]["path"])[0][0, 0] == [0, 0, 255]).all()  # as the user names it


def test_workers_that_read_rows_of_trusted_data_follow_redirects(outside, moved):
    url, redirect, _ = moved
    folder = outside.parent / "data"
    write_parquet(folder, f"{url}/moved.png")  # a table on disk
    allowed = pickle.dumps(open_source(folder / "train.parquet", allow_outside=True).dataset)
    redirect()
    (row,) = pickle.loads(allowed)
    assert (decode_image(row["image"])[0][0, 0] == [0, 0, 255]).all()


def test_redirects_are_followed_while_a_source_is_opened_only_if_allowed(moved):
    url, redirect, counts = moved
    redirect()
    path = files.as_path(f"{url}/moved.png")
    for look in (lambda: locate_names(["moved.png"], [path.parent], path.parent, "rows"), lambda: read_size(path)):
        with pytest.raises(OutsideError, match="named by data, redirects to"):
            look()
        assert counts["all"] == 0
    with outside_allowed(True):
        assert locate_names(["moved.png"], [path.parent], path.parent, "rows") == ([path], [])
        assert read_size(path) == [8, 6]


def read_size(path):
    return read_file_sizes([path]).shown[0].tolist()


def test_the_option_of_commands(outside, capsys, monkeypatch):
    monkeypatch.chdir(outside.parent)
    source = str(write_coco(outside.parent / "data", "../private.png"))
    assert main(["data", source]) == 2
    assert "../private.png, outside of" in capsys.readouterr().err
    assert main(["data", source, "--allow_outside", "true"]) == 0
    printed = capsys.readouterr().out
    assert f" --data {source} --allow_outside true" in printed
    recipe = ["mae/vit_nano_cpu.yaml", "--data", source, "--num_images", "1"]
    assert main(["views", *recipe]) == 2
    assert main(["views", *recipe, "--allow_outside", "true"]) == 0


def test_pipes_and_devices_are_no_files(tmp_path):
    """To read one would never end."""
    os.mkfifo(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "a.json")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "b.jpg"))
    for name in ("a.jpg", "zero.jpg", "b.jpg"):
        for path in (tmp_path / name, f"file://{tmp_path / name}"):
            with pytest.raises(BadImageError, match="is a pipe, a device or a socket, and no regular file"):
                decode_image(str(path))
        for read in (files.open_binary, lambda path: files.read_beginning(path, 10)):
            with pytest.raises(OSError, match="no regular file"):
                read(tmp_path / name)
    listener.close()
    with pytest.raises(ValueError, match=r"a\.json is a pipe, a device or a socket"):
        open_source(tmp_path)
