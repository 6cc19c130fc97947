"""Sources behind URLs: the same streams as on disk, with few requests; what cannot be reached is named."""

import io

import fsspec
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.io.files import expand_braces, find_paths, join
from hf_vlm.data.io.messages import redact_url
from hf_vlm.data.sources import guess_format, open_source
from hf_vlm.data.stream import ExampleStream


def value_of(example, generator=None):
    with Image.open(io.BytesIO(example["image"]["bytes"])) as image:
        return {"value": int(np.asarray(image)[0, 0, 0])}


def write_parquet(folder, num_images=40, size=(64, 64)):
    """Two files of 20 images, whose row groups hold 5 and whose pixels are noise."""
    generator = np.random.default_rng(0)
    rows = []
    for label in range(num_images):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "PNG")
        rows.append({"image": file.getvalue(), "label": label % 3})
    for part in range(2):
        Dataset.from_list(rows[part::2]).to_parquet(folder / f"train-{part:05d}.parquet", batch_size=5)


@pytest.fixture
def memory():
    file_system = fsspec.filesystem("memory")
    yield file_system
    file_system.rm("/", recursive=True)


def test_parquet_over_http_is_what_lies_on_disk(tmp_path, serve):
    write_parquet(tmp_path)
    with serve(tmp_path) as (url, _):
        source = url + "/train-{00000..00001}.parquet"
        assert guess_format(source) == "parquet"
        assert list(open_source(source)) == list(open_source(tmp_path))
        assert len(list(open_source(url + "/train-00001.parquet?key=abc", format="parquet"))) == 20


def test_the_first_rows_are_read_without_the_rest(tmp_path, serve):
    write_parquet(tmp_path, size=(256, 256))
    whole = (tmp_path / "train-00000.parquet").stat().st_size
    with serve(tmp_path) as (url, counts):
        next(iter(open_source(url + "/train-00000.parquet").dataset.iter(batch_size=1)))
        assert counts["bytes"] < 0.5 * whole
        assert counts["requests"] < 30


def test_a_pass_over_parquet_reads_each_byte_about_once(tmp_path, serve):
    write_parquet(tmp_path, size=(256, 256))
    whole = (tmp_path / "train-00000.parquet").stat().st_size
    with serve(tmp_path) as (url, counts):
        assert len(list(open_source(url + "/train-00000.parquet"))) == 20
        assert counts["bytes"] < 1.4 * whole


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_remote_tars_stream_and_resume(tmp_path, num_workers, write_shards, serve):
    count = write_shards(tmp_path)
    with serve(tmp_path) as (url, _):
        source = url + "/train-{00000..00003}.tar"
        assert [value_of(example)["value"] for example in open_source(source)] == list(range(count))

        def loader():
            stream = ExampleStream(open_source(source).dataset, value_of, block_size=4)
            return StatefulDataLoader(stream, batch_size=3, num_workers=num_workers)

        first, expected = loader(), [batch["value"].tolist() for batch, _ in zip(loader(), range(6))]
        iterator = iter(first)
        for _ in range(3):
            next(iterator)
        second = loader()
        second.load_state_dict(first.state_dict())
        assert [batch["value"].tolist() for batch, _ in zip(second, range(3))] == expected[3:]


def test_labels_of_remote_tars_need_their_names(tmp_path, memory, caplog, write_tar, png):
    path = write_tar(tmp_path / "0.tar", [("0.png", png(0)), ("0.cls", b"dog")])
    memory.pipe("/data/0.tar", path.read_bytes())
    assert "label" not in open_source("memory://data/0.tar").features
    assert "labels are left out, since there is no classes.txt" in caplog.text
    memory.pipe("/data/classes.txt", b"cat\ndog\n")
    assert [example["label"] for example in open_source("memory://data/0.tar")] == [1]


def test_stars_name_files_on_disk_and_remote(tmp_path, memory, write_shards):
    count = write_shards(tmp_path)
    for path in tmp_path.glob("*.tar"):
        memory.pipe(f"/data/{path.name}", path.read_bytes())
    for source in (f"{tmp_path}/train-*.tar", "memory://data/*.tar", "memory://data/train-{00000,0000[1-3]}*.tar"):
        assert len(list(open_source(source))) == count
    for source in (f"{tmp_path}/test-*.tar", "memory://data/no-*.tar"):
        with pytest.raises(ValueError, match="no file matches"):
            open_source(source)


