"""Messages hold no secrets and nothing that acts on a terminal, and are made in linear time."""

import logging
import time

import pytest

from hf_vlm.data.io.decode import BadImageError, read_image_bytes
from hf_vlm.data.io.messages import (
    FindingsOnce,
    PrintableFormatter,
    one_line,
    printable,
    redact,
    redact_url,
    shown_path,
    summarise,
)


@pytest.mark.parametrize("unit", ["ffd8ffe0", "a://", "a.b+", "@:", "h://u:p@", "ab ", "a::"])
def test_long_texts_are_redacted_in_linear_time(unit):
    text = unit * (2**20 // len(unit))
    start = time.process_time()
    assert len(redact(text)) <= len(text)
    assert len(redact_url(text)) <= len(text)
    assert time.process_time() - start < 3  # 0.1 s; a quadratic one takes a minute for a tenth of it


def test_bytes_as_text_in_place_of_a_path_give_a_short_message():
    start = time.process_time()
    with pytest.raises(BadImageError, match=r"ffd8ff\w+\.\.\. \(2,000,000 characters\)") as caught:
        read_image_bytes({"bytes": None, "path": "ffd8ffe0" * 250_000})
    assert len(str(caught.value)) < 2000
    assert time.process_time() - start < 3


def test_urls_in_chains_and_sentences_lose_their_secrets():
    assert redact_url("zip://a.jpg::https://me:secret@host/b.zip?sig=1") == "zip://a.jpg::https://host/b.zip"
    assert redact_url("https://me:secret@host") == "https://host"
    assert redact("see https://me:secret@host/a?sig=1 and s3://k:s@b/c") == "see https://host/a and s3://b/c"
    assert redact("no url at all, a@b?c") == "no url at all, a@b?c"
    assert shown_path("s3://k:s@b/" + "c" * 5000).startswith("s3://b/ccc")


def test_what_acts_on_a_terminal_is_written_as_an_escape():
    assert printable("a\x1b[2Jb\x07\x9b\x7f\r") == r"a\x1b[2Jb\x07\x9b\x7f\r"
    assert printable("cat\u202egod\u2066\u200f") == r"cat\u202egod\u2066\u200f"
    assert printable("\ud83dx\udcff") == r"\ud83dx\udcff"
    assert printable("Käse 猫 🐈, \t1\n2") == "Käse 猫 🐈, \t1\n2"
    record = logging.LogRecord("hf_vlm", logging.WARNING, "", 0, "%s is left out", ("a\x1b]0;title\x07",), None)
    assert PrintableFormatter().format(record) == r"a\x1b]0;title\x07 is left out"


def test_names_in_messages_take_one_line():
    assert summarise(["cat\n## Results", "dog\x1b[2J"]) == r"cat\n## Results, dog\x1b[2J"
    assert shown_path("a\nb") == r"a\nb"
    assert one_line("a\tb\nc") == r"a\tb\nc"


def test_what_is_found_in_data_passes_once_and_events_each_time():
    handler = logging.Handler()
    handler.addFilter(FindingsOnce())
    passed = []
    handler.emit = lambda record: passed.append((record.name, record.getMessage()))
    finding, other, event = ("formats.coco", "a"), ("formats.coco", "b"), ("io.files", "a")
    dark = ("inspection.pixel_range", "a, too")
    for name, text in (finding, event, other, finding, event, dark, dark):
        handler.handle(logging.makeLogRecord({"name": f"hf_vlm.data.{name}", "msg": "%s", "args": (text,)}))
    assert passed == [(f"hf_vlm.data.{name}", text) for name, text in (finding, event, other, event, dark)]
