"""Inputs of a few bytes that would expand to gigabytes, nest without end or run a program: each is refused by name.

All run in one process whose memory is limited, so that one that is not refused fails.
"""

import io
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_vlm.data.formats.webdataset_samples import MAX_TEXT_BYTES
from hf_vlm.data.io import cells
from hf_vlm.data.io.decode import BadImageError, decode_image
from hf_vlm.data.io.parsing import parse_json, parse_yaml
from hf_vlm.data.io.tars import walk_tar
from hf_vlm.data.sources import open_source

MEMORY = 3 * 2**30  # bytes of address space that a process may take beyond what its imports have
DEEP = 20_000
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 20)
)

# Files of a folder, its format, and what the message says beside the name of the file.
FOLDERS = {
    "aliases of yaml": ({"data.yaml": f"{ALIASES}train: images\nnames: *a19\n"}, "yolo", r"line \d+ has an alias"),
    "deep yaml": ({"data.yaml": f"train: images\nnames: {'[' * DEEP}"}, "yolo", "nests too deep|is not yaml"),
    "two billion classes": (
        {"data.yaml": "train: images\nnc: 2000000000\n"},
        "yolo",
        "at most 100000, not 2000000000",
    ),
    "deep json": ({"a.json": '{"images": ' + "[" * DEEP}, "coco", "nests too deep"),
    "deep metadata": ({"metadata.jsonl": '{"file_name": ' + "[" * DEEP}, "imagefolder", "line 1: .*nests too deep"),
    "large number": ({"metadata.jsonl": '{"file_name": "a.png", "label": ' + "9" * 400 + "}"}, "imagefolder", "large"),
    "deep xml": ({"a.xml": "<annotation>" + "<a>" * DEEP + "</a>" * DEEP + "</annotation>"}, "voc", None),
    "entities of xml": (
        {"a.xml": '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'},
        "voc",
        "declares a DOCTYPE",
    ),
}

PNG = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0\x90wS\xde\0\0\0\x0cIDATx\x9cc\xf8\xcf\xc0\0\0\3\1\1\0"
    b"\xc9\xfe\x92\xef\0\0\0\0IEND\xaeB`\x82"
)

PROGRAM = """
import json, resource, sys
from pathlib import Path
from hf_vlm.data.sources import open_source
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {memory}, used + {memory}))
messages = {{}}
for name, format in json.loads(sys.argv[1]).items():
    try:
        list(open_source(Path(name), format=format))
        messages[name] = None
    except ValueError as error:
        messages[name] = str(error)
print(json.dumps(messages))
"""


def test_annotations_that_expand_are_refused_in_bounded_memory(tmp_path, fork_server):
    formats = {}
    for name, (content, format, _) in FOLDERS.items():
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        for image in (folder / "a.png", folder / "images" / "a.png"):
            image.write_bytes(PNG)
        for file, text in content.items():
            (folder / file).write_text(text)
        formats[str(folder)] = format
    words = [sys.executable, "-c", PROGRAM.format(memory=MEMORY), json.dumps(formats)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = fork_server.run(words, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    messages = json.loads(done.stdout.splitlines()[-1])
    for name, (content, _, expected) in FOLDERS.items():
        message = messages[str(tmp_path / name)]
        if expected is None:
            assert message is None
            continue
        with pytest.raises(ValueError, match=expected):
            raise ValueError(message)
        assert any(file in message for file in content) or str(tmp_path / name) in message
        assert len(message) < 2000


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/tmp/owned) (w) file closefile\n",
        b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 30000 +X 30000\n" + bytes(64),
        b"PF\n30000 30000\n-1.0\n" + bytes(64),
        b"Pf\n30000 30000\n-1.0\n" + bytes(64),
        b"\x59\xa6\x6a\x95\0\0\x75\x30\0\0\x75\x30\0\0\0\x18" + bytes(64),  # a Sun raster
        b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + bytes(64),  # a TIFF of 64 bits
    ],
    ids=["eps", "hdr", "pfm", "grey pfm", "sun", "bigtiff"],
)
def test_headers_that_promise_much_and_programs_are_no_images(data, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_: pytest.fail("a program was run"))
    monkeypatch.setattr("hf_vlm.data.io.decode.cv2.imdecode", lambda *_: pytest.fail("opencv saw it"))
    with pytest.raises(BadImageError, match=r"not an image of a known format|could be decompression bomb"):
        decode_image(data)


