"""Folders that are committed as one, and manifests that name what was damaged since."""

import hashlib
import json
import os

import pytest
import torch
from full_disk import no_file_above
from safetensors.torch import save_file

from hf_vlm.data.io.durable import (
    PARTIAL_FOLDER,
    created_folder,
    damage,
    disk_errors,
    remove_folder,
    replace_text,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "part").mkdir(parents=True)
    (path / "a.bin").write_bytes(bytes(range(100)))
    (path / "part" / "b.bin").write_bytes(b"b" * 50)
    write_manifest(path)
    return path


def test_a_manifest_holds_sizes_and_checksums(folder):
    assert json.loads((folder / "manifest.json").read_text())["files"] == {
        name: {
            "size": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in ("a.bin", "part/b.bin")
    }
    assert damage(folder) == []
    (folder / "notes.txt").write_text("added later")
    assert damage(folder) == []


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.bin", None, "a.bin is missing"),
        ("part/b.bin", b"b" * 49, "part/b.bin has 49 of 50 bytes"),
        ("a.bin", b"", "a.bin has 0 of 100 bytes"),
        ("part/b.bin", b"b" * 49 + b"c", "part/b.bin has other contents"),
        ("manifest.json", b'{"files": {"a.bin": ', "manifest.json cannot be read"),
        ("manifest.json", b"[]", "manifest.json cannot be read"),
    ],
)
def test_what_is_missing_cut_short_or_changed_is_named(folder, name, content, expected):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    (found,) = damage(folder)
    assert found.startswith(expected)
    assert (damage(folder, checksums=False) == []) == ("other contents" in expected)


WRITERS = {
    "python": lambda path: path.write_bytes(bytes(10_000)),
    "torch": lambda path: torch.save(torch.zeros(10_000), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(10_000)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_failed_writes_say_what_where_and_what_to_do(tmp_path, writer):
    with (
        pytest.raises(ValueError, match=rf"The model could not be written to {tmp_path}: .* MiB are free\). Free it"),
        disk_errors("The model", tmp_path, lambda: "Free it."),
        no_file_above(1000),
    ):
        WRITERS[writer](tmp_path / "file")


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes differ"), disk_errors("The model", tmp_path, lambda: ""):
        raise RuntimeError("shapes differ")


def test_a_text_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "run.json"
    replace_text(path, "old")
    with pytest.raises(OSError, match="too large"), no_file_above(10):
        replace_text(path, "new" * 10)
    assert path.read_text() == "old"
    replace_text(path, "new")
    assert path.read_text() == "new"


def test_a_folder_is_deleted_at_once(folder, monkeypatch):
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # killed right after the rename
    remove_folder(folder)
    assert os.listdir(folder.parent) == [PARTIAL_FOLDER]
    assert os.listdir(folder.parent / PARTIAL_FOLDER) == ["deleted-folder"]


def test_a_folder_that_failed_leaves_none_of_those_above_it(tmp_path):
    with pytest.raises(ValueError, match="cannot be written"), created_folder(tmp_path / "new" / "export") as folder:
        (folder / "no folder" / "part").touch()
    assert list(tmp_path.iterdir()) == []
    with created_folder(tmp_path / "new" / "export") as folder:
        (folder / "part").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "export", "part"]
