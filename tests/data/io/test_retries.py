"""Servers that fail now and then: nothing is dropped or repeated; those that are gone end the run with a reason."""

import io
import re

import fsspec
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from hf_vlm.data.inspection.inspect import image_name
from hf_vlm.data.io import files, retries
from hf_vlm.data.io.decode import BadImageError, decode_image, read_image_bytes
from hf_vlm.data.io.messages import UnreachableError
from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream

# Three in a row each: aiohttp itself asks again after a closed connection, and fsspec after a HEAD.
FAILURES = ["close", "half", 503, 429, 500]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a small file takes many requests."""
    monkeypatch.setattr(files, "BLOCK_SIZE", 2**12)


def write_noise(folder, write_tar, num_images=24):
    """The same images of noise, which do not shrink, in a tar and in a Parquet file."""
    generator = np.random.default_rng(0)
    contents = []
    for _ in range(num_images):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file, "PNG")
        contents.append(file.getvalue())
    write_tar(folder / "train.tar", [(f"{index:03d}.png", content) for index, content in enumerate(contents)])
    Dataset.from_list([{"image": content} for content in contents]).to_parquet(folder / "train.parquet", batch_size=4)
    return contents


def encoded(example, generator=None):
    return {"content": example["image"]["bytes"]}


@pytest.mark.parametrize("name", ["train.tar", "train.parquet"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_file_continues_where_it_failed(tmp_path, serve, write_tar, name, failure, caplog):
    contents = write_noise(tmp_path, write_tar)
    with serve(tmp_path, lambda number: failure if number % 8 > 4 else None) as (url, counts):
        source = open_source(f"{url}/{name}?key=secret", format="webdataset" if name.endswith("tar") else "parquet")
        assert [example["image"]["bytes"] for example in source] == contents
        assert counts["all"] > 12
    assert re.search(rf"http://127\.0\.0\.1:\d+/{name}: .*; trying again in 0\.001 s", caplog.text)
    assert "secret" not in caplog.text


@pytest.mark.parametrize("name", ["train.tar", "train.parquet"])
def test_resuming_from_a_server_that_fails_is_exact(tmp_path, serve, write_tar, name):
    write_noise(tmp_path, write_tar)

    def loader(url):
        stream = ExampleStream(open_source(url).dataset, encoded, block_size=4)
        return StatefulDataLoader(stream, batch_size=None, num_workers=1)

    with serve(tmp_path) as (url, _):
        expected = [example["content"] for example, _ in zip(loader(f"{url}/{name}"), range(20))]
    with serve(tmp_path, lambda number: "close" if number % 8 > 4 else None) as (url, _):
        first = loader(f"{url}/{name}")
        seen = [example["content"] for _, example in zip(range(9), first)]
        second = loader(f"{url}/{name}")
        second.load_state_dict(first.state_dict())
        assert seen + [example["content"] for example, _ in zip(second, range(11))] == expected


@pytest.mark.parametrize("name", ["train.tar", "train.parquet"])
def test_a_server_that_stays_away_stops_the_stream(tmp_path, serve, write_tar, name):
    write_noise(tmp_path, write_tar)
    with serve(tmp_path, lambda number: 503 if number > counts_at_opening else None) as (url, counts):
        counts_at_opening = 10**6
        source = open_source(f"{url}/{name}")
        counts_at_opening = counts["all"] + 2
        with pytest.raises(ValueError, match=rf"{name} cannot be read.*status 503, 7 times in .* then start again"):
            list(source)
        assert counts["all"] > counts_at_opening + len(retries.WAITS)


def test_what_is_forbidden_or_missing_is_asked_for_once(tmp_path, serve, caplog):
    with serve(tmp_path) as (url, counts):
        for name in ("missing.png", "forbidden.png"):
            with pytest.raises(BadImageError, match=rf"{name}: .*40[34]|{name}"):
                read_image_bytes(f"{url}/{name}?key=secret")
        assert counts["all"] == 4  # a HEAD and a GET each
    assert "trying again" not in caplog.text


def test_a_busy_server_of_class_names_does_not_drop_labels(tmp_path, serve, write_tar, png):
    write_tar(tmp_path / "0.tar", [("0.png", png(0)), ("0.cls", b"dog")])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    failing = range(3, 7)  # the tar takes a HEAD and a GET
    with serve(tmp_path, lambda number: 503 if number in failing else None) as (url, _):
        assert [example["label"] for example in open_source(f"{url}/0.tar")] == [1]


def test_images_whose_server_fails_now_and_then_are_read(tmp_path, serve):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    for failure in FAILURES:
        with serve(tmp_path, lambda number, failure=failure: failure if number <= 3 else None) as (url, _):
            assert (decode_image(f"{url}/a.png")[0] == [255, 0, 0]).all()


def test_images_whose_server_is_gone_are_counted_and_skipped(tmp_path, serve, caplog):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    with serve(tmp_path) as (gone, _):
        pass
    with serve(tmp_path) as (url, _):
        rows = [{"image_path": f"{url}/a.png"}, {"image_path": f"{gone}/a.png?key=secret"}]
        Dataset.from_list(rows).to_parquet(tmp_path / "0.parquet")
        stream = ExampleStream(
            open_source(tmp_path / "0.parquet", allow_outside=True).dataset,
            lambda example, generator: {"pixels": decode_image(example["image"])[0]},
            repeat=False,
            max_bad_fraction=1.0,
        )
        assert len(list(stream)) == 1
    progress = stream.state_dict()["progress"]
    assert (progress["num_bad"], progress["bad_names"]) == (1, [f"{gone}/a.png"])
    assert f"Skipping the image {gone}/a.png" in caplog.text
    assert "secret" not in caplog.text


def test_waits_grow_and_other_errors_pass_at_once(monkeypatch):
    monkeypatch.undo()
    waits, clock = [], [100.0]

    def sleep(seconds):
        waits.append(seconds)
        clock[0] += seconds

    def fail(error, seconds=0):
        clock[0] += seconds
        raise error

    monkeypatch.setattr(retries.time, "sleep", sleep)
    monkeypatch.setattr(retries.time, "monotonic", lambda: clock[0])
    with pytest.raises(UnreachableError, match=r"reset, 7 times in 63 s"):
        retries.retried("s3://a/b", lambda: fail(ConnectionResetError("reset")))
    assert waits == [1, 2, 4, 8, 16, 32]
    # Half a minute of silence each time, until two minutes are over: the message has the time that passed.
    with pytest.raises(UnreachableError, match=r"no answer, or a slow one, 4 times in 127 s"):
        retries.retried("s3://a/b", lambda: fail(TimeoutError(), seconds=30))
    assert waits[6:] == [1, 2, 4]
    with pytest.raises(ZeroDivisionError):
        retries.retried("s3://a/b", lambda: 1 / 0)
    assert len(waits) == 9


def test_a_connection_that_ends_early_is_no_end_of_file(monkeypatch):
    """A server that closes without giving the length looks as if the file ended."""
    file_system = fsspec.filesystem("memory")
    file_system.pipe("/short/a.bin", bytes(range(100)))
    open_whole, cut = files._open_remote, [True, True]

    def open_cut(path, cache):
        file = open_whole(path, cache)
        read = file.read
        file.read = lambda size=-1: read(size)[: 7 if cut and cut.pop() else None]
        return file

    monkeypatch.setattr(files, "_open_remote", open_cut)
    try:
        with files.open_binary("memory://short/a.bin") as file:
            file.seek(10)
            assert file.read(50) == bytes(range(10, 60))
            assert file.read() == bytes(range(60, 100))
        assert not cut
    finally:
        file_system.rm("/short", recursive=True)


def test_messages_about_images_show_no_keys(tmp_path, serve):
    (tmp_path / "a.png").write_bytes(b"no image")
    with serve(tmp_path) as (url, _):
        image = {"bytes": None, "path": f"{url}/a.png?key=secret"}
        with pytest.raises(BadImageError, match=rf"{url}/a\.png: not an image of a known format"):
            decode_image(image)
        with pytest.raises(BadImageError, match=rf"{url}/b\.png: the server answers with the status 404"):
            decode_image(f"{url}/b.png?key=secret")
    assert image_name({"image": image}) == f"{url}/a.png"
