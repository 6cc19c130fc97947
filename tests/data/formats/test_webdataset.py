"""WebDataset tars: what they hold, whichever program wrote them, resumed at every position and on damage."""

import io
import json
import pickle
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader
from upath import UPath

from hf_vlm.data.formats import webdataset
from hf_vlm.data.formats.webdataset import open_webdataset
from hf_vlm.data.io.tars import walk_tar
from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def labelled(keys, label_of, ending="cls"):
    """Members of samples: an image for each key and its label."""
    image = io.BytesIO()
    Image.new("RGB", (10, 8)).save(image, "PNG")
    return [
        member for key in keys for member in ((f"{key}.png", image.getvalue()), (f"{key}.{ending}", label_of(key)))
    ]


def value_of(example, generator=None):
    with Image.open(io.BytesIO(example["image"]["bytes"])) as image:
        return {"value": int(np.asarray(image)[0, 0, 0])}


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_those_of_the_standard_library(tmp_path, format, write_tar):
    names = ["a.png", "folder/b.jpg", "x" * 90 + ".png", "f" * 120 + "/" + "y" * 90 + ".png"]
    if format != "ustar":
        names += ["z" * 300 + ".png", "größe/ö.png"]
    path = write_tar(tmp_path / "a.tar", [(name, name.encode() * 7) for name in names], FORMATS[format])
    with tarfile.open(path, "a", format=FORMATS[format]) as tar:
        for typeflag, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = typeflag, "a.png" * 40 if format != "ustar" else "a.png"
            tar.addfile(info)
    with tarfile.open(path) as tar, path.open("rb") as file:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
        assert [tuple(member) for member in walk_tar(file)] == expected
    assert len(expected) == len(names)


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_members_of_many_gigabytes(tmp_path, format):
    path, size = tmp_path / "a.tar", 9 * 2**30 + 5  # more than eleven octal digits hold
    infos = [tarfile.TarInfo("a.png"), tarfile.TarInfo("b.png")]
    infos[0].size = size
    first, second = (info.tobuf(FORMATS[format]) for info in infos)
    next_header = len(first) + 9 * 2**30 + 512
    with path.open("wb") as file:
        file.write(first)
        file.seek(next_header)
        file.write(second)
    with path.open("rb") as file:
        members = [tuple(member) for member in walk_tar(file)]
    assert members == [("a.png", len(first), size), ("b.png", next_header + len(second), 0)]


def test_images_in_the_order_of_the_tars(tmp_path, write_shards):
    count = write_shards(tmp_path)
    source = open_source(tmp_path)
    examples = list(source)
    assert [value_of(example)["value"] for example in examples] == list(range(count))
    assert examples[5]["image"]["path"] == "train-00001.tar/000005.png"
    assert len({example["image_id"] for example in examples}) == count
    assert list(source.features) == ["image", "image_id"]
    assert [value_of(example)["value"] for example in open_source(tmp_path, num_samples=6)] == list(range(6))


def test_ids_do_not_depend_on_where_the_tars_lie(tmp_path, write_shards):
    for name in ("here", "there"):
        write_shards(tmp_path / name)
    ids = [[example["image_id"] for example in open_source(tmp_path / name)] for name in ("here", "there")]
    assert ids[0] == ids[1]


def test_labels_as_numbers_names_and_json(tmp_path, write_tar, png):
    members = [("0.png", png(0)), ("0.cls", b"2"), ("1.cls", b"0"), ("1.png", png(1)), ("1.txt", b"a caption")]
    write_tar(tmp_path / "numbers" / "0.tar", members)
    source = open_source(tmp_path / "numbers")
    assert source.label_names == ["0", "1", "2"]
    assert [example["label"] for example in source] == [2, 0]

    (tmp_path / "numbers" / "classes.txt").write_text("cat\ndog\nbird\n")
    source = open_source(tmp_path / "numbers")
    assert source.label_names == ["cat", "dog", "bird"]
    assert [example["label"] for example in source] == [2, 0]

    write_tar(
        tmp_path / "names" / "0.tar", [("0.png", png(0)), ("0.cls", b"dog\n"), ("1.png", png(1)), ("1.cls", b"cat")]
    )
    source = open_source(tmp_path / "names")
    assert source.label_names == ["cat", "dog"]
    assert [example["label"] for example in source] == [1, 0]

    members = [("0.json", b'{"label": "dog"}'), ("0.png", png(0)), ("1.png", png(1)), ("1.json", b"{}")]
    write_tar(tmp_path / "json" / "0.tar", members)
    assert [example["label"] for example in open_source(tmp_path / "json")] == [0, -1]