def write_cells(path, **columns):
    """Two hundred rows that share one cell per column, of which the file stores one."""
    table = {}
    for name, value in columns.items():
        kind = pa.binary() if isinstance(value, bytes) else pa.string()
        table[name] = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array([value], kind))
    pq.write_table(pa.table(table), path, store_schema=False, compression="zstd")
    assert path.stat().st_size < 2**16
    return path


def test_cells_that_repeat_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "MAX_REPEATED", 2**25)
    monkeypatch.setattr(cells, "BATCH_BYTES", 2**22)
    path = write_cells(tmp_path / "a.parquet", image=PNG + bytes(2**21))
    seen = []
    with pytest.raises(
        ValueError, match=r"a\.parquet cannot be read as Parquet: its row group 0 stores 2,\d+,\d+ byt"
    ):
        seen.extend(example["image_id"] for example in open_source(path))
    assert len(seen) == 16  # of 2 MiB, and the one that the file stores
    small = write_cells(tmp_path / "b.parquet", image=PNG + bytes(2**19))
    assert len(list(open_source(small))) == 200


def test_labels_of_megabytes_are_refused_before_all_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "BATCH_BYTES", 2**22)
    path = write_cells(tmp_path / "a.parquet", image=PNG, label="x" * 2**20)
    with pytest.raises(ValueError, match=r"a\.parquet .*: the column 'label' has cells of 1,048,576 bytes"):
        open_source(path)
    assert open_source(write_cells(tmp_path / "b.parquet", image=PNG, label="cat")).label_names == ["cat"]


def test_json_in_tars_is_bounded(tmp_path, write_tar, caplog):
    texts = {"0": b"[" * DEEP, "1": b" " * (MAX_TEXT_BYTES + 1), "2": b'{"label": "cat"}', "3": b'{"label": "cat"}'}
    numbers = b'{"label": "cat", "image_id": ' + b"9" * 40 + b', "width": ' + b"9" * 400 + b"}"
    members = [
        (f"{name}.{role}", texts[name] if role == "json" else PNG) for name in texts for role in ("png", "json")
    ]
    write_tar(tmp_path / "a.tar", [*members[4:], ("4.png", PNG), ("4.json", numbers), *members[:4]])
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(ValueError, match=r"a\.tar: the labels of 0 cannot be read: it nests too deep"):
        open_source(tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", [*members[4:] * 60, ("4.png", PNG), ("4.json", numbers), *members[:4]])
    examples = list(open_source(tmp_path / "a.tar"))
    assert len(examples) == 121
    assert all(0 <= example["image_id"] < 2**63 for example in examples)
    assert "0 (it nests too deep)" in caplog.text
    assert "1 (its json has more than the 16,777,216 bytes that are read)" in caplog.text


def test_headers_of_tars_are_bounded():
    header = bytearray(512)
    header[:1], header[124:136], header[156:157] = b"a", b"77777777777\0", b"x"  # 8 GB of a name
    header[148:156] = b"%06o\0 " % (sum(header) + 8 * ord(" "))
    with pytest.raises(ValueError, match=r"the header at byte 0 has 8589934591 bytes, more than 1048576"):
        next(walk_tar(io.BytesIO(header)))


def test_what_is_sound_is_parsed():
    assert parse_json(b'{"a": [1, 2]}') == {"a": [1, 2]}
    assert parse_yaml("a: [1, yes]\nb: &anchor x") == {"a": [1, True], "b": "x"}
    with pytest.raises(ValueError, match="line 2 has an alias"):
        parse_yaml("a: &a [1]\nb: *a")
    with pytest.raises(ValueError, match="is not yaml"):
        parse_yaml("a: [")
    with pytest.raises(ValueError, match="more than the 16,777,216"):
        parse_yaml(" " * (MAX_TEXT_BYTES + 1))