def test_braces():
    assert list(expand_braces("a-{08..10}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert list(expand_braces("{a,b}/{0..1}")) == ["a/0", "a/1", "b/0", "b/1"]
    assert [str(path) for path in find_paths("s/{a,b}.tar")] == ["s/a.tar", "s/b.tar"]


def test_images_by_url_are_decoded_and_missing_ones_counted(tmp_path, caplog, serve):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    with serve(tmp_path) as (url, _):
        rows = [{"image_path": f"{url}/a.png"}] * 3 + [{"image_path": f"{url}/b.png"}]
        Dataset.from_list(rows).to_parquet(tmp_path / "0.parquet")
        stream = ExampleStream(
            open_source(tmp_path / "0.parquet", allow_outside=True).dataset,
            lambda example, generator: {"pixels": decode_image(example["image"])[0]},
            repeat=False,
            max_bad_fraction=1.0,
        )
        images = [example["pixels"] for example in stream]
    assert len(images) == 3
    assert (images[0] == [255, 0, 0]).all()
    assert "b.png" in caplog.text
    assert stream.state_dict()["progress"]["num_bad"] == 1


def test_what_cannot_be_reached_is_named_without_keys(tmp_path, write_shards, serve):
    write_shards(tmp_path)
    with serve(tmp_path) as (url, _):
        for name in ("missing.tar", "missing.parquet", "forbidden.parquet"):
            with pytest.raises(ValueError, match=rf"{name} cannot be read .*status 40[34]") as caught:
                open_source(f"{url}/{name}?token=hf_secret")
            assert "hf_secret" not in str(caught.value) + repr(caught.value)
    with pytest.raises(ValueError, match=r"train\.tar cannot be read"):
        open_source(f"{url}/train.tar")  # the server is gone
    for format in (None, "imagefolder"):
        with pytest.raises(ValueError, match="memory://images does not exist"):
            open_source("memory://images", format=format)
    with pytest.raises(ValueError, match="Unsupported filesystem: 'nowhere'"):
        open_source("nowhere://images/0.tar")


def test_passwords_and_queries_are_not_shown():
    assert redact_url("https://me:secret@host:8/a.tar?sig=1#x") == "https://host:8/a.tar"
    assert redact_url("s3://key:secret@bucket/a.tar") == "s3://bucket/a.tar"
    assert redact_url("http://[broken?sig=1") == "http://[broken"
    assert redact_url("/folder/a?b") == "/folder/a?b"


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_files_of_several_folders_are_split_by_where_they_lie(tmp_path, memory, write_tar, png, format):
    """By folders and names below the folder that all have in common, whose own name is ignored."""
    root, suffix = tmp_path / "test" / "set", {"parquet": "parquet", "webdataset": "tar"}[format]
    for value, name in enumerate(("a/train-0", "a/val-0", "b/train-0", "b/c/train-0", "train/x", "val/x")):
        path = root / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if format == "parquet":
            Dataset.from_list([{"image": png(value)}]).to_parquet(path)
        else:
            write_tar(path, [("0.png", png(value))])
        memory.pipe(f"/test/set/{name}.{suffix}", path.read_bytes())
    for base in (str(root), "memory://test/set"):
        expected = {
            ("*/*-*", "train"): [0, 2],
            ("*/*-*", "val"): [1],
            ("{a,b/c}/train-*", "train"): [0, 3],
            ("{train,val}/*", "validation"): [5],
        }
        for (pattern, split), values in expected.items():
            source = open_source(f"{base}/{pattern}.{suffix}", split)
            assert [value_of(example)["value"] for example in source] == values
        with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
            open_source(f"{base}/*/*-*.{suffix}", "test")


def test_relative_paths_of_images_start_from_the_folder_of_their_rows(tmp_path, memory, serve):
    for name, value in (("images/a.png", 1), ("above.png", 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (value, 0, 0)).save(tmp_path / name)
    (tmp_path / "rows").mkdir()
    with serve(tmp_path) as (url, _):
        paths = ["../images/a.png", "../above.png", "../rows/./../above.png", f"{url}/above.png"]
        Dataset.from_list([{"image_path": path} for path in paths]).to_parquet(tmp_path / "rows" / "0.parquet")
        memory.put(str(tmp_path), "/remote", recursive=True)
        for source in (
            tmp_path / "rows",
            "memory://remote/rows",
            f"{url}/rows/0.parquet",
            "memory://remote/rows/*.parquet",
        ):
            opened = open_source(source, format="parquet", allow_outside=True)
            images = [decode_image(example["image"])[0] for example in opened]
            assert [image[0, 0, 0] for image in images] == [1, 2, 2, 2]


def test_joined_urls():
    assert join("https://h/a", "b/c.png") == "https://h/a/b/c.png"
    assert join("s3://bucket/a", "../b.png") == "s3://bucket/b.png"
    assert join("memory:///a", "./b.png") == "memory:///a/b.png"
    for name in ("/disk/b.png", "gs://other/b.png"):
        assert join("s3://bucket/a", name) == name
    assert join("/folder", "b.png") == "/folder/b.png"
    assert join("/folder", "https://h/b.png") == "https://h/b.png"