def test_labels_that_are_numbers_and_names_are_all_names(tmp_path, write_tar):
    labels = [b"2", b"cat", b"", b"5000000000"]
    write_tar(tmp_path / "0.tar", labelled(range(4), labels.__getitem__))
    source = open_source(tmp_path)
    assert source.label_names == ["2", "5000000000", "cat"]
    assert [example["label"] for example in source] == [0, 2, -1, 1]


def test_large_numbers_do_not_become_numbers_of_classes(tmp_path, write_tar):
    write_tar(tmp_path / "0.tar", labelled(range(2), [b"0", b"5000000000"].__getitem__))
    assert open_source(tmp_path).label_names == ["0", "5000000000"]


def test_labels_of_all_splits_are_numbered_the_same(tmp_path, write_tar):
    write_tar(tmp_path / "train" / "0.tar", labelled("a", lambda key: b"dog"))
    write_tar(tmp_path / "val" / "0.tar", labelled("a", lambda key: b"cat"))
    assert open_source(tmp_path).label_names == open_source(tmp_path, "val").label_names == ["cat", "dog"]
    assert [example["label"] for example in open_source(tmp_path)] == [1]
    (tmp_path / "classes.txt").write_text("ant\ncat\ndog\n")
    assert [example["label"] for example in open_source(tmp_path)] == [2]


def test_with_names_of_classes_opening_reads_the_first_samples_alone(tmp_path, caplog, write_tar):
    write_tar(tmp_path / "0.tar", labelled(range(120), lambda key: b"dog"))
    write_tar(tmp_path / "1.tar", labelled("ab", {"a": b"fish", "b": b"cat"}.get))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    source = open_source(tmp_path)
    assert not caplog.text
    assert [example["label"] for example in source] == [1] * 120 + [0]
    assert "1.tar: 1 samples whose labels or images make no sense are skipped: a ('fish' is no class)" in caplog.text


def test_ids_of_json_are_used_where_they_tell_images_apart(tmp_path, write_tar):
    write_tar(tmp_path / "own" / "0.tar", labelled([42, 7], lambda key: b'{"image_id": %d}' % key, "json"))
    write_tar(tmp_path / "same" / "0.tar", labelled([42, 7], lambda key: b'{"image_id": 1}', "json"))
    assert [example["image_id"] for example in open_source(tmp_path / "own")] == [42, 7]
    assert len({example["image_id"] for example in open_source(tmp_path / "same")} - {1}) == 2


def test_tars_with_the_same_name_have_different_ids(tmp_path, write_tar, png):
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "0.tar", [("0.png", png(0))])
    examples = list(open_source(tmp_path))
    assert [example["image"]["path"] for example in examples] == ["a/0.tar/0.png", "b/0.tar/0.png"]
    assert len({example["image_id"] for example in examples}) == 2


def test_files_of_macos_do_not_part_a_sample(tmp_path, write_tar, png):
    write_tar(tmp_path / "0.tar", [("._0.png", b"x"), ("0.png", png(4)), ("._0.cls", b"x"), ("0.cls", b"3")])
    (example,) = source = open_source(tmp_path)
    assert (value_of(example), source.label_names[example["label"]]) == ({"value": 4}, "3")


