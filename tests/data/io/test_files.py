"""Many files: which are there, and reading them by threads."""

import fsspec
import pytest

from hf_vlm.data.io.files import existing_paths, map_files


@pytest.fixture
def remote():
    """An empty folder of a remote file system."""
    upath = pytest.importorskip("upath")
    yield upath.UPath("memory://boxed-test")
    fsspec.filesystem("memory").rm("/boxed-test", recursive=True)


def test_existing_paths(tmp_path, remote):
    for root in (tmp_path, remote):
        (root / "x").mkdir(parents=True, exist_ok=True)
        (root / "x" / "a.txt").write_text("a")
        paths = [root / "x" / "a.txt", root / "x" / "b.txt", root / "nowhere" / "a.txt"]
        assert existing_paths(paths) == {paths[0]}
    assert existing_paths([]) == set()


def test_results_of_many_files_keep_their_order():
    assert map_files(lambda item: 2 * item, range(100), "Doubling") == [2 * item for item in range(100)]