@pytest.mark.parametrize("as_list", [True, False])
def test_objects_of_json(tmp_path, as_list, write_tar, png):
    boxes, categories = [[1, 2, 3, 4], [0, 0, 5, 5]], ["dog", "cat"]
    objects = {"bbox": boxes, "category": categories}
    if as_list:
        objects = [{"bbox": box, "category": category} for box, category in zip(boxes, categories)]
    members = [("0.png", png(0)), ("0.json", json.dumps({"objects": []}).encode())]
    members += [("1.png", png(1)), ("1.json", json.dumps({"objects": objects, "width": 10, "height": 8}).encode())]
    write_tar(tmp_path / "0.tar", members)
    source = open_source(tmp_path)
    assert source.object_names == ["cat", "dog"]
    empty, filled = (example["objects"] for example in source)
    assert empty["bbox"] == []
    assert filled == {"bbox": boxes, "category": [1, 0], "area": [12.0, 25.0], "iscrowd": [0, 0]}


def test_masks(tmp_path, write_tar, png):
    write_tar(tmp_path / "0.tar", [("0.jpg", png(0)), ("0.seg.png", png(3))])
    (example,) = open_source(tmp_path)
    assert example["mask"]["bytes"] == png(3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_see_each_image_once(tmp_path, world_size, num_workers, write_shards):
    count = write_shards(tmp_path)
    seen = []
    for rank in range(world_size):
        stream = ExampleStream(
            open_source(tmp_path).dataset, value_of, repeat=False, block_size=4, rank=rank, world_size=world_size
        )
        seen += [example["value"] for example in StatefulDataLoader(stream, batch_size=None, num_workers=num_workers)]
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize(
    ("num_workers", "rank", "world_size"),
    [(0, 0, 1), (0, 1, 2), (0, 2, 3), (2, 1, 2), *(pytest.param(2, 0, n, marks=pytest.mark.slow) for n in (1, 3))],
)
def test_resumes_at_every_position_twice_in_a_row(tmp_path, num_workers, rank, world_size, write_shards):
    def loader():
        source = open_source(tmp_path).unlabelled().dataset
        stream = ExampleStream(source, value_of, block_size=4, rank=rank, world_size=world_size)
        return StatefulDataLoader(stream, batch_size=3, num_workers=num_workers)

    def take(iterator, count):
        return [next(iterator)["value"].tolist() for _ in range(count)]

    write_shards(tmp_path)
    expected = take(iter(loader()), 14)
    for position in range(0, 8, 1 if num_workers == 0 else 3):
        first = loader()
        take(iter(first), position)
        second = loader()
        second.load_state_dict(first.state_dict())
        assert take(iter(second), 3) == expected[position : position + 3]
        third = loader()
        third.load_state_dict(second.state_dict())
        assert take(iter(third), 3) == expected[position + 3 : position + 6]


def test_resuming_reads_no_image_before_the_position(tmp_path, monkeypatch, write_shards):
    write_shards(tmp_path, [20])
    stream = open_webdataset(tmp_path, "train").dataset
    iterator = iter(stream)
    for _ in range(15):
        next(iterator)
    resumed = open_webdataset(tmp_path, "train").dataset
    resumed.load_state_dict(stream.state_dict())
    read, names = webdataset.read_member, []
    monkeypatch.setattr(
        webdataset, "read_member", lambda file, member: names.append(member.name) or read(file, member)
    )
    assert value_of(next(iter(resumed))) == {"value": 15}
    assert names == ["000015.png"]


def test_a_pickled_stream_continues(tmp_path, write_shards):
    write_shards(tmp_path, [6])
    stream = open_webdataset(tmp_path, "train").dataset
    iterator = iter(stream)
    first = [value_of(next(iterator))["value"] for _ in range(2)]
    copy = pickle.loads(pickle.dumps(stream))
    copy.load_state_dict(stream.state_dict())
    assert first + [value_of(example)["value"] for example in copy] == list(range(6))


def test_remote_tars_give_what_those_on_disk_give(tmp_path, write_shards, serve):
    write_shards(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    memory = UPath("memory://tars")
    for name in names:
        (memory / name).write_bytes((tmp_path / name).read_bytes())
    expected = list(open_webdataset(tmp_path, "train"))
    try:
        assert list(open_webdataset(memory, "train")) == expected
        assert list(open_webdataset([memory / name for name in names], "train")) == expected
    finally:
        fsspec.filesystem("memory").store.clear()
    with serve(tmp_path) as (url, _):
        assert list(open_webdataset([UPath(f"{url}/{name}") for name in names], "train")) == expected
        assert list(open_webdataset(UPath(f"{url}/{names[0]}"), "train")) == expected[:5]


def test_a_pass_over_a_remote_tar_takes_few_requests(tmp_path, write_shards, serve):
    write_shards(tmp_path, [200])
    with serve(tmp_path) as (url, counts):
        source = open_webdataset(UPath(f"{url}/train-00000.tar"), "train")
        counts["requests"] = 0
        assert len(list(source)) == 200
    assert counts["requests"] <= 4


def test_a_remote_tar_that_is_cut_short_is_skipped_and_one_that_is_gone_is_not(tmp_path, caplog, write_shards, serve):
    write_shards(tmp_path)
    paths = sorted(tmp_path.iterdir())
    paths[1].write_bytes(paths[1].read_bytes()[: 2 * 1024 + 520])  # within the third image
    with serve(tmp_path) as (url, _):
        source = open_webdataset([UPath(f"{url}/{path.name}?key=secret") for path in paths], "train")
        assert [value_of(example)["value"] for example in source] == [*range(6), *range(8, 17)]
        paths[2].unlink()
        with pytest.raises(
            ValueError, match=r"train-00002\.tar cannot be read: the server answers with the status 404"
        ):
            list(source)
    assert "train-00001.tar: the rest of this tar is skipped: it is cut short within 000007.png" in caplog.text
    assert "secret" not in caplog.text


def test_a_damaged_tar_ends_with_a_warning_and_the_others_continue(tmp_path, caplog, write_shards):
    write_shards(tmp_path)
    path = tmp_path / "train-00002.tar"
    with path.open("rb") as file:
        third = list(walk_tar(file))[3]
    path.write_bytes(path.read_bytes()[: third.offset + 10])  # 8 and 9 are whole; 10 may have lost a label
    assert [value_of(example)["value"] for example in open_source(tmp_path)] == [*range(10), 15, 16]
    assert "train-00002.tar: the rest of this tar is skipped: it is cut short within 000011.png" in caplog.text
    path.write_bytes(b"\x7fgarbage" * 200)
    assert [value_of(example)["value"] for example in open_source(tmp_path)] == [*range(8), 15, 16]
    assert "there is no tar header at byte 0" in caplog.text


def test_damage_among_labelled_tars_is_skipped(tmp_path, caplog, write_tar):
    for shard in range(3):
        path = write_tar(tmp_path / f"{shard}.tar", labelled(range(4), lambda key: b"%d" % key))
        if shard < 2:
            path.write_bytes(path.read_bytes()[: 2 * 2048 + 520])  # 0 is whole, after which 1 may have lost a file
    source = open_source(tmp_path)
    assert source.label_names == ["0", "1", "2", "3"]
    assert [example["label"] for example in source] == [0, 0, 0, 1, 2, 3]
    assert "1.tar: labels are read up to a damage: it is cut short within 2.png at byte 4096" in caplog.text


def test_a_tar_that_vanishes_after_opening_stops_the_stream(tmp_path, write_shards):
    write_shards(tmp_path)
    source = open_source(tmp_path)
    (tmp_path / "train-00001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-00001\.tar cannot be read: .*No such file"):
        list(source)


@pytest.mark.parametrize("protocol", ["", "file://"])
def test_images_too_large_are_skipped_without_being_read(tmp_path, caplog, png, protocol):
    path, size = tmp_path / "0.tar", 2**29 + 1
    with path.open("wb") as file:
        for name, content, length in (
            ("0.png", png(0), len(png(0))),
            ("1.png", b"", size),
            ("2.png", png(2), len(png(2))),
        ):
            member = tarfile.TarInfo(name)
            member.size = length
            file.write(member.tobuf())
            end = file.tell() + -(-length // 512) * 512
            file.write(content)
            file.truncate(end)  # without blocks on disk
            file.seek(end)
        file.write(bytes(1024))
    source = open_source(f"{protocol}{path}")
    assert [value_of(example)["value"] for example in source] == [0, 2]
    assert f"1.png has {size} bytes, more than the {2**29} that are read" in caplog.text


def test_samples_without_an_image_are_skipped_and_counted(tmp_path, caplog, write_tar, png):
    write_tar(tmp_path / "0.tar", [("0.txt", b"text"), ("1.png", png(1)), ("2.txt", b"text")])
    assert [value_of(example)["value"] for example in open_source(tmp_path)] == [1]
    assert "0.tar: 2 samples without an image are skipped: 0, 2" in caplog.text


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("0.json", b"{]"), "0.tar: the labels of 0 cannot be read"),
        (("0.json", b"[1]"), "0.tar: the labels of 0 cannot be read: it is no json object"),
        (
            ("0.json", b'{"objects": {"bbox": [[1, 2]], "category": [0]}}'),
            r"object 0 has the bbox \[1, 2\]; it needs",
        ),
        (("0.json", b'{"objects": {"bbox": [], "category": [1]}}'), "an object needs one value of each field"),
        (("0.json", b'{"objects": [{"bbox": [1, 2, 3, 4], "category": {}}]}'), "neither a number nor a name"),
        (("0.json", b'{"label": 1.5}'), "the label 1.5 is neither a whole number nor a name"),
        (("0.cls", b"\xff"), "0.tar: the labels of 0 cannot be read: 'utf-8' codec"),
        (("0.cls", b"-3"), "1 labels are none of the"),
    ],
)
def test_mistakes_are_named(tmp_path, labels, message, write_tar, png):
    write_tar(tmp_path / "0.tar", [("0.png", png(0)), labels])
    with pytest.raises(ValueError, match=message) as caught:
        open_source(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_tars_without_images_are_named(tmp_path, write_tar):
    write_tar(tmp_path / "0.tar", [("0.txt", b"text")])
    with pytest.raises(ValueError, match="holds no images"):
        open_source(tmp_path)


def test_classes_that_are_not_listed_are_named(tmp_path, write_tar, png):
    write_tar(tmp_path / "0.tar", [("0.png", png(0)), ("0.cls", b"fish")])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"1 labels are none of the 2 classes: 'fish' of 0 in 0\.tar"):
        open_source(tmp_path)


def test_what_is_no_tar_is_named(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"0\.tar cannot be read as a tar: there is no tar header at byte 0"):
        open_source(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0\.tar holds no images"):
        open_source(tmp_path)
    with tarfile.open(tmp_path / "1.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match="unpack it first"):
        open_source(tmp_path / "1.tar.gz", format="webdataset")


def test_no_tars_and_tars_without_a_common_folder_are_refused():
    with pytest.raises(ValueError, match="no tar files are given"):
        open_webdataset([], "train")
    with pytest.raises(ValueError, match="have no folder in common"):
        open_webdataset([UPath("http://a.invalid/0.tar"), UPath("http://b.invalid/0.tar")], "train")


OBJECT = {"bbox": [1, 1, 4, 2], "category": "bee"}


LATE = [
    ({"objects": []}, {"annotations": [OBJECT]}),
    ({"caption": "x"}, {"objects": [OBJECT]}),
    ({"objects": []}, {"objects": [OBJECT]}),
    ({"caption": "label"}, {"boxes": [[1, 1, 4, 2]], "labels": ["bee"]}),
    ({}, {"objects": [{"xmin": 1, "ymin": 1, "xmax": 5, "ymax": 3, "name": "bee", "id": 4}]}),
]
LABELLED = ({"label": 1}, {"label": 0, "annotations": {"bbox": [[1, 1, 4, 2]], "category": ["bee"]}})


@pytest.mark.parametrize(
    ("early", "late", "has_classes"),
    [*((*case, True) for case in LATE), *((*case, False) for case in [*LATE, LABELLED])],
)
def test_objects_that_come_late_are_found(tmp_path, write_tar, png, early, late, has_classes):
    texts = [json.dumps(early).encode()] * 101 + [json.dumps(late).encode()]
    for shard in range(2):
        members = [
            (f"{i:03d}.{end}", data) for i, text in enumerate(texts) for end, data in (("png", png(0)), ("json", text))
        ]
        write_tar(tmp_path / f"train-{shard}.tar", members[: 202 if shard == 0 else None])
    if has_classes:
        (tmp_path / "classes.txt").write_text("ant\nbee\n")
    source = open_source(tmp_path)
    assert source.object_names == (["ant", "bee"] if has_classes else ["bee"])
    objects = [example["objects"] for example in source]
    assert [len(o["bbox"]) for o in objects] == [0] * 202 + [1]
    assert objects[-1]["bbox"] == [[1, 1, 4, 2]]
    assert source.object_names[objects[-1]["category"][0]] == "bee"


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    """An empty folder, on disk or remote."""
    yield tmp_path if request.param == "disk" else UPath("memory://late")
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize(
    ("early", "late", "unseen", "features"),
    [
        ([], [("cls", b"bee")], "label or objects", set()),
        ([], [("json", json.dumps({"objects": [OBJECT]}).encode())], "label or objects", set()),
        ([("cls", b"bee")], [("json", json.dumps({"objects": [OBJECT]}).encode())], "objects", {"label"}),
        ([("cls", b"bee"), ("json", b"{}")], [("cls", b"ant"), ("json", b"no json")], None, {"label"}),
        ([("json", json.dumps({"objects": [OBJECT]}).encode())], [("cls", b"ant")], "label", {"objects"}),
    ],
)
def test_what_comes_after_the_samples_that_opening_reads_is_named(
    folder, tmp_path, write_tar, png, caplog, early, late, unseen, features
):
    members = [(f"{index:03d}", "png", png(0)) for index in range(103)]
    members = [
        (f"{key}.{end}", data)
        for row, (key, *image) in enumerate(members)
        for end, data in [tuple(image), *(late if row > 100 else early)]
    ]
    path = write_tar(tmp_path / "train-0.tar", members)
    (folder / "train-0.tar").write_bytes(path.read_bytes())
    (folder / "classes.txt").write_text("ant\nbee\n")
    source = open_webdataset(folder, "train")
    examples = list(source)
    assert len(examples) == 103
    assert set(source.features) == {"image", "image_id", *features}
    if "label" in features:
        assert [example["label"] for example in examples[:101]] == [1] * 101
    named = [message for message in caplog.messages if "not read" in message]
    assert len(named) == (unseen is not None)
    if named:
        assert f"train-0.tar: 2 samples have {unseen}, which are not read, since the first 100 samples" in named[0]
        assert "101, 102" in named[0]


def test_texts_in_json_are_preferred_to_numbers(tmp_path, write_tar, png):
    fields = {"label": 3, "class_name": "x", "objects": [{"bbox": [1, 1, 4, 2], "category_id": 7, "label": "bee"}]}
    write_tar(tmp_path / "0.tar", [("0.png", png(0)), ("0.json", json.dumps(fields).encode("utf-8-sig"))])
    source = open_source(tmp_path)
    assert (source.label_names, source.object_names) == (["x"], ["bee"])


def test_boxes_without_a_size_are_judged_by_that_of_the_images(tmp_path, write_tar, png):
    fields = {"objects": [{"bbox": [5, 4, 9, 7], "category": "bee"}]}
    members = [
        (f"{i}.{end}", data)
        for i in range(12)
        for end, data in (("png", png(0)), ("json", json.dumps(fields).encode()))
    ]
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=r"12 of 12 boxes do not lie in their image .* as corners"):
        open_source(tmp_path)
